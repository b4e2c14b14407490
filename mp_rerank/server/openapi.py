"""The description of the server in OpenAPI 3.1, made of the fields that dialects check."""

from __future__ import annotations

from typing import Any

import mp_rerank
from mp_rerank._wire import REQUEST_ID_HEADER
from mp_rerank.server.config import ServerConfig
from mp_rerank.server.dialects import BY_PATH, OPEN, Dialect
from mp_rerank.server.fields import schema_of
from mp_rerank.server.refusals import STATUSES

__all__ = ["document"]

WHEN = {
    400: "The body is no JSON, or a field of it is not what it should be.",
    401: "An API key is needed.",
    403: "The header Host names another server.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too large, or holds too much.",
    415: "The body is not application/json.",
    422: "A field is missing, or is not what it should be.",
    424: "The model failed on a document.",
    429: "A bound on pending work is reached: see Retry-After.",
    500: "The model failed on a document, or the server failed.",
    503: "The model is being loaded, or has no workers left.",
    504: "The request's time is over.",
}
NOT_OF_DIALECTS = {"not_allowed"}
STATUS_PATHS = {
    "/health": "The process lives",
    "/ready": "Every model is loaded and proved",
    "/info": "The first model, as text-embeddings-inference describes it",
    "/models": "The models, as OpenAI's clients list them",
    "/status": "Workers, queues, rates and latencies",
}


def document(config: ServerConfig) -> dict[str, Any]:
    """The whole document."""
    paths: dict[str, Any] = {path: {"post": _scoring(dialects)} for path, dialects in BY_PATH.items()}
    for path, summary in STATUS_PATHS.items():
        paths[path] = {"get": _reading(path, summary, with_keys=bool(config.keys))}
    paths["/v1/models"] = {"get": _reading("/models", STATUS_PATHS["/models"], with_keys=bool(config.keys), v1=True)}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "mp-rerank serve", "version": mp_rerank.__version__},
        "paths": paths,
        "components": {"schemas": _schemas()},
    }
    if config.keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    for dialects in BY_PATH.values():
        for dialect in dialects:
            schemas[f"{dialect.name}_request"] = schema_of(dialect.fields)
            schemas[f"{dialect.name}_answer"] = dialect.answer_schema
            schemas[f"{dialect.name}_error"] = dialect.error_schema
    return schemas


def _scoring(dialects: tuple[Dialect, ...]) -> dict[str, Any]:
    statuses: dict[int, list[Dialect]] = {}
    for dialect in dialects:
        for reason in STATUSES:
            if reason not in NOT_OF_DIALECTS:
                statuses.setdefault(dialect.status(reason), [])
                if dialect not in statuses[dialect.status(reason)]:
                    statuses[dialect.status(reason)].append(dialect)
    responses: dict[str, Any] = {
        "200": {
            "description": "; or ".join(dialect.summary for dialect in dialects),
            "headers": {REQUEST_ID_HEADER: {"schema": {"type": "string"}}},
            "content": _content([f"{dialect.name}_answer" for dialect in dialects]),
        }
    }
    for status, of in sorted(statuses.items()):
        responses[str(status)] = {
            "description": WHEN[status],
            "content": _content([f"{dialect.name}_error" for dialect in of]),
        }
    return {
        "summary": "; or ".join(dialect.summary for dialect in dialects),
        "operationId": "_or_".join(dialect.name for dialect in dialects),
        "requestBody": {"required": True, "content": _content([f"{dialect.name}_request" for dialect in dialects])},
        "responses": responses,
    }


def _reading(path: str, summary: str, *, with_keys: bool, v1: bool = False) -> dict[str, Any]:
    error = _content([f"{OPEN.name}_error"])
    responses: dict[str, Any] = {
        "200": {"description": summary, "content": {"application/json": {"schema": {"type": "object"}}}},
        "403": {"description": WHEN[403], "content": error},
    }
    if path not in ("/health", "/ready") and with_keys:
        responses["401"] = {"description": WHEN[401], "content": error}
    if path in ("/ready", "/info"):
        responses["503"] = {"description": WHEN[503], "content": error}
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": f"{'v1_' if v1 else ''}{path[1:]}",
        "responses": responses,
    }
    if path == "/status":
        responses["404"] = {"description": WHEN[404], "content": error}
        operation["parameters"] = [{"name": "model", "in": "query", "required": False, "schema": {"type": "string"}}]
    if path in ("/health", "/ready"):
        operation["security"] = []
    return operation


def _content(names: list[str]) -> dict[str, Any]:
    references = [{"$ref": f"#/components/schemas/{name}"} for name in names]
    return {"application/json": {"schema": references[0] if len(references) == 1 else {"anyOf": references}}}
