"""Which pairs of a slice go through the network together: each once, and at the least cost."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("torch")
from mp_rerank._engine.batches import equal_batches, even_batches, padded_batches, shared_batches

pytestmark = pytest.mark.real


def test_even_batches_hold_about_equally_many_tokens_and_every_pair_once() -> None:
    lengths = [3, 90, 10, 10, 40, 7, 512, 30, 30, 60]
    batches = even_batches(lengths, 256)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert [sum(lengths[i] for i in batch) for batch in batches] == [512, 280]
    assert even_batches([5], 256) == [[0]]
    assert even_batches([9, 300], 256) == [[1, 0]], "a batch of nine tokens costs more than it saves"


def test_padded_batches_hold_every_pair_once_and_cost_least() -> None:
    lengths = [3, 90, 10, 10, 40, 7, 512, 30, 30, 60]

    def cut(overhead: float) -> list[list[int]]:
        batches = list(padded_batches(lengths, 256, overhead))
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        return [[lengths[i] for i in batch] for batch in batches]

    assert cut(256) == [[512], [90, 60], [40, 30, 30], [10, 10, 7, 3]], "as few as can be, and then with least padding"
    assert cut(16) == [[512], [90], [60], [40], [30, 30], [10, 10, 7, 3]]
    assert cut(0) == [[number] for number in sorted(lengths, reverse=True)]
    assert list(padded_batches([9] * 5, 36, 0.1)) == [[0], [1, 2, 3, 4]]


def test_batches_of_pairs_that_begin_alike() -> None:
    system = list(range(100, 150))
    tokens = [[*system, query, *range(document, document + 10)] for query in (1, 2) for document in (10, 30, 50)]
    assert shared_batches(tokens, 10_000) == [[0, 1, 2, 3, 4, 5]]
    shuffled = list(range(6))
    random.Random(1).shuffle(shuffled)
    batches = shared_batches([tokens[i] for i in shuffled], 60)
    assert len(batches) == 2, "50 + 2 * (1 + 3 * 10) tokens are to be computed"
    assert [shuffled[i] for batch in batches for i in batch] == [0, 1, 2, 3, 4, 5]


def test_batches_of_one_length() -> None:
    lengths = [3, 5, 3, 3, 9, 5]
    batches = equal_batches(lengths, 6)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert all(len({lengths[i] for i in batch}) == 1 for batch in batches)
    assert [len(batch) for batch in batches] == [2, 1, 1, 1, 1]
