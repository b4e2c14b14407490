"""Both ends of a session that goes through the scheduler, where a pool reaches that and not the workers (a gateway).

The scheduler hands a message on to a worker and its answer back (its operation ``proxy``), and that is all there is:
the pool asks, and the worker answers. So what the worker has to say waits there until the pool asks for it, and one
question of the pool's is always on its way. The next question says that the answer before it has arrived.

Both ends have of Dask's ``Comm`` what sessions use: ``read``, ``write``, ``close``, ``abort``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from distributed.comm import CommClosedError

from mp_rerank._within import within

__all__ = ["RELAY", "PoolEnd", "WorkerEnd"]

RELAY = "mp_rerank_relay"
_T = TypeVar("_T")

# How long a question waits at the worker for something to answer.
WAIT_SECONDS = 10.0
# A pool that has said nothing for so long has gone: it has a beat each second.
SILENCE_SECONDS = 60.0


class PoolEnd:
    """In the pool's process.

    Args:
        ask: sends an operation to the worker, through the scheduler, and waits for the answer; raises ``OSError``.
        name: the session's, in that worker.
    """

    def __init__(self, ask: Callable[..., Awaitable[Any]], name: str) -> None:
        self._ask = ask
        self._name = name
        self._read: list[dict[str, Any]] = []
        self._closed = False

    async def write(self, message: dict[str, Any]) -> None:
        """Send ``message``."""
        self._check()
        await self._ask(op=RELAY, session=self._name, messages=[message], wait=0.0)

    async def read(self) -> dict[str, Any]:
        """The next message; waits for it."""
        while not self._read:
            self._check()
            answer = await self._ask(op=RELAY, session=self._name, messages=[], wait=WAIT_SECONDS)
            self._read = list(answer["messages"][::-1])
            if answer["closed"] and not self._read:
                self._closed = True
        return self._read.pop()

    async def close(self) -> None:
        """Send nothing more; the worker ends the session."""
        self.abort()

    def abort(self) -> None:
        """As ``close``."""
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise CommClosedError("the session is closed")


class WorkerEnd:
    """In the Dask worker's process."""

    def __init__(self) -> None:
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._outbox: list[tuple[dict[str, Any], asyncio.Event]] = []
        self._unconfirmed: list[asyncio.Event] = []
        self._something = asyncio.Event()
        self._closed = False

    async def answer(self, messages: Sequence[dict[str, Any]], wait: float) -> dict[str, Any]:
        """Take what the pool says; what the worker has to say, waited for if there is nothing yet.

        Args:
            messages: the pool's.
            wait: seconds; 0: this is no question.
        """
        for message in messages:
            self._inbox.put_nowait(message)
        if not wait:
            return {"messages": [], "closed": False}
        for arrived in self._unconfirmed:
            arrived.set()
        self._unconfirmed = []
        if not self._closed and not self._outbox:
            self._something.clear()
            try:
                await within(wait, self._something.wait())
            except asyncio.TimeoutError:
                pass
        said, self._outbox = self._outbox, []
        self._unconfirmed = [arrived for _, arrived in said]
        return {"messages": [message for message, _ in said], "closed": self._closed}

    async def read(self) -> dict[str, Any]:
        """The pool's next message; waits for it."""
        return await _in_time(self._inbox.get())

    async def write(self, message: dict[str, Any]) -> None:
        """Say ``message``, the next time the pool asks; returns once it has arrived."""
        if self._closed:
            raise CommClosedError("the session is closed")
        arrived = asyncio.Event()
        self._outbox.append((message, arrived))
        self._something.set()
        await _in_time(arrived.wait())

    async def close(self) -> None:
        """Say nothing more."""
        self.abort()

    def abort(self) -> None:
        """As ``close``."""
        self._closed = True
        self._something.set()
        for arrived in (*self._unconfirmed, *(event for _, event in self._outbox)):
            arrived.set()


async def _in_time(waited: Awaitable[_T]) -> _T:
    try:
        return await within(SILENCE_SECONDS, waited)
    except asyncio.TimeoutError:
        raise CommClosedError(f"the pool has said nothing for {SILENCE_SECONDS:g} s") from None
