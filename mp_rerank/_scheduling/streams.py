"""Scores as they come: what a caller iterates over while the dispatcher fills a request.

The dispatcher puts what is scored into a `Feed` and never waits: a feed holds as much as its request has pairs. A
stream takes from the feed. What is left of its request is cancelled when it is closed, interrupted or garbage, so
nothing that the dispatcher holds may refer to the stream.

A feed is a ``SimpleQueue``, which a signal handler or a finalizer may use at any moment.
"""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any

from mp_rerank._pairs import Score
from mp_rerank._scheduling.futures import SIGNAL_CHECK_SECONDS, check_may_wait
from mp_rerank._workers.green import make_queue

__all__ = ["AsyncScoreStream", "Feed", "ScoreStream"]

_Scored = list[tuple[int, Score]]


class Feed:
    """The scores of one request, on their way to one stream."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Scored | None] = make_queue()
        self._wakes: deque[Callable[[], object]] = deque()

    def put(self, scored: _Scored) -> None:
        """Hand over ``scored``: indices and scores. Called on the dispatcher's thread."""
        self._put(scored)

    def end(self, _: object = None) -> None:
        """Say that nothing more comes."""
        self._put(None)

    def get_nowait(self) -> _Scored | None:
        """What comes next, and ``None`` at the end and ever after; raises ``queue.Empty`` if there is nothing yet."""
        return self._got(self._queue.get_nowait())

    def get(self) -> _Scored | None:
        """As ``get_nowait``, but wait for it."""
        try:
            return self.get_nowait()
        except queue.Empty:
            check_may_wait()
        while True:
            try:
                return self._got(self._queue.get(timeout=SIGNAL_CHECK_SECONDS))
            except queue.Empty:
                pass

    def on_next(self, wake: Callable[[], object]) -> None:
        """Call ``wake`` once something is put, on the thread that puts. For what is known to be quick."""
        self._wakes.append(wake)

    def _got(self, scored: _Scored | None) -> _Scored | None:
        if scored is None:
            self._queue.put(None)  # for whoever asks again, or on another thread
        return scored

    def _put(self, scored: _Scored | None) -> None:
        self._queue.put(scored)
        while self._wakes:  # each pop is one step: of two threads here, each is called by one
            try:
                wake = self._wakes.popleft()
            except IndexError:
                return
            wake()


class _Stream:
    """What both streams have: what came and was not yet taken, and the future of the request behind it."""

    _closed = True  # of one that was interrupted as it was made

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._came: deque[tuple[int, Score]] = deque()
        self._future: Future[Any] | None = None
        self._told = False  # whether the end of the request has been seen, and its error raised
        self._closed = False

    def follow(self, future: Future[Any]) -> None:
        """Let ``future`` be that of the request; it is cancelled if the stream is closed already."""
        self._future = future
        if self._closed:
            future.cancel()

    def _close(self) -> None:
        self._closed = True
        if self._future is not None:
            self._future.cancel()  # of a finished one: nothing
        self._feed.end()  # whoever waits, on another thread

    def __del__(self) -> None:
        if not self._closed:
            self._close()

    def _take(self) -> tuple[int, Score] | None:
        try:
            return self._came.popleft()
        except IndexError:
            return None

    def _raise_error(self) -> None:
        """Raise what the request ended with, if that is an error, once.

        The stream is not closed for it: another thread may hold the last scores at this moment.
        """
        future = self._future
        if future is None or self._told:
            return
        self._told = True
        try:
            error = future.exception(0)
        except CancelledError:  # closed, by another thread
            return
        if error is not None:
            try:
                raise error
            finally:
                del self, future, error  # a traceback would keep them, and each other


class ScoreStream(_Stream):
    """An iterator of ``(index, score)``; see ``RerankerPool.stream``."""

    def __iter__(self) -> ScoreStream:
        return self

    def __next__(self) -> tuple[int, Score]:
        ended = False
        try:
            while not (self._closed or ended):
                item = self._take()
                if item is not None:
                    return item
                scored = self._feed.get()
                ended = scored is None
                self._came.extend(scored or ())
        except BaseException:  # Ctrl-C: what has been taken, and not given, is lost
            self._close()
            raise
        if ended:
            self._raise_error()
        raise StopIteration

    def close(self) -> None:
        """Cancel what is not scored yet, and give nothing more. Does nothing on a stream that is over."""
        self._close()

    def __enter__(self) -> ScoreStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


class AsyncScoreStream(_Stream):
    """An asynchronous iterator of ``(index, score)``; see ``RerankerPool.astream``.

    Args:
        feed: the request's.
        enter: makes and submits the request, and gives its future; called with the first item that is asked for.
    """

    def __init__(self, feed: Feed, enter: Callable[[], Awaitable[Future[Any]]]) -> None:
        super().__init__(feed)
        self._enter: Callable[[], Awaitable[Future[Any]]] | None = enter

    def __aiter__(self) -> AsyncScoreStream:
        return self

    async def __anext__(self) -> tuple[int, Score]:
        ended = False
        try:
            enter, self._enter = self._enter, None
            if enter is not None and not self._closed:
                self.follow(await enter())
            while not (self._closed or ended):
                item = self._take()
                if item is not None:
                    return item
                scored = await self._next()
                ended = scored is None
                self._came.extend(scored or ())
        except BaseException:  # the task is cancelled
            self._close()
            raise
        if ended:
            self._raise_error()
        raise StopAsyncIteration

    async def _next(self) -> _Scored | None:
        """What the feed has next, waited for on no thread."""
        loop = asyncio.get_running_loop()
        while True:
            put = asyncio.Event()
            self._feed.on_next(partial(_set, loop, put))
            try:
                return self._feed.get_nowait()
            except queue.Empty:
                await put.wait()

    async def aclose(self) -> None:
        """Cancel what is not scored yet, and give nothing more. Does nothing on a stream that is over."""
        self._close()

    async def __aenter__(self) -> AsyncScoreStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    try:
        loop.call_soon_threadsafe(event.set)
    except RuntimeError:  # the loop has been closed meanwhile
        pass
