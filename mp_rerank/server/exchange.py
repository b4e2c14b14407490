"""One request that has something scored, from its headers to its answer.

who asks     gate.caller                refused: 401, 403
how much     places.place               refused: 429; given back when the client goes away, too
the body     in time, within its bound  refused: 408, 413, 415, 400
its meaning  dialect.parse              refused: 400, 404, 413, 422
the scores   scoring.score              while the client is there; refused: 429, 503, 504
the answer   dialect.answer
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mp_rerank._wire import REQUEST_ID_HEADER
from mp_rerank._within import within
from mp_rerank.errors import RerankError
from mp_rerank.server.config import ServerConfig
from mp_rerank.server.dialects import Dialect, dialect_of
from mp_rerank.server.gate import Caller, Gate, request_id_of
from mp_rerank.server.limits import Limits, Places
from mp_rerank.server.live import Live
from mp_rerank.server.metrics import Metrics
from mp_rerank.server.models import Models, ServedModel
from mp_rerank.server.refusals import Refused, refused_of
from mp_rerank.server.scoring import Job, Outcome, score

__all__ = ["Scoring", "json_response", "log_access", "refusal_response"]

logger = logging.getLogger("mp_rerank.server")
access_logger = logging.getLogger("mp_rerank.access")

# A cancelled task has ended by the next turn of the loop, or has not heard of it.
CANCEL_SECONDS = 0.05

_NOBODY = Caller("connection", "")


class _GoneError(Exception):
    """The client has gone away."""


class Scoring:
    """The endpoint of every dialect.

    Args:
        config: the server's.
        models: what is served.
        gate: who may ask.
        places: for how many.
        live, metrics: what is told of each request.
    """

    def __init__(
        self, config: ServerConfig, models: Models, gate: Gate, places: Places, live: Live, metrics: Metrics
    ) -> None:
        self._limits = config.limits
        self._access_log = config.access_log
        self._models = models
        self._gate = gate
        self._places = places
        self._live = live
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's."""
        exchange = _Exchange(Request(scope, receive))
        caller = _NOBODY
        try:
            caller = self._gate.caller(exchange.request)
            with self._places.place(caller.name):
                response = await self._respond(exchange, caller)
            outcome = "ok"
        except _GoneError:
            self._ended(exchange, caller, "gone", 499)
            return
        except Refused as refused:
            response = refusal_response(refused, exchange.dialect, exchange.request_id)
            outcome = refused.reason
        self._ended(exchange, caller, outcome, response.status_code)
        await response(scope, receive, send)

    async def _respond(self, exchange: _Exchange, caller: Caller) -> Response:
        try:
            data = await within(self._limits.read_timeout, _body(exchange.request, self._limits))
        except asyncio.TimeoutError:
            words = f"the body did not come within {self._limits.read_timeout} seconds"
            raise Refused("slow", words) from None
        body = _parsed(data)
        exchange.dialect = dialect_of(exchange.request.url.path, body)
        values, exchange.job = exchange.dialect.parse(body)
        job = exchange.job
        self._limits.check_texts(job.texts(), job.size)
        model = self._ready(job)
        outcome = await self._scored(exchange, model, job, caller)
        answer = exchange.dialect.answer(values, job, outcome, model, exchange.request_id)
        return json_response(answer, headers=_headers(exchange, model, outcome))

    def _ready(self, job: Job) -> ServedModel:
        model = self._models.find(job.model)
        if not model.ready:
            raise Refused("unavailable", f"{model.name} is being loaded", retry_after=2)
        if model.failed:
            raise Refused("unavailable", f"{model.name} has no workers left")
        return model

    async def _scored(self, exchange: _Exchange, model: ServedModel, job: Job, caller: Caller) -> Outcome:
        left = max(0.001, self._limits.timeout - exchange.seconds())
        job.options["timeout"] = min(job.options.get("timeout", left), left)
        try:
            outcome = await _while_there(exchange.request, score(model, job, caller.name))
        except (RerankError, TypeError, ValueError) as error:
            refused = refused_of(error)
            if refused.reason in ("bug", "crashed", "scoring"):
                logger.warning(
                    "request %s: %s [mp-rerank explain request-failed]", exchange.request_id, refused.message
                )
            raise refused from error
        if outcome.times is not None:
            self._metrics.wait_seconds.labels(model.name).observe(outcome.times.waited)
            self._metrics.score_seconds.labels(model.name).observe(outcome.times.scored)
        self._metrics.pairs.labels(model.name).observe(job.size)
        return outcome

    def _ended(self, exchange: _Exchange, caller: Caller, outcome: str, status: int) -> None:
        seconds = exchange.seconds()
        self._metrics.requests.labels(exchange.dialect.name, outcome, caller.kind).inc()
        self._metrics.seconds.labels(exchange.dialect.name).observe(seconds)
        pairs = 0 if exchange.job is None else exchange.job.size
        self._live.add(seconds, pairs, ok=outcome == "ok")
        if self._access_log:
            log_access(exchange.request, status, seconds, exchange.request_id, caller, pairs)


class _Exchange:
    """What is known of one request so far."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.request_id = request_id_of(request)
        self.dialect: Dialect = dialect_of(request.url.path, None)
        self.job: Job | None = None
        self._begun = time.perf_counter()

    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.perf_counter() - self._begun


async def _body(request: Request, limits: Limits) -> bytes:
    """The whole body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a browser sends to other sites without asking them first has other types
        raise Refused("media_type", f"content-type: 'application/json' is needed, not {kind!r}")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limits.body_bytes:
        raise limits.body_too_large()
    parts = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limits.body_bytes:
            raise limits.body_too_large()
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _parsed(data: bytes) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused("malformed", f"the body is no JSON: {error}") from None


async def _while_there(request: Request, work: Coroutine[Any, Any, Outcome]) -> Outcome:
    """What ``work`` gives. The client gone, or this task cancelled, cancel it."""
    working = asyncio.ensure_future(work)
    working.add_done_callback(_seen)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise _GoneError
    finally:
        gone.cancel()
        # Again until it holds: a library's code, down there, may swallow a cancellation.
        while not working.done():
            working.cancel()
            await asyncio.wait((working,), timeout=CANCEL_SECONDS)


def _seen(working: asyncio.Future[Outcome]) -> None:
    # An error that comes as the client goes is nobody's any more, and asyncio would log it.
    if not working.cancelled():
        working.exception()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _headers(exchange: _Exchange, model: ServedModel, outcome: Outcome) -> dict[str, str]:
    """TEI's headers, times in milliseconds as there, and the request's id."""
    assert exchange.job is not None
    total = str(round(exchange.seconds() * 1000))
    headers = {
        REQUEST_ID_HEADER: exchange.request_id,
        "x-compute-type": "cpu" if model.on_cpu else "gpu",
        "x-compute-characters": str(exchange.job.characters),
        "x-compute-time": total,  # TEI, too, has it twice
        "x-total-time": total,
    }
    if outcome.times is not None:
        headers["x-queue-time"] = str(round(outcome.times.waited * 1000))
        headers["x-inference-time"] = str(round(outcome.times.scored * 1000))
        if outcome.times.tokenized is not None:
            headers["x-tokenization-time"] = str(round(outcome.times.tokenized * 1000))
    if outcome.tokens is not None:
        headers["x-compute-tokens"] = str(outcome.tokens)
    if outcome.unscored:
        headers["x-unscored"] = str(outcome.unscored)
    return headers


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``value`` as JSON, in ASCII: a lone surrogate in a text has no UTF-8."""
    content = json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
    return Response(content, status, headers, media_type="application/json")


def refusal_response(refused: Refused, dialect: Dialect, request_id: str) -> Response:
    """The answer to a request that is refused, in its dialect."""
    status = dialect.status(refused.reason)
    headers = {REQUEST_ID_HEADER: request_id}
    if refused.retry_after is not None:
        headers["retry-after"] = str(refused.retry_after)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if refused.reason in ("slow", "too_large"):
        headers["connection"] = "close"  # the rest of the body is not waited for
    return json_response(dialect.error(refused, request_id), status, headers)


def log_access(
    request: Request, status: int, seconds: float, request_id: str, caller: Caller, pairs: int | None = None
) -> None:
    """One line about a request; nothing of its texts or its key."""
    access_logger.info(
        "method=%s path=%s status=%d ms=%.1f pairs=%s caller=%s id=%s",
        request.method,
        request.url.path,
        status,
        seconds * 1000,
        "-" if pairs is None else pairs,
        json.dumps(caller.name),
        request_id,
    )
