"""Who asks: the API key, else a header, else the connection; and whether they may."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from mp_rerank._wire import REQUEST_ID_HEADER
from mp_rerank.server.config import ServerConfig
from mp_rerank.server.keys import Keys
from mp_rerank.server.refusals import Refused

__all__ = ["Caller", "Gate", "request_id_of"]

# What may be taken over into logs and answers as it is.
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
MAX_NAME = 128


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        kind: ``"key"``, ``"header"`` or ``"connection"``.
        name: one caller's, for fairness; never the key itself.
    """

    kind: str
    name: str


class Gate:
    """Lets in who may ask.

    Attributes:
        keys: who may; may be replaced at any time.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.keys: Keys = config.keys
        self._header = config.caller_header
        self._hosts = config.hosts

    def check_host(self, request: HTTPConnection) -> None:
        """Refuse a name that this server is not known by."""
        if self._hosts is None:
            return
        given = request.headers.get("host", "")
        name = given.partition("]")[0].removeprefix("[") if given.startswith("[") else given.partition(":")[0]
        if name.lower() not in self._hosts:
            raise Refused("forbidden", f"the host {name!r} is not this server's: see mp-rerank serve --allow-host")

    def caller(self, request: HTTPConnection) -> Caller:
        """Who asks; refuses whoever has no key, if one is needed."""
        self.check_host(request)
        if self.keys:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            owner = self.keys.owner(given.strip()) if scheme.lower() == "bearer" else None
            if owner is None:
                raise Refused("unauthorized", "an API key is needed, in the header 'Authorization: Bearer KEY'")
            return Caller("key", f"key:{owner}")
        named = request.headers.get(self._header)
        if named:
            return Caller("header", f"header:{named[:MAX_NAME]}")
        client = request.client
        return Caller("connection", "connection" if client is None else f"connection:{client.host}:{client.port}")


def request_id_of(request: HTTPConnection) -> str:
    """The request's id: the client's own, if it is fit to be logged, or a new one."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
