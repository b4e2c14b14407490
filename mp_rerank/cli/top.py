"""``mp-rerank top``: what a server is doing, in a terminal."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from typing import Any

from mp_rerank._text import one_line
from mp_rerank.cli import streams
from mp_rerank.cli.streams import InputError
from mp_rerank.errors import RerankError

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "call"]

HELP = "watch a server"
DESCRIPTION = "Show what a server (mp-rerank serve) is doing: rates, latencies, workers, callers. Ctrl-C ends it."

TIMEOUT_SECONDS = 5.0
CLEAR = "\x1b[H\x1b[2J"
CALLERS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8080", metavar="URL", help="http://… or unix:/path")
    parser.add_argument("--api-key-env", default="MP_RERANK_API_KEY", metavar="NAME", help="the variable with the key")
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds between two looks (default: 2)"
    )
    parser.add_argument("--once", action="store_true", help="look once, and leave")
    parser.add_argument("--json", action="store_true", help="print the server's JSON, once")
    parser.add_argument("-v", "--verbose", action="store_true", help=argparse.SUPPRESS)


def call(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    streams.check_output()
    if not arguments.interval > 0:
        raise InputError(f"--interval: more than 0 seconds are needed, not {arguments.interval}")
    once = arguments.once or arguments.json or not sys.stdout.isatty()
    with _client(arguments) as http:
        while True:
            status = _status(http, arguments.url)
            if arguments.json:
                streams.write_json(status)
            else:
                lines = _lines(arguments.url, status)
                streams.write(("" if once else CLEAR) + "\n".join(_fit(lines, once)))
            if once:
                return 0
            streams.flush()
            time.sleep(arguments.interval)


def _client(arguments: argparse.Namespace) -> Any:
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise InputError(f"it needs the extra: pip install 'mp-rerank[client]' ({error})") from error
    url: str = arguments.url
    if not url.startswith(("http://", "https://", "unix:")):
        raise InputError(f"URL: 'http://…', 'https://…' or 'unix:/path' is needed, not {url!r}")
    key = os.environ.get(arguments.api_key_env)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    if url.startswith("unix:"):
        transport = httpx.HTTPTransport(uds=url.removeprefix("unix:"))
        return httpx.Client(base_url="http://localhost", transport=transport, headers=headers, timeout=TIMEOUT_SECONDS)
    return httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_SECONDS)


def _status(http: Any, url: str) -> dict[str, Any]:
    import httpx

    try:
        answer = http.get("/status")
        said: dict[str, Any] = answer.json()
    except httpx.HTTPError as error:
        raise RerankError(f"{url} cannot be reached: {error}") from error
    except json.JSONDecodeError as error:
        raise RerankError(f"{url} gives no JSON: is it mp-rerank serve?") from error
    if answer.status_code != 200:
        raise RerankError(f"{url}: {said.get('error', {}).get('message', answer.status_code)}")
    return said


def _lines(url: str, status: dict[str, Any]) -> list[str]:
    recent = status["recent"]
    latency = recent["latency_seconds"]
    pending = sum(model["stats"]["pending_pairs"] for model in status["models"])
    lines = [
        f"mp-rerank {status['version']} at {url}: {'ready' if status['ready'] else 'not ready'}, "
        f"up {status['uptime_seconds'] / 60:.0f} min",
        f"requests/s {recent['requests_per_second']:.1f}   pairs/s {recent['pairs_per_second']:.1f}   "
        f"refused/s {recent['refused_per_second']:.1f}   in flight {status['requests']}   pairs waiting {pending}",
        "   ".join(f"{name} {_milliseconds(seconds)}" for name, seconds in latency.items()),
        "",
        f"{'MODEL':<32} {'SEAT':>4} {'STATE':<10} {'DEVICE':<10} {'PID':>8} {'MEMORY':>9} {'TOKENS/S':>10}  LAST EXIT",
    ]
    for model in status["models"]:
        measured = {worker["pid"]: worker["rss"] for worker in (model["memory"] or {"workers": []})["workers"]}
        for worker in model["workers"]:
            ended = worker["last_exit"]
            lines.append(
                f"{one_line(model['model'])[:32]:<32} {worker['slot']:>4} {worker['state']:<10} {worker['device']:<10} "
                f"{worker['pid'] or '-':>8} {measured.get(worker['pid'], 0) / 2**20:>5.0f} MiB "
                f"{worker['tokens_per_second']:>10,.0f}  {ended['reason'] if ended else '-'}"
            )
        if not model["workers"]:
            lines.append(f"{one_line(model['model'])[:32]:<32}    - {model['state']}")
    callers = [item for model in status["models"] for item in model["stats"]["callers"].items()]
    callers.sort(key=lambda item: (-item[1]["pending_pairs"], -item[1]["submitted"]))
    lines += ["", f"{'CALLER':<40} {'PENDING':>8} {'PAIRS':>8} {'DONE':>9} {'FAILED':>7} {'LATE':>6} {'CANCELLED':>9}"]
    for name, counts in callers[:CALLERS]:
        lines.append(
            f"{one_line(name)[:40]:<40} {counts['pending_requests']:>8} {counts['pending_pairs']:>8} "
            f"{counts['completed']:>9} {counts['failed']:>7} {counts['timed_out']:>6} {counts['cancelled']:>9}"
        )
    return lines


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _fit(lines: list[str], once: bool) -> list[str]:
    """What has room on the terminal."""
    if once:
        return lines
    width, height = shutil.get_terminal_size()
    return [line[:width] for line in lines[: height - 1]]
