"""A batch as one row, as on a GPU; without one, attention within bounds is computed pair by pair."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp_rerank import ModelSpec

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
from mp_rerank._engine import varlen  # noqa: E402
from mp_rerank._engine.engine import Engine  # noqa: E402
from mp_rerank._engine.pipeline import Pipeline, take_varlen  # noqa: E402
from mp_rerank._engine.unpad import unpad, varlen_forward  # noqa: E402

pytestmark = pytest.mark.real

needs_interface = pytest.mark.skipif(
    not models.ATTENTION_IS_OPEN, reason="this transformers' encoders have attention of their own"
)
PAIRS = [
    (query, document) for query in models.TEXT[:3] for document in (*models.TEXT, "", "<pad> <pad>", "long " * 300)
]


def within_bounds(query: Any, key: Any, value: Any, row: varlen.VarlenBatch, window: Any, scaling: float | None) -> Any:
    """What an operator on a GPU computes, pair by pair."""
    found = torch.full_like(query, torch.nan)  # behind the last pair, nobody writes
    for start, stop in pairwise(row.bounds.tolist()):
        assert stop - start <= row.longest
        if start == stop:
            continue
        here = torch.arange(stop - start)
        distance = here - here[:, None]
        allowed = torch.ones_like(distance, dtype=torch.bool)
        if window.before >= 0:
            allowed &= distance >= -window.before
        if window.behind >= 0:
            allowed &= distance <= window.behind
        of_pair = (tensor[start:stop].transpose(0, 1) for tensor in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(*of_pair, attn_mask=allowed, scale=scaling)
        found[start:stop] = attended.transpose(0, 1)
    return found


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_within_bounds", within_bounds)


def with_rows(folder: str) -> tuple[Engine, str, str]:
    """An engine whose network takes such batches; which token of a pair its head reads, or why it takes none."""
    engine = Engine(ModelSpec(folder, unpad=False, prepack=False), "cpu", None, 256).optimize()
    why_not = unpad(engine.model.model, "float32", engine.canary, as_varlen=True)
    forward = varlen_forward(engine.model.model)
    if forward is None:
        return engine, "", why_not
    return engine, *take_varlen(engine._pipeline, forward, "float32", 512)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_scores_are_those_of_padded_batches(family: str, tmp_path: Path) -> None:
    folder = models.build(family, tmp_path)
    engine, reads, why_not = with_rows(folder)
    closed = () if models.ATTENTION_IS_OPEN else models.ENCODERS
    if family in ("deberta-v2", "gemma2", *closed):  # attention of its own, and with a softcap
        assert why_not
        assert not reads
    else:
        assert not why_not
        assert reads == ("last" if family in (*models.DECODERS, models.LOGIT_SCORE) else "first")
    np.testing.assert_allclose(engine.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), rtol=1e-5, atol=1e-5)


@needs_interface
def test_a_head_that_reads_all_tokens_is_given_padded_batches(tmp_path: Path) -> None:
    folder = models.build("modernbert", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"classifier_pooling": "cls"', '"classifier_pooling": "mean"'))
    engine, reads, why_not = with_rows(folder)
    assert not reads
    assert why_not == "its head reads more than one token"
    assert engine._pipeline.varlen is None
    np.testing.assert_allclose(engine.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), rtol=1e-5, atol=1e-5)


class Graph:
    """What computes a row of one size, kernel by kernel."""

    def __init__(self, network: varlen.VarlenNetwork, size: tuple[int, int, int]) -> None:
        self._network = network
        self._size = size

    def replay(self, numbers: Any) -> Any:
        return self._network._compute(numbers, *self._size)


def with_graphs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Let rows be filled up to the size of a graph, as where there is a GPU; the sizes that graphs are made for."""
    sizes: list[tuple[int, int, int]] = []

    def capture(network: varlen.VarlenNetwork, numbers: Any, size: tuple[int, int, int]) -> Graph:
        sizes.append(size)
        return Graph(network, size)

    monkeypatch.setattr(varlen.VarlenNetwork, "_capture", capture)
    monkeypatch.setattr(engine._pipeline.varlen, "_most_tokens", 4096)
    return sizes


@needs_interface
def test_what_fills_a_row_up_changes_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.build("roberta", tmp_path)
    engine, _, _ = with_rows(folder)
    sizes = with_graphs(engine, monkeypatch)
    expected = models.load(folder, "cpu").predict(PAIRS)
    for _ in range(2):
        np.testing.assert_allclose(engine.predict(PAIRS), expected, rtol=1e-5, atol=1e-5)
    assert sizes
    assert len(sizes) == len(set(sizes))  # each is made once
    for tokens, pairs, longest in sizes:
        assert (tokens % 32, pairs % 16, longest % 128) == (0, 0, 0)


def test_graphs_that_were_not_used_for_long_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "GRAPHS", 1)
    engine, _, _ = with_rows(models.build("llama", tmp_path))
    sizes = with_graphs(engine, monkeypatch)
    for pairs in (PAIRS[:1], PAIRS[:30], PAIRS[:1], PAIRS[:1]):
        engine._pipeline.score(engine._pipeline.tokenize(pairs), range(len(pairs)))
    assert [pairs for _, pairs, _ in sizes] == [16, 32, 16]


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 300, 511, 512, 513, 1000, 14_700, 16_384])
def test_a_row_is_filled_up_by_an_eighth_at_most(tokens: int) -> None:
    rounded = varlen.rounded_tokens(tokens)
    assert rounded >= tokens
    assert rounded == 256 or rounded - tokens < tokens / 8
    assert varlen.rounded_tokens(rounded) == rounded


def test_a_window_is_found_in_a_mask_and_anything_else_is_refused() -> None:
    from transformers.masking_utils import causal_mask_function

    def window(mask_function: Any, longest: int = 200) -> tuple[int, int]:
        row = varlen.VarlenBatch(*[torch.zeros(1)] * 4, longest=longest)
        with varlen.attending_by(row):
            found = varlen._find_window(mask_function=mask_function)
        return found.before, found.behind

    def everywhere(batch: Any, head: Any, asking: Any, keys: Any) -> Any:
        return (asking >= 0) & (keys >= 0)

    def near(batch: Any, head: Any, asking: Any, keys: Any) -> Any:
        return (asking - keys).abs() <= 16

    def every_other(batch: Any, head: Any, asking: Any, keys: Any) -> Any:
        return (asking - keys) % 2 == 0

    assert window(everywhere) == (-1, -1)
    assert window(causal_mask_function) == (-1, 0)
    assert window(near) == (16, 16)
    assert window(near, 16) == (-1, -1)
    with pytest.raises(ValueError, match="no window"):
        window(every_other)


def test_where_rows_fail_padded_batches_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.build("llama", tmp_path)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(varlen.VarlenNetwork, "__call__", fail)
    engine, reads, why_not = with_rows(folder)
    assert (reads, why_not) == ("", "no such kernel")
    assert isinstance(engine._pipeline, Pipeline)
    np.testing.assert_allclose(engine.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), rtol=1e-5, atol=1e-5)
