"""Waiting with a limit in asyncio, so that a cancellation always ends it.

``asyncio.wait_for`` can swallow one before Python 3.12: where what is waited for is done at that very moment, it
returns that, and the task that was cancelled goes on (python/cpython#86296).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

__all__ = ["within"]

_T = TypeVar("_T")


async def within(seconds: float | None, awaitable: Awaitable[_T]) -> _T:
    """What ``awaitable`` gives; it is cancelled after so many seconds (``None``: never), or with the task that waits.

    Raises:
        asyncio.TimeoutError: it was not done by then.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait((task,), timeout=seconds)
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
            if task.cancelled():
                raise asyncio.TimeoutError
        return task.result()
    finally:
        if not task.done():  # whoever waits was cancelled
            task.cancel()
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody asks for it any more
