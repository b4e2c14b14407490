"""Workers share the pages of the checkpoint's file where they can, and never what one of them does to its weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mp_rerank import ModelSpec, RerankerPool

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
from mp_rerank._engine import weights as module  # noqa: E402
from mp_rerank._engine.engine import Engine  # noqa: E402

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what is mapped"),
]

MakePool = Callable[..., RerankerPool]

PAIRS = [(query, document) for query in models.TEXT[:3] for document in models.TEXT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = models.build("bert", tmp_path_factory.mktemp("bert"))
    before = (Path(path) / "model.safetensors").read_bytes()
    yield path
    assert (Path(path) / "model.safetensors").read_bytes() == before, "nobody writes into the file"


def engine(spec: ModelSpec) -> Engine:
    return Engine(spec, "cpu", None, 256).optimize()


def test_weights_are_the_file_s_pages_unless_they_are_to_be_private_and_score_the_same(folder: str) -> None:
    shared = engine(ModelSpec(folder, prepack=False))
    private = engine(ModelSpec(folder, prepack=False, weights="private"))
    parameters = sum(tensor.nbytes for tensor in shared.model.parameters())
    assert shared.mapped_bytes == parameters > 0
    assert private.mapped_bytes == 0
    assert shared.weights_bytes == private.weights_bytes
    np.testing.assert_allclose(shared.predict(PAIRS), private.predict(PAIRS), rtol=1e-6, atol=1e-6)


def test_prepacked_layers_are_a_worker_s_own_and_the_others_still_shared(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without oneDNN")
    monkeypatch.setattr("mp_rerank._engine.prepack._share_of_time", lambda *times: 0.0)
    packed = engine(ModelSpec(folder))
    linears = sum(part.weight.numel() * 4 for part in packed.model.modules() if type(part) is torch.nn.Linear)
    assert len(packed.recipe.prepacked) > 6
    assert packed.mapped_bytes == sum(tensor.nbytes for tensor in packed.model.parameters()) - linears
    private = engine(ModelSpec(folder, weights="private"))
    assert (len(private.recipe.prepacked), private.mapped_bytes) == (len(packed.recipe.prepacked), 0)


def test_what_the_file_does_not_hold_as_it_is_needed_is_a_copy(folder: str, tmp_path: Path) -> None:
    assert engine(ModelSpec(folder, dtype="bfloat16", prepack=False)).mapped_bytes == 0
    model = models.load(folder, "cpu")
    for file in Path(folder).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(model.model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    pickled = engine(ModelSpec(str(tmp_path), prepack=False))
    assert pickled.mapped_bytes == 0
    shared = engine(ModelSpec(folder, prepack=False))
    np.testing.assert_allclose(pickled.predict(PAIRS), shared.predict(PAIRS), rtol=1e-6, atol=1e-6)


def test_a_tied_weight_is_copied_once_and_stays_tied(folder: str) -> None:
    network = models.load(folder, "cpu").model
    layers = network.bert.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight
    module.make_private(network)
    assert module.mapped_bytes(network) == 0
    assert layers[1].output.dense.weight is layers[0].output.dense.weight


def test_where_the_system_does_not_say_everything_is_copied(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = models.load(folder, "cpu").model
    with monkeypatch.context() as patch:
        patch.setattr(module, "MAPS", tmp_path / "maps")
        assert module.mapped_bytes(network) == 0
        module.make_private(network)
    assert module.mapped_bytes(network) == 0


def test_a_worker_that_writes_into_a_weight_changes_no_other(folder: str, make_pool: MakePool) -> None:
    document = models.TEXT[1]
    spec = ModelSpec(folder, loader="models:load_writing", prepack=False)
    with make_pool(spec, devices="cpu", workers=2, coalesce=False) as pool:
        for worker, memory in zip(pool.workers(), pool.memory().workers, strict=True):
            assert 0.9 * worker.weights_bytes < worker.mapped_bytes == memory.mapped_bytes <= worker.weights_bytes
        before = pool.predict([("query", document)])[0]
        pool.predict([("query", "!write")])
        scores = pool.predict([("query", document)] * 200)  # both workers take their share
    assert np.ptp(scores) > 0.1
    assert np.isclose(scores, before, atol=1e-5).any()
