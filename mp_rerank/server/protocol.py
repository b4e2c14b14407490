"""One connection: uvicorn's protocol, with the bounds that it lacks.

Headers that do not come, headers without end, answers that nobody reads, and connections beyond their bound would each
hold memory for as long as a client likes.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mp_rerank.server.limits import Limits

__all__ = ["protocol_for"]

HEADER_BYTES = 64 * 1024
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
FULL = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"

_numbers = itertools.count(1)


def protocol_for(limits: Limits) -> type[HttpToolsProtocol]:
    """The protocol with these limits."""

    class Protocol(HttpToolsProtocol):
        _header_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None
        _header_bytes = 0
        _in_headers = True

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if self.client is None:  # a Unix socket: each connection is a caller
                self.client = ("unix", next(_numbers))
            self._await_headers()
            if len(self.connections) > limits.connections:
                transport.write(FULL)
                transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timers()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self._in_headers:
                self._header_bytes += len(data)
                if self._header_timer is None:
                    self._await_headers()
            super().data_received(data)
            # Counted with what follows in the same packet, hence the look at whether they have ended by now.
            if self._in_headers and self._header_bytes > HEADER_BYTES and not self.transport.is_closing():
                self.transport.write(TOO_LONG)
                self.transport.close()

        def on_headers_complete(self) -> None:
            self._in_headers = False
            self._header_bytes = 0
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._in_headers = True
            super().on_message_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.get_write_buffer_size() and self._write_timer is None:
                self._write_timer = self.loop.call_later(limits.write_timeout, self._check_read)

        def _await_headers(self) -> None:
            self._header_timer = self.loop.call_later(limits.read_timeout, self.transport.abort)

        def _check_read(self) -> None:
            self._write_timer = None
            if self.transport.get_write_buffer_size():
                self.transport.abort()

        def _stop_timers(self) -> None:
            for timer in (self._header_timer, self._write_timer):
                if timer is not None:
                    timer.cancel()
            self._header_timer = self._write_timer = None

    return Protocol
