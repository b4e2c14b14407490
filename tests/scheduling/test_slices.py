"""How much a worker is given at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import PATIENCE

from mp_rerank import RerankerPool
from mp_rerank._pairs import estimate_pair, estimate_text
from mp_rerank._scheduling.portions import next_tokens

MakePool = Callable[..., RerankerPool]

DOCUMENT = "word " * 50
TOKENS = estimate_pair(estimate_text("query"), DOCUMENT, None)


@pytest.mark.parametrize(
    ("waiting", "own", "others", "tokens"),
    [
        (600, None, [None], 300),  # each worker the half
        (1_200, None, [None], 300),  # each two of 300; not one 500, one 500 and then 200
        (900, 300, [300], 450),  # each the half of what waits
        (500, None, [None, None], 167),
        (600, None, [1_000], 300),  # the other has enough to do: all of it, in two slices
        (600, None, [100], 350),  # the other will soon have none: it gets 250 of them
        (600, 100, [500], 500),
        (160, None, [None], 160),  # the half, 80, would leave crumbs
        (10_000, None, [], 500),
        (1_010, None, [], 337),  # three slices, since two do not hold it
    ],
)
def test_a_worker_s_part_is_cut_into_equal_slices(
    waiting: int, own: float | None, others: list[float | None], tokens: int
) -> None:
    assert next_tokens(waiting, own, others, full=500, least=100) == tokens


@pytest.mark.parametrize(("documents", "sizes"), [(8, {4: 2}), (9, {8: 1, 4: 1})])
def test_a_request_is_divided_among_workers_that_have_nothing_to_do(
    make_pool: MakePool, documents: int, sizes: dict[int, int]
) -> None:
    with make_pool(workers=2, slice_tokens=16 * TOKENS) as pool:
        pool.start()
        pool.submit("query", [f"{i:03} {DOCUMENT[4:]}" for i in range(documents)]).result(PATIENCE)
        assert pool.stats().slice_sizes == sizes


def test_a_worker_is_given_no_crumbs(make_pool: MakePool) -> None:
    """To send a few tokens takes longer than to score them with the others."""
    with make_pool(workers=2) as pool:
        pool.start()
        pool.submit("query", [f"document {i}" for i in range(8)]).result(PATIENCE)
        assert pool.stats().slice_sizes == {8: 1}
