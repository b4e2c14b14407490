"""How much a worker is given at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import PATIENCE

from mp_rerank import RerankerPool
from mp_rerank._pairs import estimate_pair, estimate_text

MakePool = Callable[..., RerankerPool]

DOCUMENT = "word " * 50
TOKENS = estimate_pair(estimate_text("query"), DOCUMENT, None)


@pytest.mark.parametrize(
    ("documents", "of_a_full_slice", "sizes"),
    [
        (8, 8, {4: 2}),  # each worker the half
        (12, 5, {4: 4}),  # three each, twice; not five, five and two
        (16, 4, {4: 4}),
        (9, 16, {8: 1, 4: 1}),
    ],
)
def test_a_request_is_cut_so_that_all_workers_end_at_about_one_time(
    make_pool: MakePool, documents: int, of_a_full_slice: int, sizes: dict[int, int]
) -> None:
    with make_pool(workers=2, slice_tokens=of_a_full_slice * TOKENS) as pool:
        pool.start()
        pool.submit("query", [f"{i:03} {DOCUMENT[4:]}" for i in range(documents)]).result(PATIENCE)
        assert pool.stats().slice_sizes == sizes


def test_a_worker_is_given_no_crumbs(make_pool: MakePool) -> None:
    """To send a few tokens takes longer than to score them with the others."""
    with make_pool(workers=2) as pool:
        pool.start()
        pool.submit("query", [f"document {i}" for i in range(8)]).result(PATIENCE)
        assert pool.stats().slice_sizes == {8: 1}
