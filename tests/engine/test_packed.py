"""Packed batches: where tokens are in a row, who attends to whom, and what pairs have in common computed once."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mp_rerank import ModelSpec

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from mp_rerank._engine.engine import Engine  # noqa: E402
from mp_rerank._engine.packed import TOKEN_MULTIPLE, PackedBatch, common_beginning  # noqa: E402

pytestmark = pytest.mark.real

SHARING = (
    "qwen3",
    "llama",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3",
    *([models.LOGIT_SCORE] if models.has_logit_score() else []),
)


def engine(folder: str, **options: Any) -> Engine:
    return Engine(ModelSpec(folder, prepack=False, **options), "cpu", None, 256).optimize()


#: few kinds of tokens, so that beginnings are common
rows = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=40), min_size=1, max_size=12)


def padded(tokens: list[list[int]], left: bool) -> tuple[Any, Any]:
    longest = max(map(len, tokens))
    ids = torch.zeros(len(tokens), longest, dtype=torch.long)
    for line, row in zip(ids, tokens, strict=True):
        line[longest - len(row) if left else 0 :][: len(row)] = torch.tensor(row)
    return ids, (ids > 0).long()


@settings(max_examples=200, deadline=None)
@given(rows, st.booleans(), st.sampled_from([0, 1, 4]))
def test_every_token_is_in_the_row_at_its_position_and_comes_back(
    tokens: list[list[int]], left: bool, shortest: int
) -> None:
    ids, mask = padded(tokens, left)
    packed = PackedBatch(mask, ids if shortest else None, shortest)
    row = ids.flatten()[packed.sources]
    assert len(row) % TOKEN_MULTIPLE == 0
    states = torch.stack([row, packed.positions], dim=1)[None]
    back = packed.unpack(states)
    assert torch.equal(back[..., 0], ids)
    for line, real, of in zip(back[..., 1], mask.bool(), tokens, strict=True):
        assert line[real].tolist() == list(range(len(of)))
    assert packed.saved == ids.numel() - packed.count
    assert packed.shared == sum(map(len, tokens)) - packed.count
    if shortest == 0:
        assert packed.shared == 0


@settings(max_examples=100, deadline=None)
@given(rows, st.booleans(), st.sampled_from([0, 1, 4]))
def test_keys_are_the_pair_s_own_tokens_up_to_the_asking_one(
    tokens: list[list[int]], left: bool, shortest: int
) -> None:
    ids, mask = padded(tokens, left)
    packed = PackedBatch(mask, ids if shortest else None, shortest)
    row = ids.flatten()[packed.sources]
    asked = 0
    for bucket in packed.buckets:
        longest = bucket.before + bucket.padded_length
        asking = bucket.asking.view(-1, bucket.padded_length)
        for length, ask, keys in zip(bucket.lengths.tolist(), asking, bucket.keys.view(-1, longest), strict=True):
            assert packed.positions[keys[: bucket.before + length]].tolist() == list(range(bucket.before + length))
            assert packed.positions[ask[:length]].tolist() == list(range(bucket.before, bucket.before + length))
            found = row[keys[: bucket.before + length]].tolist()
            assert any(of[: len(found)] == found for of in tokens)
            asked += length
    assert asked == packed.count


@settings(max_examples=100, deadline=None)
@given(rows, st.booleans(), st.sampled_from([0, 1, 4]), st.sampled_from(["first", "last"]))
def test_the_head_s_tokens_come_back_alone(tokens: list[list[int]], left: bool, shortest: int, which: str) -> None:
    ids, mask = padded(tokens, left)
    packed = PackedBatch(mask, ids if shortest else None, shortest)
    chosen = packed.choose(which)
    back = packed.unpack(ids.flatten()[packed.sources][chosen][None, :, None])[..., 0]
    for line, original, of in zip(back, ids, tokens, strict=True):
        assert line.count_nonzero() == 1
        column = int(line.nonzero()[0, 0])
        assert line[column] == original[column] == of[0 if which == "first" else -1]


def test_common_beginnings() -> None:
    assert common_beginning([1, 2, 3, 4], [1, 2, 5]) == 2
    assert common_beginning([1, 2, 3], [1, 2, 3]) == 2, "each pair keeps a token of its own"
    assert common_beginning([1], [1]) == 0
    assert common_beginning([2, 1], [1, 1]) == 0
    long = list(range(1000))
    assert common_beginning(long, [*long[:617], 0, *long[618:]]) == 617


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def folder(family: str) -> str:
        if family not in made:
            made[family] = models.build(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.mark.skipif(not models.ATTENTION_IS_OPEN, reason="proved on the versions that it is made for")
@pytest.mark.parametrize("family", SHARING)
def test_different_beginnings_in_one_batch(family: str, folders: Callable[[str], str]) -> None:
    """Two instructions, under each two queries, under each three documents: one of them twice, and one of no words."""
    folder = folders(family)
    shares, plain = engine(folder), models.load(folder, "cpu")
    assert shares.recipe.shares_beginnings
    pairs = [
        (f"{instruction} {query}", document)
        for instruction in ("Birds fly because their wings give lift. " * 2, "Bread is baked of flour and water. " * 2)
        for query in ("How many people live in Berlin?", "How many birds fly over Berlin, and why do they?")
        for document in (models.TEXT[0], models.TEXT[1], models.TEXT[0], "")
    ]
    random.Random(0).shuffle(pairs)
    seen: list[PackedBatch] = []
    packing = shares.model.model.base_model.forward
    plain_forward = packing._forward

    def spy(**arguments: Any) -> Any:
        from mp_rerank._engine.packed import current_batch

        seen.append(current_batch())
        return plain_forward(**arguments)

    packing._forward = spy
    shares.batch_tokens = 10_000
    scores = shares.predict(pairs)
    [batch] = seen
    assert batch.shared > sum(shares.readings.tokens) / 3
    np.testing.assert_allclose(scores, plain.predict(pairs), rtol=1e-5, atol=1e-5)
    assert np.std(scores) > 1e-2
    for few in (pairs[:1], pairs[:2], [pairs[0]] * 3):
        np.testing.assert_allclose(shares.predict(few), plain.predict(few), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not models.ATTENTION_IS_OPEN, reason="proved on the versions that it is made for")
def test_an_encoder_shares_nothing(folders: Callable[[str], str]) -> None:
    """Its tokens attend to later ones: those of one query differ from document to document."""
    encoder = engine(folders("modernbert"))
    assert encoder.recipe.unpadded
    assert not encoder.recipe.shares_beginnings


@pytest.mark.skipif(not models.has_logit_score(), reason="needs sentence-transformers 6")
def test_only_the_logits_that_are_read_are_computed(folders: Callable[[str], str]) -> None:
    reads = engine(folders(models.LOGIT_SCORE))
    shapes: list[Any] = []
    reads.model.model.lm_head.register_forward_hook(lambda module, given, output: shapes.append(output.shape))
    reads.predict([("query", "document"), ("query", "another")])
    assert reads.recipe.score_logits
    assert shapes == [(2, 1, 2)]
