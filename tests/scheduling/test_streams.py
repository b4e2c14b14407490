"""Scores as they come: the same as submit's, each once, as slices are scored; and what ends a stream ends its work."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
from collections.abc import Callable

import pytest
from conftest import PATIENCE, Fifo, ranked, until
from fakes import scores_of
from interrupts import interrupted

from mp_rerank import (
    ModelSpec,
    PoolClosedError,
    PoolOverloadedError,
    RequestTimeoutError,
    RerankerPool,
    ScoringError,
)
from mp_rerank._scheduling.futures import PoolFuture
from mp_rerank._scheduling.streams import Feed, ScoreStream

MakePool = Callable[..., RerankerPool]
Scored = list[tuple[int, float | list[float]]]


def documents(count: int, *, words: int = 0) -> list[str]:
    return [f"document {i}{' word' * words}" for i in range(count)]


def texts_and_gate(fifo: Fifo) -> list[str]:
    """Five documents, and a shorter one at which the worker stops: it goes out last."""
    return [*documents(5, words=100), fifo.order]


async def collect(stream: object, count: int) -> Scored:
    """That many items of an asynchronous stream."""
    return [await stream.__anext__() for _ in range(count)]  # type: ignore[attr-defined]


# What comes.


def test_each_document_s_score_comes_once_and_is_submit_s(make_pool: MakePool) -> None:
    texts = [*documents(50, words=30), *documents(20, words=30), "", "short"]
    with make_pool() as pool:
        expected = [(r.index, r.relevance_score) for r in pool.rerank("query", texts)]
        assert sorted(pool.stream("query", texts)) == sorted(expected)

        async def main() -> Scored:
            return [item async for item in pool.astream("query", iter(texts))]

        assert sorted(asyncio.run(main())) == sorted(expected)
        assert dict(expected) == dict(enumerate(scores_of("query", texts)))


@pytest.mark.parametrize("coalesce", [True, False])
def test_equal_documents_and_kept_scores_come_too(make_pool: MakePool, coalesce: bool) -> None:
    texts = ["a", "b", "a", "c", "a", "b"]
    with make_pool(workers=1, coalesce=coalesce, score_cache=100) as pool:
        expected = list(enumerate(scores_of("query", texts)))
        assert sorted(pool.stream("query", texts[:2])) == expected[:2]
        for _ in range(2):  # with some kept, and with all
            assert sorted(pool.stream("query", texts)) == expected
        assert pool.stats().cached_pairs >= 8


def test_of_several_labels_there_are_lists(make_pool: MakePool) -> None:
    with make_pool(ModelSpec("three", loader="fakes:load_three_labels")) as pool:
        expected = pool.submit_pairs([("query", d) for d in documents(4)]).result(PATIENCE).tolist()
        assert sorted(pool.stream("query", documents(4))) == list(enumerate(expected))


def test_no_documents_are_no_scores(make_pool: MakePool) -> None:
    with make_pool(workers=1) as pool:
        assert list(pool.stream("query", [])) == []


def test_scores_come_while_others_are_not_there_yet(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1, slice_tokens=1) as pool:
        texts = texts_and_gate(fifo)
        stream = pool.stream("query", texts)
        first = [next(stream) for _ in range(5)]
        assert sorted(first) == list(enumerate(scores_of("query", texts[:5])))
        fifo.wait_until_read()
        fifo.release()
        assert list(stream) == [(5, scores_of("query", texts)[5])]
        assert next(stream, None) is None
        assert (pool.stats().completed, pool.stats().cancelled) == (1, 0)


def test_an_event_loop_goes_on_meanwhile(make_pool: MakePool, fifo: Fifo) -> None:
    """While the pool starts, while it waits for room, and while scores are to come."""
    pool = make_pool(workers=1, slice_tokens=1, max_pending_pairs=5)

    async def main() -> tuple[Scored, Scored]:
        texts = texts_and_gate(fifo)[1:]
        stream, other = pool.astream("query", texts), pool.astream("other", documents(4))
        first = await collect(stream, 4)
        waiting = asyncio.create_task(collect(other, 4))
        rest = asyncio.create_task(collect(stream, 1))
        await asyncio.to_thread(fifo.wait_until_read)
        while "1 requests in line" not in repr(pool):
            await asyncio.sleep(0.005)
        assert not rest.done()
        fifo.release()
        return first + await rest, await waiting

    first, second = asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert sorted(first) == list(enumerate(scores_of("query", texts_and_gate(fifo)[1:])))
    assert sorted(second) == list(enumerate(scores_of("other", documents(4))))


def test_a_slow_consumer_delays_nobody(make_pool: MakePool) -> None:
    with make_pool(workers=1) as pool:
        slow = pool.stream("slow", documents(300, words=20))
        next(slow)
        assert pool.rerank("query", documents(3)) == ranked("query", documents(3))
        until(lambda: pool.stats().pending_pairs == 0)
        assert len(list(slow)) == 299


def test_several_threads_may_share_a_stream(make_pool: MakePool) -> None:
    with make_pool(slice_tokens=1) as pool:
        stream = pool.stream("query", documents(200))
        found: list[Scored] = [[], [], []]
        threads = [threading.Thread(target=lambda n=n: found[n].extend(stream)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(itertools.chain(*found)) == list(enumerate(scores_of("query", documents(200))))


def test_several_tasks_may_share_a_stream(make_pool: MakePool) -> None:
    async def main() -> list[Scored]:
        stream = pool.astream("query", documents(200))

        async def take() -> Scored:
            return [item async for item in stream]

        return await asyncio.gather(*[take() for _ in range(3)])

    with make_pool(slice_tokens=1) as pool:
        found = asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert sorted(itertools.chain(*found)) == list(enumerate(scores_of("query", documents(200))))


# What ends it.

ENDS: dict[str, Callable[[RerankerPool, list[str]], object]] = {}


def end(call: Callable[[RerankerPool, list[str]], object]) -> Callable[[RerankerPool, list[str]], object]:
    """One of the ways to leave a stream after its first score."""
    ENDS[call.__name__] = call
    return call


@end
def close(pool: RerankerPool, texts: list[str]) -> None:
    stream = pool.stream("query", texts)
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []


@end
def leave_with(pool: RerankerPool, texts: list[str]) -> None:
    with pool.stream("query", texts) as stream:
        next(stream)
    assert list(stream) == []


@end
def leave_the_loop(pool: RerankerPool, texts: list[str]) -> None:
    for _ in pool.stream("query", texts):
        break


@end
def close_before_the_first(pool: RerankerPool, texts: list[str]) -> None:
    pool.stream("query", texts).close()


@end
def become_garbage_in_a_cycle(pool: RerankerPool, texts: list[str]) -> None:
    holder: list[object] = [pool.stream("query", texts)]
    holder.append(holder)
    del holder
    gc.collect()


@end
def close_on_another_thread(pool: RerankerPool, texts: list[str]) -> None:
    """While several wait for what comes next."""
    stream = pool.stream("query", texts)
    for _ in range(5):
        next(stream)
    found: list[object] = []
    waiting = [threading.Thread(target=lambda: found.append(next(stream, None))) for _ in range(6)]
    for thread in waiting:
        thread.start()
    time.sleep(0.05)
    stream.close()
    for thread in waiting:
        thread.join(PATIENCE)
    assert found == [None] * 6


@end
def leave_the_async_loop(pool: RerankerPool, texts: list[str]) -> None:
    async def main() -> None:
        async for _ in pool.astream("query", texts):
            break
        await asyncio.to_thread(until, lambda: pool.stats().cancelled == 1)

    asyncio.run(main())


@end
def aclose(pool: RerankerPool, texts: list[str]) -> None:
    async def main() -> None:
        async with pool.astream("query", texts) as left:
            await left.__anext__()
        assert [item async for item in left] == []

    asyncio.run(main())


@end
def cancel_the_task(pool: RerankerPool, texts: list[str]) -> None:
    async def main() -> None:
        stream = pool.astream("query", texts)
        await collect(stream, 5)
        task = asyncio.create_task(collect(stream, 1))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [item async for item in stream] == []

    asyncio.run(main())


@pytest.mark.parametrize("way", ENDS)
def test_leaving_it_cancels_the_rest(make_pool: MakePool, fifo: Fifo, way: str) -> None:
    with make_pool(workers=1, slice_tokens=1) as pool:
        ENDS[way](pool, [*texts_and_gate(fifo), *["last"] * 10])
        until(lambda: pool.stats().cancelled == 1)
        assert (pool.stats().pending_pairs, pool.stats().completed) == (0, 0)
        after = pool.submit("query", documents(3))

        def there() -> bool:
            fifo.let_pass()  # a worker that comes to it now or later: it may have been sent before the stream was left
            return after.done()

        until(there)
        assert after.result() == ranked("query", documents(3))
        assert pool.stats().scored_pairs < 6 + 10 + 3


def test_a_stream_that_nobody_asks_for_an_item_submits_nothing_to_asyncio(make_pool: MakePool) -> None:
    with make_pool(workers=1) as pool:

        async def main() -> None:
            stream = pool.astream("query", documents(3))
            await stream.aclose()
            assert [item async for item in stream] == []
            pool.astream("query", documents(3))

        asyncio.run(main())
        assert pool.stats().submitted == 0


def test_what_came_before_an_error_is_given_first(make_pool: MakePool) -> None:
    texts = [*documents(5, words=100), "!raise no"]
    with make_pool(workers=1, slice_tokens=1) as pool:
        stream = pool.stream("query", texts)
        assert sorted(next(stream) for _ in range(5)) == list(enumerate(scores_of("query", texts[:5])))
        with pytest.raises(ScoringError) as caught:
            next(stream)
        assert caught.value.document_index == 5
        assert list(stream) == []

        async def main() -> None:
            stream = pool.astream("query", texts)
            assert len(await collect(stream, 5)) == 5
            with pytest.raises(ScoringError):
                await stream.__anext__()
            assert [item async for item in stream] == []

        asyncio.run(main())
        assert pool.stats().failed == 2


def test_a_deadline_ends_it(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1, slice_tokens=1) as pool:
        texts = texts_and_gate(fifo)
        streams = [pool.stream("query", texts, timeout=1.0, on_timeout=how) for how in ("raise", "partial")]
        fifo.wait_until_read()
        late, partial = streams
        assert len(list(partial)) == 5
        assert [next(late)[0] for _ in range(5)]
        with pytest.raises(RequestTimeoutError) as caught:
            next(late)
        assert (caught.value.scored, caught.value.total) == (5, 6)
        fifo.release()
        assert pool.stats().timed_out == 2


def test_closing_the_pool_ends_it(make_pool: MakePool, fifo: Fifo) -> None:
    pool = make_pool(workers=1, slice_tokens=1).start()
    stream = pool.stream("query", texts_and_gate(fifo))
    fifo.wait_until_read()
    until(lambda: pool.stats().scored_pairs == 5)  # the worker is at the gate a moment before its scores are here
    pool.close(drain=False)
    assert len([next(stream) for _ in range(5)]) == 5
    with pytest.raises(PoolClosedError):
        next(stream)
    with pytest.raises(PoolClosedError):
        pool.stream("query", documents(1))
    with pytest.raises(PoolClosedError):
        asyncio.run(collect(pool.astream("query", documents(1)), 1))
    fifo.release()


def test_a_full_pool_refuses_it(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1, max_pending_pairs=1, overload="raise") as pool:
        held = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        with pytest.raises(PoolOverloadedError):
            pool.stream("query", documents(1))
        with pytest.raises(PoolOverloadedError):
            asyncio.run(collect(pool.astream("query", documents(1)), 1))
        fifo.release()
        assert held.result(PATIENCE)


@pytest.mark.parametrize("call", ["stream", "astream"])
def test_arguments_are_checked_with_the_call(make_pool: MakePool, call: str) -> None:
    pool = make_pool()
    for query, texts, options, error, words in [
        ("query", "one string", {}, TypeError, "documents: "),
        ("query", [1], {}, TypeError, r"documents\[0\]"),
        (None, [], {}, TypeError, "query: "),
        ("query", [], {"priority": 9}, ValueError, "priority: "),
        ("query", [], {"top_n": 3}, TypeError, "no option top_n"),
    ]:
        with pytest.raises(error, match=words):
            getattr(pool, call)(query, texts, **options)
    assert "not started" in repr(pool)


def test_a_reload_gives_no_score_twice(make_pool: MakePool, fifo: Fifo) -> None:
    """What has begun is the old model's to its end, and what waits is the new one's from its beginning."""
    with make_pool(workers=1, slice_tokens=1) as pool:
        begun = pool.stream("query", texts_and_gate(fifo))
        fifo.wait_until_read()
        waits = pool.stream("query", documents(3))
        pool.reload(ModelSpec("other", loader="fakes:load_salted"))
        fifo.release()
        assert sorted(begun) == list(enumerate(scores_of("query", texts_and_gate(fifo))))
        assert sorted(waits) in [list(enumerate(scores_of(q, documents(3)))) for q in ("query", "salted query")]


# An exception in ``__del__`` goes nowhere: so Python has it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_moment_leaves_nothing_pending(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1, slice_tokens=1) as pool:
        held = pool.submit("query", [fifo.order])
        fifo.wait_until_read()

        def wait() -> None:
            try:
                for _ in pool.stream("query", documents(5), timeout=0.02):
                    pass
            except RequestTimeoutError:
                pass

        moments = 0
        while interrupted(wait, moments + 1):
            moments += 1
            until(lambda: pool.stats().pending_requests == 1)
        assert moments > 10
        fifo.release()
        assert held.result(PATIENCE)
        assert len(list(pool.stream("query", documents(5)))) == 5


def test_waiting_for_a_score_on_a_thread_of_the_pool_is_an_error_and_no_hang(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1) as pool:
        held = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        seen: list[BaseException] = []

        def wait() -> None:
            try:
                next(pool.stream("query", documents(2)))
            except RuntimeError as error:
                seen.append(error)

        assert pool._dispatcher is not None
        pool._dispatcher.ask(wait)
        assert "would wait for itself" in str(seen[0])
        fifo.release()
        assert held.result(PATIENCE)
        until(lambda: pool.stats().cancelled == 1)


def test_what_is_ready_is_given_at_once(make_pool: MakePool) -> None:
    """Not once in the half second after which a wait looks for signals."""
    with make_pool(workers=1, slice_tokens=1) as pool:
        start = time.monotonic()
        for i in range(20):
            assert len(list(pool.stream(f"query {i}", documents(5)))) == 5
        assert time.monotonic() - start < 8


def test_a_thread_that_sees_the_end_leaves_the_others_what_they_hold() -> None:
    """One has taken the last scores from the feed as another finds that nothing more comes."""
    feed = Feed()
    stream = ScoreStream(feed)
    future = PoolFuture()
    stream.follow(future)
    feed.put([(0, 0.5), (1, 0.25)])
    assert next(stream) == (0, 0.5)
    held = stream._came.popleft()  # as a thread does between the feed and the next look
    future.set_result(None)
    feed.end()
    assert list(stream) == []
    stream._came.append(held)
    assert list(stream) == [(1, 0.25)]
