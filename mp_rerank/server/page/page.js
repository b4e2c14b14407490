"use strict";

const PERIOD_MS = 1000;
const find = (id) => document.getElementById(id);
let key = sessionStorage.getItem("mp-rerank-key") || "";

/** An answer of the server, as JSON; an Error with its words otherwise. */
async function ask(path, body) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  const options = body === undefined ? { headers } : { headers, method: "POST", body: JSON.stringify(body) };
  const answer = await fetch(path, { ...options, cache: "no-store" });
  const said = await answer.json();
  find("key-form").hidden = answer.status !== 401;
  if (!answer.ok) throw new Error(said.message || said.error?.message || said.error || answer.statusText);
  return { said, answer };
}

/** An element with a text. Texts are never read as HTML. */
function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function number(value, digits = 1) {
  if (value === null || value === undefined) return "–";
  return value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(value === 0 ? 0 : digits);
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  return seconds < 1 ? `${number(seconds * 1000)} ms` : `${number(seconds, 2)} s`;
}

function size(bytes) {
  return bytes === undefined ? "–" : `${number(bytes / 2 ** 20, 0)} MiB`;
}

// The query.

async function rank(event) {
  event?.preventDefault();
  const documents = find("documents").value.split("\n").filter((line) => line.trim());
  const outcome = find("outcome");
  const button = find("query-form").querySelector("button");
  button.disabled = true;
  outcome.className = "";
  outcome.textContent = "ranking …";
  const begun = performance.now();
  try {
    const body = { query: find("query").value, documents, model: find("model").value, return_documents: false };
    const { said, answer } = await ask("rerank", body);
    const whole = performance.now() - begun;
    const inServer = answer.headers.get("x-total-time");
    find("results").replaceChildren(...said.results.map((result) => row(result, documents)));
    const read = said.usage.total_tokens ? `, ${said.usage.total_tokens} tokens` : "";
    outcome.textContent = `${documents.length} document${documents.length === 1 ? "" : "s"}${read} in ${whole.toFixed(0)} ms (${inServer} ms in the server)`;
  } catch (error) {
    find("results").replaceChildren();
    outcome.className = "error";
    outcome.textContent = error.message;
  } finally {
    button.disabled = false;
  }
}

function row(result, documents) {
  const item = document.createElement("li");
  const score = result.relevance_score;
  item.append(element("span", score === null ? "–" : score.toFixed(4), "score"));
  const bar = element("div", "", "bar");
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  drawn.setAttribute("aria-hidden", "true");
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  rect.setAttribute("height", "100%");
  rect.setAttribute("width", `${Math.max(0, Math.min(1, score || 0)) * 100}%`);
  drawn.append(rect);
  bar.append(drawn, element("span", documents[result.index]));
  item.append(bar);
  return item;
}

// The live view.

const STATE_CLASS = { ready: "good", resting: "muted", failed: "bad", closed: "bad" };

async function look() {
  try {
    show((await ask("status")).said);
  } catch (error) {
    document.querySelector("header").className = "down";
    find("state-text").textContent = error instanceof TypeError ? "the server cannot be reached" : error.message;
  }
}

function show(status) {
  document.querySelector("header").className = status.ready ? "ready" : "";
  const text = status.ready ? "ready" : "not ready";
  if (find("state-text").textContent !== text) find("state-text").textContent = text;
  find("about").textContent = `${status.version}, up ${uptime(status.uptime_seconds)}`;
  const recent = status.recent;
  find("requests-rate").textContent = number(recent.requests_per_second);
  find("pairs-rate").textContent = number(recent.pairs_per_second);
  find("refused-rate").textContent = number(recent.refused_per_second);
  find("in-flight").textContent = status.requests;
  find("pending").textContent = number(sum(status.models, (model) => model.stats.pending_pairs), 0);
  for (const name of ["p50", "p95", "p99"]) find(name).textContent = duration(recent.latency_seconds[name]);
  choices(status.models.map((model) => model.model));
  find("workers").replaceChildren(...status.models.flatMap(workerRows));
  find("callers").replaceChildren(...callerRows(status.models));
}

function choices(names) {
  const select = find("model");
  if ([...select.options].map((option) => option.value).join("\n") === names.join("\n")) return;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
}

function workerRows(model) {
  const memory = new Map((model.memory?.workers || []).map((worker) => [worker.pid, worker.rss]));
  return model.workers.map((worker) => {
    const exit = worker.last_exit;
    const cells = [
      element("td", model.model),
      element("td", worker.slot),
      element("td", worker.state, STATE_CLASS[worker.state] || "warn"),
      element("td", `${worker.device} × ${worker.threads}`),
      element("td", size(memory.get(worker.pid)), "num"),
      element("td", number(worker.tokens_per_second, 0), "num"),
      element("td", exit ? `${exit.reason} ${exit.signal} ${new Date(exit.at * 1000).toLocaleTimeString()}` : "–"),
    ];
    const line = document.createElement("tr");
    line.append(...cells);
    return line;
  });
}

function callerRows(models) {
  const callers = models.flatMap((model) => Object.entries(model.stats.callers));
  callers.sort(([, one], [, other]) => other.pending_pairs - one.pending_pairs || other.submitted - one.submitted);
  return callers.slice(0, 50).map(([name, counts]) => {
    const line = document.createElement("tr");
    line.append(element("td", name));
    for (const field of ["pending_requests", "pending_pairs", "completed", "failed", "timed_out", "cancelled"]) {
      line.append(element("td", counts[field].toLocaleString("en"), "num"));
    }
    return line;
  });
}

function sum(items, of) {
  return items.reduce((total, item) => total + of(item), 0);
}

function uptime(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

find("query-form").addEventListener("submit", rank);
find("documents").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) rank(event);
});
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = find("key").value.trim();
  sessionStorage.setItem("mp-rerank-key", key);
  look();
});

async function live() {
  if (!document.hidden) await look();
  setTimeout(live, PERIOD_MS);
}
live();
