"""A limit on waiting in asyncio: what is waited for, its error, the limit, and a cancellation at any moment."""

from __future__ import annotations

import asyncio

import pytest

from mp_rerank._within import within


def test_what_is_there_in_time() -> None:
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    async def failing() -> None:
        raise ValueError("odd")

    assert asyncio.run(within(5.0, double(4))) == 8
    assert asyncio.run(within(None, double(4))) == 8
    with pytest.raises(ValueError, match="odd"):
        asyncio.run(within(5.0, failing()))


def test_what_is_not_there_in_time_is_cancelled() -> None:
    ended: list[str] = []

    async def waiting() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(within(0.01, waiting()))
    assert ended == ["cancelled"]


@pytest.mark.parametrize("rounds", range(6))
def test_a_cancellation_ends_it_also_as_what_it_waits_for_is_done(rounds: int) -> None:
    """``asyncio.wait_for`` before Python 3.12 returns in one of these rounds, and its task goes on."""
    went_on: list[str] = []

    async def main() -> None:
        event = asyncio.Event()

        async def worker() -> None:
            await within(60.0, event.wait())
            went_on.append("not cancelled")

        task = asyncio.ensure_future(worker())
        await asyncio.sleep(0.01)
        event.set()
        for _ in range(rounds):  # steps of the loop in which the news goes up
            await asyncio.sleep(0)
        if not task.done():
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert went_on == []

    asyncio.run(main())
