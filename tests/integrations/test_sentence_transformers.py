"""The pool in sentence-transformers' evaluators: the plain model's metrics.

Most pools here are of one thread: starting processes that import torch is what would take the time.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from frameworks import need

from mp_rerank import RerankerPool

evaluation = need("sentence_transformers.cross_encoder.evaluation")
models = need("models")
if not hasattr(evaluation, "CrossEncoderClassificationEvaluator"):
    pytest.skip("this sentence-transformers has the evaluators of before version 4", allow_module_level=True)

from sentence_transformers import CrossEncoder  # noqa: E402
from sentence_transformers.cross_encoder.evaluation import (  # noqa: E402
    CrossEncoderClassificationEvaluator,
    CrossEncoderCorrelationEvaluator,
    CrossEncoderRerankingEvaluator,
)

from mp_rerank.integrations.sentence_transformers import PoolCrossEncoder  # noqa: E402

MakePool = Callable[..., RerankerPool]
pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore"),  # what the library warns of in this process is its own affair
]

WORDS = " ".join(models.TEXT).split()


def sentences(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(3, 30))) for _ in range(count)]


def samples(kind: str) -> list[dict[str, Any]]:
    made = []
    for number, query in enumerate(sentences(12, 0)):
        documents = sentences(15, number + 1)
        made.append({"query": query, "positive": documents[3:6], kind: documents[: 3 if kind == "negative" else None]})
    return made


def evaluators() -> list[Any]:
    pairs = [list(pair) for pair in zip(sentences(40, 1), sentences(40, 2), strict=True)]
    chance = random.Random(3)
    return [
        CrossEncoderRerankingEvaluator(samples("documents"), name="documents"),
        CrossEncoderRerankingEvaluator(samples("documents"), name="found", always_rerank_positives=False, at_k=5),
        CrossEncoderRerankingEvaluator(samples("negative"), name="negative"),
        CrossEncoderClassificationEvaluator(pairs, [chance.randint(0, 1) for _ in pairs], name="binary"),
        CrossEncoderCorrelationEvaluator(pairs, [chance.random() for _ in pairs], name="correlation"),
    ]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(models.build("bert", tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def plain(path: str) -> CrossEncoder:
    return models.load(path, "cpu")


def test_evaluators_give_the_plain_models_metrics(make_pool: MakePool, path: str, plain: CrossEncoder) -> None:
    with make_pool(path, isolation="thread") as pool:
        pooled = PoolCrossEncoder(pool)
        for evaluator in evaluators():
            wanted = evaluator(plain)
            assert evaluator(pooled) == pytest.approx(wanted, abs=1e-5), evaluator.name
            assert pooled.model_card_data.eval_results_dict[evaluator]
            assert -1.0 < wanted[evaluator.primary_metric] < 1.0


def test_evaluators_run_at_the_same_time(make_pool: MakePool, path: str, plain: CrossEncoder) -> None:
    wanted = [evaluator(plain) for evaluator in evaluators()]
    with make_pool(path) as pool, ThreadPoolExecutor(10) as threads:
        given = threads.map(lambda evaluator: evaluator(PoolCrossEncoder(pool)), evaluators() * 4)
        for metrics, expected in zip(given, wanted * 4, strict=True):
            assert metrics == pytest.approx(expected, abs=1e-5)


def test_several_labels_are_classified_alike(make_pool: MakePool, tmp_path: Path) -> None:
    path = models.build("bert", tmp_path, num_labels=3)
    pairs = [list(pair) for pair in zip(sentences(40, 1), sentences(40, 2), strict=True)]
    evaluator = CrossEncoderClassificationEvaluator(pairs, [i % 3 for i in range(40)], name="three")
    with make_pool(path, isolation="thread") as pool:
        assert PoolCrossEncoder(pool).num_labels == 3
        assert evaluator(PoolCrossEncoder(pool)) == pytest.approx(evaluator(models.load(path, "cpu")), abs=1e-5)


def test_csv_files_are_written_alike(make_pool: MakePool, path: str, plain: CrossEncoder, tmp_path: Path) -> None:
    with make_pool(path, isolation="thread") as pool:
        for evaluator in evaluators():
            written = {}
            for model in (plain, PoolCrossEncoder(pool)):
                folder = tmp_path / evaluator.name / type(model).__name__
                evaluator(model, output_path=str(folder))
                [file] = folder.iterdir()
                header, row = (line.split(",") for line in file.read_text().splitlines())
                written[type(model).__name__] = (header, [pytest.approx(float(cell), abs=1e-5) for cell in row])
            header, row = written["CrossEncoder"]
            assert written["PoolCrossEncoder"][0] == header
            assert [float(str(cell).split(" ")[0]) for cell in row] == written["PoolCrossEncoder"][1]


def test_predict_and_rank_are_the_plain_models(make_pool: MakePool, path: str, plain: CrossEncoder) -> None:
    pairs = list(zip(sentences(10, 1), sentences(10, 2), strict=True))
    query, documents = pairs[0][0], sentences(10, 3)
    with make_pool(path, isolation="thread") as pool:
        pooled = PoolCrossEncoder(pool)
        assert pooled.max_length == plain.max_length == models.MAX_LENGTH
        assert pooled.predict(pairs, batch_size=3) == pytest.approx(plain.predict(pairs, batch_size=3), abs=1e-5)
        assert pooled.predict(pairs[0]) == pytest.approx(plain.predict(pairs[0]), abs=1e-5)
        tensors = pooled.predict(pairs, convert_to_tensor=True)
        assert tensors.tolist() == pytest.approx(plain.predict(pairs, convert_to_tensor=True).tolist(), abs=1e-5)
        for options in ({}, {"top_k": 3}, {"return_documents": True}):
            ours, theirs = pooled.rank(query, documents, **options), plain.rank(query, documents, **options)
            assert [r["corpus_id"] for r in ours] == [r["corpus_id"] for r in theirs]
            assert [r["score"] for r in ours] == pytest.approx([float(r["score"]) for r in theirs], abs=1e-5)
            assert [r.get("text") for r in ours] == [r.get("text") for r in theirs]


def test_it_takes_the_plain_models_keywords(make_pool: MakePool, path: str) -> None:
    with make_pool(path, isolation="thread") as pool:
        pooled = PoolCrossEncoder(pool)
        for name, call in (("predict", pooled.predict), ("rank", pooled.rank)):
            accepted = inspect.signature(getattr(CrossEncoder, name)).parameters
            first: tuple[Any, ...] = ([("query", "document")],) if name == "predict" else ("query", ["document"])
            options = {
                key: parameter.default
                for key, parameter in accepted.items()
                if parameter.default is not parameter.empty and key not in ("inputs", "sentences")
            }
            assert options
            assert len(call(*first, **options)) == 1


def test_it_takes_what_was_a_keyword_in_other_versions(make_pool: MakePool, path: str) -> None:
    with make_pool(path, isolation="thread") as pool:
        pooled = PoolCrossEncoder(pool)
        options = {"num_workers": 2, "chunk_size": 7, "activation_fct": None, "prompt": None}
        assert pooled.predict([("query", "document")], **options) == pooled.predict([("query", "document")])
        assert pooled.rank("query", ["document"], convert_to_tensor=True, apply_softmax=True, **options)
        with pytest.raises(TypeError, match="colour: no version of CrossEncoder has such an argument"):
            pooled.predict([("query", "document")], colour="red")


@pytest.mark.parametrize("name", ["activation_fct", "activation_fn", "device", "pool"])
def test_what_a_pool_cannot_do_per_call_is_an_error_that_names_it(make_pool: MakePool, path: str, name: str) -> None:
    pooled = PoolCrossEncoder(make_pool(path))
    with pytest.raises(ValueError, match=f"{name}: .* must be None, not str 'x'"):
        pooled.predict([("query", "document")], **{name: "x"})
    with pytest.raises(ValueError, match=f"{name}: .* must be None, not str 'x'"):
        pooled.rank("query", ["document"], **{name: "x"})
