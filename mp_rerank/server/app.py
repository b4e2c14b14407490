"""Which path is whose: the ASGI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import mp_rerank
from mp_rerank._wire import REQUEST_ID_HEADER
from mp_rerank.server import openapi
from mp_rerank.server.config import ServerConfig
from mp_rerank.server.dialects import BY_PATH, OPEN, dialect_of
from mp_rerank.server.exchange import Scoring, json_response, log_access, refusal_response
from mp_rerank.server.gate import Caller, Gate, request_id_of
from mp_rerank.server.limits import Places
from mp_rerank.server.live import Live
from mp_rerank.server.metrics import CONTENT_TYPE, Metrics
from mp_rerank.server.models import Models
from mp_rerank.server.refusals import Refused

__all__ = ["App"]

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
# The page is one origin's, shows nobody's frame, and runs nothing but its own script.
PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

Answer = Callable[[Request], Awaitable[Response]]


class App:
    """One server's application.

    Attributes:
        asgi: what uvicorn runs.
        gate: who may ask.
    """

    def __init__(self, config: ServerConfig, models: Models) -> None:
        self._config = config
        self._models = models
        self.gate = Gate(config)
        places = Places(config.limits)
        self._live = Live(models, config.limits, places)
        self._metrics = Metrics(models, places)
        scoring = Scoring(config, models, self.gate, places, self._live, self._metrics)
        self.asgi = Starlette(
            routes=[
                *(Route(path, scoring, methods=["POST"]) for path in BY_PATH),
                *(Route(path, self._open(answer)) for path, answer in self._open_paths().items()),
                *(Route(path, self._kept(answer)) for path, answer in self._kept_paths().items()),
            ],
            middleware=self._middleware(),
            exception_handlers={HTTPException: self._failed, 500: self._failed},
        )

    def _open_paths(self) -> dict[str, Answer]:
        """What anybody may read: nothing of it is about requests."""
        return {
            "/health": self._health,
            "/ping": self._health,
            "/ready": self._ready,
            "/openapi.json": self._openapi,
            **{path: self._page(*file) for path, file in PAGE_FILES.items()},
        }

    def _kept_paths(self) -> dict[str, Answer]:
        """What needs a key, if any is set."""
        return {
            "/info": self._info,
            "/models": self._list,
            "/v1/models": self._list,
            "/status": self._status,
            "/metrics": self._prometheus,
        }

    def _middleware(self) -> list[Middleware]:
        if not self._config.origins:
            return []
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(self._config.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", REQUEST_ID_HEADER, self._config.caller_header],
            expose_headers=[REQUEST_ID_HEADER, "retry-after"],
        )
        return [cors]

    def _open(self, answer: Answer) -> Answer:
        async def respond(request: Request) -> Response:
            try:
                self.gate.check_host(request)
                return await answer(request)
            except Refused as refused:
                return refusal_response(refused, OPEN, request_id_of(request))

        return respond

    def _kept(self, answer: Answer) -> Answer:
        async def respond(request: Request) -> Response:
            begun = time.perf_counter()
            caller = Caller("connection", "")
            try:
                caller = self.gate.caller(request)
                response = await answer(request)
            except Refused as refused:
                response = refusal_response(refused, OPEN, request_id_of(request))
            if self._config.access_log:
                seconds = time.perf_counter() - begun
                log_access(request, response.status_code, seconds, request_id_of(request), caller)
            return response

        return respond

    async def _health(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        if not self._models.ready:
            states = {model.name: "failed" if model.failed else model.ready for model in self._models}
            waits = [name for name, ready in states.items() if ready is not True]
            raise Refused("unavailable", f"not ready: {', '.join(waits)}", retry_after=2)
        return json_response({"status": "ready"})

    async def _openapi(self, request: Request) -> Response:
        return json_response(openapi.document(self._config))

    async def _info(self, request: Request) -> Response:
        model = self._models.find(request.query_params.get("model"))
        if not model.ready:
            raise Refused("unavailable", f"{model.name} is being loaded", retry_after=2)
        limits = self._config.limits
        labels = [f"LABEL_{number}" for number in range(model.num_labels)]
        kind = {
            "id2label": {str(number): label for number, label in enumerate(labels)},
            "label2id": {label: number for number, label in enumerate(labels)},
        }
        return json_response(
            {
                "model_id": model.name,
                "model_sha": None,
                "model_dtype": model.dtype,
                "model_type": {"reranker" if model.num_labels == 1 else "classifier": kind},
                "max_concurrent_requests": limits.requests,
                "max_input_length": model.max_length,
                "max_client_batch_size": limits.documents,
                "auto_truncate": True,
                "version": mp_rerank.__version__,
            }
        )

    async def _list(self, request: Request) -> Response:
        data = [
            {"id": name, "object": "model", "created": model.created, "owned_by": "mp_rerank"}
            for name, model in self._models.names().items()
        ]
        return json_response({"object": "list", "data": data})

    async def _status(self, request: Request) -> Response:
        return json_response(_finite(await self._live.status(request.query_params.get("model"))))

    async def _prometheus(self, request: Request) -> Response:
        return Response(await asyncio.to_thread(self._metrics.exposition), media_type=CONTENT_TYPE)

    def _page(self, name: str, kind: str) -> Answer:
        content = (PAGE / name).read_bytes()

        async def answer(request: Request) -> Response:
            return Response(content, media_type=f"{kind}; charset=utf-8", headers=PAGE_HEADERS)

        return answer

    async def _failed(self, request: Request, error: Exception) -> Response:
        """What Starlette found: no such path, another method, or a bug, which it has logged by then."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        reason = {404: "not_found", 405: "not_allowed"}.get(status, "bug")
        words = {404: f"there is no {request.url.path} here", 405: f"{request.method} is not for {request.url.path}"}
        refused = Refused(reason, words.get(status, "the server failed; its log says why"))
        response = refusal_response(refused, dialect_of(request.url.path, None), request_id_of(request))
        if isinstance(error, HTTPException):
            response.headers.update(error.headers or {})
        return response


def _finite(value: Any) -> Any:
    """``value`` with ``None`` for floats that JSON does not have."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
