"""The connections of one process to one server, for `mp_rerank.client`: requests on a thread with an event loop."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from mp_rerank._scheduling.futures import SIGNAL_CHECK_SECONDS, PoolFuture, is_pool_thread
from mp_rerank._wire import error_from_json
from mp_rerank.errors import (
    ModelLoadError,
    PoolClosedError,
    PoolOverloadedError,
    RequestTimeoutError,
    RerankError,
)

if TYPE_CHECKING:
    import httpx

__all__ = ["GRACE_SECONDS", "Link", "Refusal"]

_T = TypeVar("_T")

CONNECT_SECONDS = 5.0
# Beyond a request's own timeout, which the server keeps: for its answer to come back.
GRACE_SECONDS = 2.0
CONNECTIONS = 256


class Refusal:
    """The server's no, or its silence.

    Attributes:
        status: of its answer; 0: none came.
        error: what it is to the caller.
        retry_after: seconds that it asks for.
    """

    def __init__(self, status: int, error: Exception, retry_after: float = 0.0) -> None:
        self.status = status
        self.error = error
        self.retry_after = retry_after


class Link:
    """The connections of one process to one server, and the thread that has them.

    Attributes:
        num_labels: scores a pair of the server's model; ``None``: not known yet.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        import httpx

        self.num_labels: int | None = None
        self._where = url
        self._owner = os.getpid()
        self._pending: set[asyncio.Task[Any]] = set()
        self._endings: list[asyncio.Task[None]] = []
        self._loop = asyncio.new_event_loop()
        transport = None
        if url.startswith("unix:"):
            transport = httpx.AsyncHTTPTransport(uds=url.removeprefix("unix:"))
        self._http = httpx.AsyncClient(
            base_url="http://localhost" if transport is not None else url,
            transport=transport,
            headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
            limits=httpx.Limits(max_connections=CONNECTIONS),
        )
        # Its own end is waited for by way of `_gone`: Thread.join in the main thread is broken by Ctrl-C before 3.13.
        self._gone = threading.Event()
        threading.Thread(target=_run_loop, args=(self._loop, self._gone), name="mp_rerank-client", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Do ``work`` on the thread; its future."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def fulfil(self, future: PoolFuture, work: Coroutine[Any, Any, Any]) -> None:
        """Do ``work`` on the thread, for ``future``; cancelled, it cancels the work."""
        task: list[asyncio.Task[Any]] = []

        def begin() -> None:
            if future.cancelled():
                work.close()
                return
            task.append(self._loop.create_task(work))
            self._pending.add(task[0])
            task[0].add_done_callback(end)

        def end(done: asyncio.Task[Any]) -> None:
            self._pending.discard(done)
            if not future.claim():
                if not done.cancelled():
                    done.exception()
                return
            error = PoolClosedError("the client was closed") if done.cancelled() else done.exception()
            if error is None:
                future.set_result(done.result())
            else:
                future.set_exception(error)

        def stop(_: object) -> None:
            if future.cancelled():
                _soon(self._loop, lambda: task and task[0].cancel())

        future.add_internal_callback(stop)
        try:
            self._loop.call_soon_threadsafe(begin)
        except RuntimeError:  # closed by another thread
            work.close()
            raise PoolClosedError("the client is closed") from None

    async def ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        params: dict[str, str] | None,
        headers: dict[str, str],
        seconds: float | None,
    ) -> Any:
        """The answer, as JSON, or `Refusal`."""
        import httpx

        limit = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        content = None
        if body is not None:  # in ASCII: a lone surrogate has no UTF-8
            content = json.dumps(body, separators=(",", ":")).encode("ascii")
            headers = {**headers, "content-type": "application/json"}
        try:
            response = await self._http.request(
                method, path, content=content, params=params, headers=headers, timeout=limit
            )
        except httpx.ReadTimeout:
            words = f"{self._where} gave no answer within the request's time and {GRACE_SECONDS:g} seconds"
            return Refusal(504, RequestTimeoutError(words))
        except httpx.TransportError as error:
            words = f"{self._where} cannot be reached: {type(error).__name__}: {error}"
            return Refusal(0, RerankError(words))
        if response.status_code != 200:
            return self._refused(response)
        try:
            return response.json()
        except ValueError:
            words = f"{self._where} gives no JSON: is it mp-rerank serve? {response.text[:100]!r}"
            return Refusal(response.status_code, RerankError(words))

    def _refused(self, response: httpx.Response) -> Refusal:
        status = response.status_code
        try:
            said = response.json()["error"]
            message = str(said["message"])
        except (ValueError, LookupError, TypeError):  # of a proxy, say
            said, message = None, response.text[:200]
        try:
            retry_after = min(float(response.headers.get("retry-after", 0)), 60.0)
        except ValueError:  # a date
            retry_after = 1.0
        error: Exception | None = error_from_json(said)
        if error is None:
            error = _error_of(status, f"{self._where}: {message}")
        return Refusal(status, error, retry_after)

    def end(self, *, drain: bool, timeout: float | None = None) -> None:
        """Let the thread end, once it has nothing left to do."""
        if self._owner != os.getpid():  # a fork has no such thread
            return

        async def end() -> None:
            if drain and self._pending:
                await asyncio.wait(set(self._pending), timeout=timeout)
            for task in list(self._pending):
                task.cancel()
            if self._pending:
                await asyncio.wait(set(self._pending), timeout=GRACE_SECONDS)
            await self._http.aclose()
            self._loop.stop()

        _soon(self._loop, lambda: self._endings.append(self._loop.create_task(end())))

    def close(self, *, drain: bool, timeout: float | None = None) -> None:
        """End the thread, and wait for that, where a thread may wait."""
        self.end(drain=drain, timeout=timeout)
        if not is_pool_thread():
            while not self._gone.wait(SIGNAL_CHECK_SECONDS):
                pass


def _run_loop(loop: asyncio.AbstractEventLoop, gone: threading.Event) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()
        gone.set()


def _soon(loop: asyncio.AbstractEventLoop, fn: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(fn)
    except RuntimeError:  # closed meanwhile
        pass


def _error_of(status: int, message: str) -> Exception:
    """The pool's error for a status whose body names none."""
    if status == 404:
        return ModelLoadError(message)
    if status in (400, 413, 415, 422):
        return ValueError(message)
    if status == 429:
        return PoolOverloadedError(message)
    if status == 504:
        return RequestTimeoutError(message)
    if status == 503:
        return PoolClosedError(message)
    return RerankError(message)
