"""Attention within pairs by the kernel for CPUs with AMX: beside float64 attention, and in real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp_rerank import ModelSpec

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
from test_unpad import PAIRS, needs_interface  # noqa: E402

from mp_rerank._engine import attention as buckets  # noqa: E402
from mp_rerank._engine.amx.attention import ANY, Band, Segments, attend  # noqa: E402
from mp_rerank._engine.amx.library import why_not  # noqa: E402
from mp_rerank._engine.engine import Engine  # noqa: E402
from mp_rerank._engine.packed import PackedBatch, attending_by  # noqa: E402
from mp_rerank._engine.unpad import attend_in_tiles, packing_forward  # noqa: E402

pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]

#: (heads of queries, heads of keys, width)
HEADS = [(2, 2, 32), (3, 3, 16), (2, 2, 24), (4, 2, 64), (6, 1, 128), (1, 1, 200)]
BANDS = {
    "all": Band(ANY, ANY),
    "earlier ones": Band(ANY, 0),
    "a window": Band(64, 64),
    "a narrow window": Band(7, 5),
    "a window of earlier ones": Band(20, 0),
}
LENGTHS = [1, 15, 16, 0, 17, 31, 32, 33, 80, 300, 512]
#: Numbers are around 1. torch's own attention in float32 is up to 4e-6 from that in float64.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def in_float64(query: Any, key: Any, value: Any, segments: Segments, band: Band) -> Any:
    """What each of the segments' queries, in their order, should find."""
    found = []
    group = query.shape[1] // key.shape[1]
    for first, count, position, span, spans in segments.segments.tolist():
        keys = torch.cat([torch.arange(begin, begin + n) for begin, n in segments.spans[span : span + spans].tolist()])
        asking = query[first : first + count].double().transpose(0, 1)
        own, answers = (states[keys].double().repeat_interleave(group, 1).transpose(0, 1) for states in (key, value))
        products = asking @ own.transpose(1, 2) * query.shape[2] ** -0.5
        distance = torch.arange(len(keys)) - torch.arange(position, position + count)[:, None]
        products.masked_fill_((distance < -band.before) | (distance > band.after), -torch.inf)
        found.append((products.softmax(-1) @ answers).transpose(0, 1))
    return torch.cat(found)


def states_of(heads: tuple[int, int, int], dtype: Any, tokens: int) -> list[Any]:
    """Queries, keys and values, one beside the other as a single linear layer makes them."""
    of_queries, of_keys, width = heads
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(tokens, (of_queries + 2 * of_keys) * width, generator=generator).to(dtype)
    return [
        part.unflatten(1, (-1, width))
        for part in both.split([of_queries * width, of_keys * width, of_keys * width], dim=1)
    ]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_pairs_of_any_length(heads: tuple[int, int, int], band: Band, dtype: Any, threads: None) -> None:
    begins = np.cumsum([0, *LENGTHS])
    segments = Segments(
        np.array([(begin, n, 0, i, 1) for i, (begin, n) in enumerate(zip(begins, LENGTHS, strict=False))]),
        np.array([(begin, n) for begin, n in zip(begins, LENGTHS, strict=False)]),
    )
    states = states_of(heads, dtype, sum(LENGTHS))
    found = attend(*states, segments, band)
    torch.testing.assert_close(found.double(), in_float64(*states, segments, band), rtol=0, atol=LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_keys_of_several_spans_and_some_of_the_queries(heads: tuple[int, int, int], band: Band, dtype: Any) -> None:
    segments = Segments(
        np.array([(0, 1, 40, 0, 2), (1, 1, 0, 3, 1), (2, 30, 60, 0, 3)]),
        np.array([(10, 50), (200, 37), (100, 13), (3, 3)]),
    )
    states = states_of(heads, dtype, 250)
    found = attend(*states, segments, band)[:32]
    torch.testing.assert_close(found.double(), in_float64(*states, segments, band), rtol=0, atol=LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_products_far_apart(dtype: Any) -> None:
    """One key takes all: the exponentials of the others are too small for float32."""
    query, key, value = (100 * part for part in states_of((1, 1, 32), dtype, 64))
    segments = Segments(np.array([(0, 64, 0, 0, 1)]), np.array([(0, 64)]))
    found = attend(query, key, value, segments, Band(ANY, ANY))
    expected = in_float64(query, key, value, segments, Band(ANY, ANY))
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=100 * LIMITS[dtype])


@pytest.mark.parametrize(
    ("allows", "band"),
    [
        (lambda b, h, q, k: q >= 0, Band(ANY, ANY)),
        (lambda b, h, q, k: k <= q, Band(ANY, 0)),
        (lambda b, h, q, k: (q - k).abs() <= 8, Band(8, 8)),
        (lambda b, h, q, k: (k <= q) & (k > q - 4), Band(3, 0)),
        (lambda b, h, q, k: (k <= q) & (k // 8 == q // 8), None),
        (lambda b, h, q, k: (k <= q) | (k < 5), None),
    ],
    ids=["all", "earlier ones", "a window", "a window of earlier ones", "chunks", "a beginning all see"],
)
def test_which_rules_are_bands(allows: Any, band: Band | None) -> None:
    batch = PackedBatch(torch.ones(2, 40, dtype=torch.long))
    with attending_by(batch):
        assert buckets.Rule(allows).band() == band
    assert batch.looks_ahead == (band is not None and band.after > 0)


@needs_interface
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "xlm-roberta", "modernbert", "qwen3", "mistral", "gemma3"])
def test_real_models(family: str, dtype: str, tmp_path: Path) -> None:
    folder = models.build(family, tmp_path)
    engine = Engine(ModelSpec(folder, prepack=False, dtype=dtype), "cpu", None, 256).optimize()
    packing = packing_forward(engine.model.model)
    assert packing is not None
    if dtype == "float32":
        assert engine.recipe.attends_in_tiles
    else:  # random weights make much of what 16 bits round off: now and then a proof would not hold
        assert not attend_in_tiles(engine.model.model, dtype, None)
    limit = 2e-5 if dtype == "float32" else 0.15
    long = ("How many people live in Berlin? " * 12, "Berlin has 3.7 million inhabitants. " * 12)
    for pairs in (PAIRS, PAIRS[:1], [long, *PAIRS[:3]], [(long[0], document) for _, document in PAIRS]):
        scores = engine.predict(pairs)
        assert packing.used_tiles
        packing.in_tiles = False
        np.testing.assert_allclose(scores, engine.predict(pairs), rtol=limit, atol=limit)
        assert not packing.used_tiles
        packing.in_tiles = True


@needs_interface
def test_a_cap_on_products_is_left_to_torch(tmp_path: Path) -> None:
    engine = Engine(ModelSpec(models.build("gemma2", tmp_path), prepack=False), "cpu", None, 256).optimize()
    assert engine.recipe.unpadded
    assert not engine.recipe.attends_in_tiles


@needs_interface
def test_where_it_differs_padding_is_still_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(ModelSpec(models.build("bert", tmp_path), prepack=False), "cpu", None, 256)
    monkeypatch.setattr(buckets.tiles, "attend", lambda query, *rest: torch.zeros_like(query))
    engine.optimize()
    assert engine.recipe.unpadded
    assert not engine.recipe.attends_in_tiles
    reason = attend_in_tiles(engine.model.model, "float32", engine.canary)
    assert reason == "scores would differ"


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_what_is_no_number_is_seen_in_its_own_pair_alone(dtype: Any) -> None:
    query, key, value = states_of((2, 2, 32), dtype, 40)
    query[5] = torch.nan
    segments = Segments(np.array([(0, 20, 0, 0, 1), (20, 20, 0, 1, 1)]), np.array([(0, 20), (20, 20)]))
    found = attend(query, key, value, segments, Band(ANY, ANY))
    assert found[5].isnan().all()
    assert not found[[*range(5), *range(6, 40)]].isnan().any()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_what_is_found_goes_where_it_is_told_to(dtype: Any) -> None:
    query, key, value = states_of((2, 2, 32), dtype, 40)
    segments = Segments(np.array([(0, 20, 0, 0, 1), (20, 20, 0, 1, 1)]), np.array([(0, 20), (20, 20)]))
    memory = torch.full((40, 4, 32), torch.nan, dtype=dtype)[:, ::2]
    assert attend(query, key, value, segments, Band(ANY, ANY), into=memory) is memory
    assert torch.equal(memory, attend(query, key, value, segments, Band(ANY, ANY)))
    for wrong in (memory[1:], memory[:, :1], memory.double(), torch.empty(32, 2, 40, dtype=dtype).permute(2, 1, 0)):
        with pytest.raises(ValueError, match="into"):
            attend(query, key, value, segments, Band(ANY, ANY), into=wrong)


def test_a_pair_without_tokens_asks_for_nothing() -> None:
    """`chosen` names another pair's token in its place, or none there is: the kernel would write there."""
    packed = PackedBatch(torch.tensor([[0, 0], [1, 1]]))
    packed.choose("last")
    assert packed.segments_of_chosen.segments[:, 1].tolist() == [0, 1]
    assert packed.segments_of_pairs.segments[:, 1].tolist() == [0, 1]
    assert packed.empty == [0]
