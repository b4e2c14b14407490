"""Who may ask, for how much, for how long."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import FAKE, PATIENCE, Fifo, until
from serving import Running, serving

from mp_rerank.server.keys import Keys
from mp_rerank.server.limits import Limits

MODELS = {"fake": FAKE}
ONE = {"query": "query", "documents": ["document"]}


@pytest.fixture
def plain() -> Iterator[Running]:
    with serving(MODELS) as running:
        yield running


def send(url: str, content: bytes) -> socket.socket:
    """A connection on which ``content`` has been sent."""
    parts = httpx.URL(url)
    sock = socket.create_connection((parts.host, parts.port), PATIENCE)
    sock.sendall(content)
    return sock


def request_of(body: dict[str, Any], path: str = "/rerank", **headers: str) -> bytes:
    """A request as it goes over the wire."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content


def test_without_a_key_nobody_gets_in() -> None:
    keys = Keys(["alice wonderland-1", "# a comment", "", "bare-key-2"])
    with serving(MODELS, keys=keys) as server, httpx.Client(base_url=server.url) as http:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic wonderland-1"}):
            for path in ("/rerank", "/v1/rerank", "/v2/rerank", "/score", "/pairs"):
                refused = http.post(path, json=ONE, headers=headers)
                assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            for path in ("/status", "/metrics", "/models", "/info"):
                assert http.get(path, headers=headers).status_code == 401
        for path in ("/health", "/ready", "/", "/openapi.json"):
            assert http.get(path).status_code == 200
        for key in ("wonderland-1", "bare-key-2"):
            headers = {"authorization": f"Bearer {key}", "x-caller": "somebody else"}
            assert http.post("/rerank", json=ONE, headers=headers).status_code == 200
        assert set(server.pool.stats().callers) == {"key:alice", "key:key-4"}
        page = http.get("/status", headers=headers).text + http.get("/metrics", headers=headers).text
        assert "wonderland" not in page


def test_keys_are_kept_as_digests_and_mistakes_do_not_print_them(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice secret-1\nbob secret-2\n")
    keys = Keys.read(file)
    assert (keys.owner("secret-2"), keys.owner("secret"), keys.owner("")) == ("bob", None, None)
    assert "secret" not in repr(keys) + repr(vars(keys))
    for content, words in {"a b secret": "line 1", "alice x\nbob x": "line 2", "# nobody\n": "no key in it"}.items():
        file.write_text(content)
        with pytest.raises(ValueError, match=words) as caught:
            Keys.read(file)
        assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        Keys.read(tmp_path / "none")


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MP_RERANK_API_KEYS", "alice one,two")
    keys = Keys.read(None)
    assert [keys.owner(key) for key in ("one", "two")] == ["alice", "key-2"]


def test_the_caller_is_a_header_or_else_the_connection(plain: Running) -> None:
    for headers in ({"x-caller": "a"}, {}, {}):
        with httpx.Client(base_url=plain.url, headers=headers) as http:
            for _ in range(2):
                assert http.post("/rerank", json=ONE).status_code == 200
    callers = plain.pool.stats().callers
    assert callers.pop("header:a").completed == 2
    assert [caller.completed for caller in callers.values()] == [2, 2]
    assert all(name.startswith("connection:127.0.0.1:") for name in callers)


def test_one_callers_thousand_requests_do_not_hold_up_anothers_one(fifo: Fifo) -> None:
    """At the gate stands one slice; whose turn comes after it is the other caller's."""
    with serving(MODELS, {"workers": 1, "slice_tokens": 50}) as server:
        many = [f"document {i}" for i in range(400)]
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as http, ThreadPoolExecutor(2) as threads:
            said = {"query": "query", "documents": [fifo.order, *many]}
            large = threads.submit(http.post, "/rerank", json=said, headers={"x-caller": "greedy"})
            fifo.wait_until_read()
            small = threads.submit(http.post, "/rerank", json=ONE, headers={"x-caller": "modest"})
            until(lambda: "header:modest" in server.pool.stats().callers)
            fifo.release()
            assert small.result(PATIENCE).status_code == 200
            assert large.result(PATIENCE).status_code == 200


def test_a_client_that_goes_away_frees_its_place(plain: Running, fifo: Fifo) -> None:
    many = [f"document {i}" for i in range(1000)]
    sock = send(plain.url, request_of({"query": "query", "documents": [fifo.order, *many]}))
    fifo.wait_until_read()
    assert plain.pool.stats().pending_requests == 1
    sock.close()
    until(lambda: plain.pool.stats().pending_pairs == 0)
    assert plain.pool.stats().cancelled == 1
    until(lambda: httpx.get(f"{plain.url}/status").json()["requests"] == 0)
    fifo.release()  # not before: the worker still stands there


def test_each_bound_has_its_refusal() -> None:
    limits = Limits(body_bytes=2000, documents=5, characters=100)
    with serving(MODELS, limits=limits) as server, httpx.Client(base_url=server.url) as http:
        for said, words in (
            ({"documents": ["a"] * 6}, "at most 5 documents a request are accepted, not 6"),
            ({"documents": ["a" * 101]}, "a text may have at most 100 characters, not 101"),
            ({"documents": ["a" * 3000]}, "the body: at most 2000 bytes are accepted"),
        ):
            refused = http.post("/v2/rerank", json={"query": "query", **said})
            assert (refused.status_code, refused.json()["message"]) == (413, words)
            tei = http.post("/rerank", json={"query": "query", "texts": said["documents"]})
            assert tei.status_code == 413

        def chunks() -> Iterator[bytes]:  # no Content-Length
            for _ in range(30):
                yield b" " * 100

        refused = http.post("/v2/rerank", content=chunks(), headers={"content-type": "application/json"})
        assert refused.status_code == 413


def test_so_many_requests_at_a_time_in_all_and_of_one_caller(fifo: Fifo) -> None:
    limits = Limits(requests=3, requests_per_caller=2)
    held = request_of({"query": "query", "documents": [fifo.order]}, x_caller="a")
    with serving(MODELS, {"workers": 1}, limits=limits) as server, httpx.Client(base_url=server.url) as http:
        first = send(server.url, held)
        fifo.wait_until_read()
        others = [send(server.url, request_of(ONE, x_caller=caller)) for caller in ("a", "b")]
        until(lambda: http.get("/status").json()["requests"] == 3)
        refused = http.post("/v2/rerank", json=ONE, headers={"x-caller": "c"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "the server has 3 requests" in refused.json()["message"]
        others.pop().close()
        until(lambda: http.get("/status").json()["requests"] == 2)
        refused = http.post("/rerank", json={"query": "q", "texts": ["t"]}, headers={"x-caller": "a"})
        assert (refused.status_code, refused.json()["error_type"]) == (429, "Overloaded")
        assert "this caller has 2 requests" in refused.json()["error"]
        fifo.release()
        for sock in (first, *others):
            assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")
            sock.close()


def test_at_the_bound_on_pending_pairs_a_request_is_refused(fifo: Fifo) -> None:
    limits = Limits(pending_pairs=3)
    with serving(MODELS, {"workers": 1}, limits=limits) as server:
        sock = send(server.url, request_of({"query": "query", "documents": [fifo.order, "a"]}))
        fifo.wait_until_read()
        refused = httpx.post(f"{server.url}/v1/rerank", json={"query": "query", "documents": ["b", "c"]})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "pending" in refused.json()["error"]["message"]
        fifo.release()
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        sock.close()


def test_the_deadline_is_504_or_what_there_is(plain: Running, fifo: Fifo) -> None:
    said = {"query": "query", "timeout": 0.2, "documents": [fifo.order]}
    opened = threading.Thread(target=fifo.wait_until_read)
    opened.start()
    late = httpx.post(f"{plain.url}/rerank", json=said, timeout=PATIENCE)
    assert late.status_code == 504
    opened.join()
    partial = httpx.post(
        f"{plain.url}/rerank", json={**said, "on_timeout": "partial", "timeout": 0.05}, timeout=PATIENCE
    )
    assert (partial.status_code, partial.json()["results"], partial.headers["x-unscored"]) == (200, [], "1")
    fifo.release()


def test_who_is_slow_is_given_up() -> None:
    with serving(MODELS, limits=Limits(read_timeout=1)) as server:
        nothing = send(server.url, b"")
        headers = send(server.url, b"POST /rerank HTTP/1.1\r\nHost: loc")
        body = send(server.url, request_of(ONE)[:-5])
        assert body.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert nothing.recv(10) == b""
        assert headers.recv(10) == b""
        for sock in (nothing, headers, body):
            sock.close()


def test_who_does_not_read_is_given_up() -> None:
    texts = ["x" * 500_000] * 30
    with serving(MODELS, limits=Limits(write_timeout=1)) as server:
        parts = httpx.URL(server.url)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((parts.host, parts.port))
        sock.sendall(request_of({"query": "query", "texts": texts, "return_text": True}))
        until(lambda: server.pool.stats().completed == 1)
        until(lambda: not server.server.server_state.connections)
        sock.close()


def test_headers_without_end_are_refused(plain: Running) -> None:
    sock = send(plain.url, b"POST /rerank HTTP/1.1\r\nHost: localhost\r\n" + b"x-a: b\r\n" * 20_000)
    assert sock.recv(100).startswith(b"HTTP/1.1 431 ")
    sock.close()


def test_so_many_connections() -> None:
    with serving(MODELS, limits=Limits(connections=2)) as server:
        held = [send(server.url, b"") for _ in range(2)]
        until(lambda: len(server.server.server_state.connections) == 2)
        third = send(server.url, b"")
        assert third.recv(100).startswith(b"HTTP/1.1 503 ")
        for sock in (*held, third):
            sock.close()


def test_a_name_that_leads_to_loopback_is_not_enough() -> None:
    hosts = frozenset({"localhost", "127.0.0.1", "::1"})
    with serving(MODELS, hosts=hosts) as server, httpx.Client(base_url=server.url) as http:
        for name in ("evil.example", "evil.example:80", "localhost.evil.example", ""):
            for path in ("/", "/status", "/health"):
                assert http.get(path, headers={"host": name}).status_code == 403
            assert http.post("/rerank", json=ONE, headers={"host": name}).status_code == 403
        for name in ("localhost:8080", "127.0.0.1", "[::1]:8080", "LOCALHOST"):
            assert http.post("/rerank", json=ONE, headers={"host": name}).status_code == 200


def test_other_origins_may_ask_only_if_they_are_listed() -> None:
    asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with serving(MODELS) as server:
        assert "access-control-allow-origin" not in httpx.options(f"{server.url}/rerank", headers=asks).headers
        assert "access-control-allow-origin" not in httpx.post(f"{server.url}/rerank", json=ONE, headers=asks).headers
    with serving(MODELS, origins=("https://a.example",)) as server:
        asks["access-control-request-headers"] = "authorization, content-type"
        allowed = httpx.options(f"{server.url}/rerank", headers=asks)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        asks["origin"] = "https://b.example"
        assert "access-control-allow-origin" not in httpx.options(f"{server.url}/rerank", headers=asks).headers


def test_request_ids_come_back_and_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level("INFO", logger="mp_rerank.access"),
        serving(MODELS, access_log=True) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        mine = http.post("/rerank", json={**ONE, "query": "secret"}, headers={"x-request-id": "mine-1"})
        assert mine.headers["x-request-id"] == mine.json()["id"] == "mine-1"
        forged = http.post("/v2/rerank", json={}, headers={"x-request-id": 'a" status=200'})
        assert forged.headers["x-request-id"] == forged.json()["id"] != 'a" status=200'
    lines = [record.getMessage() for record in caplog.records if record.name == "mp_rerank.access"]
    assert len(lines) == 2
    assert "path=/rerank status=200" in lines[0]
    assert "pairs=1" in lines[0]
    assert lines[0].endswith("id=mine-1")
    assert "secret" not in "".join(lines)


def test_while_it_loads_it_is_alive_and_not_ready() -> None:
    with serving(MODELS, load=False) as server, httpx.Client(base_url=server.url) as http:
        assert http.get("/health").status_code == 200
        for answer in (
            http.get("/ready"),
            http.post("/rerank", json=ONE),
            http.post("/rerank", json={"query": "", "texts": [""]}),
        ):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        server.models.load()
        assert http.get("/ready").status_code == 200
        assert http.post("/rerank", json=ONE).status_code == 200


def test_metrics_are_what_prometheus_reads(plain: Running) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    with httpx.Client(base_url=plain.url) as http:
        http.post("/rerank", json={"query": "query", "documents": ["a", "b"]}, headers={"x-caller": "c"})
        http.post("/v2/rerank", json={})
        http.post("/rerank", json={"query": "query", "documents": ["!os._exit 3"]})
        families = {f.name: f for f in text_string_to_metric_families(http.get("/metrics").text)}
    requests = {
        tuple(s.labels.values()): s.value
        for s in families["mp_rerank_http_requests"].samples
        if s.name.endswith("_total")
    }
    assert requests[("header", "rerank", "ok")] == 1 or requests[("rerank", "ok", "header")] == 1
    [scored] = families["mp_rerank_pairs_scored"].samples
    assert (scored.labels, scored.value) == ({"model": "fake"}, 2)
    exits = {s.labels["reason"]: s.value for s in families["mp_rerank_worker_exits"].samples}
    assert exits["crashed"] >= 1
    assert sum(s.value for s in families["mp_rerank_workers"].samples) == 2
    assert all(s.value > 2**20 for s in families["mp_rerank_worker_resident_bytes"].samples)
    for name, expected in {"wait_seconds": (1, None), "score_seconds": (1, None), "slice_pairs": (1, 2)}.items():
        found = {s.name.rpartition("_")[2]: s.value for s in families[f"mp_rerank_{name}"].samples}
        count, total = expected
        assert families[f"mp_rerank_{name}"].type == "histogram"
        assert found["count"] == count
        assert total is None or found["sum"] == total
    assert families["process_resident_memory_bytes"].samples[0].value > 2**20
    dashboard = (Path(__file__).parents[2] / "docs" / "grafana.json").read_text()
    shown = set(re.findall(r"mp_rerank_[a-z_]+", dashboard))
    assert len(shown) > 10
    assert shown <= {sample.name for family in families.values() for sample in family.samples}


def test_openapi_has_every_path(plain: Running) -> None:
    paths = set(httpx.get(f"{plain.url}/openapi.json").json()["paths"])
    routes = {route.path for route in plain.app.asgi.routes}
    assert routes - paths == {"/", "/page.css", "/page.js", "/ping", "/openapi.json", "/metrics"}
    assert paths <= routes


def test_a_unix_socket_is_its_owners_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))  # of a server that was killed
    left.close()
    with serving(MODELS, uds=str(path)) as server:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as http:
            assert http.post("http://localhost/rerank", json=ONE).status_code == 200
        assert [name.rpartition(":")[0] for name in server.pool.stats().callers] == ["connection:unix"]
        with pytest.raises(ValueError, match="another process listens"), serving(MODELS, uds=str(path), load=False):
            pass
    assert not path.exists()
    path.write_text("a file of somebody's")
    with pytest.raises(OSError, match="in use"), serving(MODELS, uds=str(path), load=False):
        pass
    assert path.read_text() == "a file of somebody's"


def test_an_answers_body_does_not_wait_for_its_headers_to_be_acknowledged(plain: Running) -> None:
    sock = send(plain.url, request_of(ONE))
    assert sock.recv(100)
    [connection] = plain.server.server_state.connections
    accepted = connection.transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    sock.close()
