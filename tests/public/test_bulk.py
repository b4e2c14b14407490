"""Whole runs from files to a file: formats, memory, and going on after the end that came too early."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import psutil
import pytest
from conftest import PATIENCE, Fifo
from fakes import score_of
from frameworks import need

from mp_rerank import ModelSpec, RerankerPool, RerankResult, ScoringError, WorkerCrashedError, WorkerInfo, bulk
from mp_rerank.bulk import evaluate, model_tag, rerank_run

MakePool = Callable[..., RerankerPool]
ROOT = Path(__file__).parents[2]

DOCUMENTS = {f"d{i}": f"text of document {i}" for i in range(12)}
QUERIES = {f"q{i}": f"query {i}" for i in range(5)}
# Not in the order of anything, and not all alike.
RUN = {query: [f"d{(7 * i + j) % 12}" for j in range(3 + i)] for i, query in reversed(list(enumerate(QUERIES)))}


class Files:
    """The files of a run in a folder."""

    def __init__(self, folder: Path, documents: dict[str, str] = DOCUMENTS, run: dict[str, list[str]] = RUN) -> None:
        self.queries = folder / "queries.tsv"
        self.corpus = folder / "corpus.jsonl"
        self.run = folder / "first.run"
        self.output = folder / "out.run"
        self.queries.write_text("".join(f"{key}\t{text}\n" for key, text in QUERIES.items()))
        self.corpus.write_text(
            "".join(json.dumps({"_id": key, "text": text}) + "\n" for key, text in documents.items())
        )
        self.run.write_text(
            "".join(
                f"{query} Q0 {key} {i + 1} {-i} bm25\n" for query, keys in run.items() for i, key in enumerate(keys)
            )
        )

    def paths(self) -> dict[str, Path]:
        return {"queries": self.queries, "corpus": self.corpus, "run": self.run, "output": self.output}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def pool(make_pool: MakePool) -> RerankerPool:
    return make_pool(isolation="thread")


def expected(top_n: int | None = None, documents: dict[str, str] = DOCUMENTS, run: dict[str, list[str]] = RUN) -> str:
    lines = []
    for query, keys in run.items():
        scored = sorted(((score_of(QUERIES[query], documents[key]), key) for key in keys), reverse=True)
        for rank, (score, key) in enumerate(scored[:top_n], 1):
            lines.append(f"{query} Q0 {key} {rank} {score:.9g} mp_rerank\n")
    return "".join(lines)


PAIRS = sum(map(len, RUN.values()))


def test_each_querys_candidates_are_reranked_in_the_runs_order(pool: RerankerPool, files: Files) -> None:
    done = rerank_run(pool, **files.paths())
    assert files.output.read_text() == expected()
    assert (done.queries, done.pairs, done.found_queries) == (5, PAIRS, 0)
    assert str(done).startswith(f"5 queries, {PAIRS} pairs in ")


def test_the_log_tells_how_far_it_is(
    pool: RerankerPool, files: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bulk, "TELL_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "mp_rerank.bulk")
    rerank_run(pool, **files.paths())
    said = [record.getMessage() for record in caplog.records if record.name == "mp_rerank.bulk"]
    assert len(said) == len(RUN)
    assert said[-1].startswith(f"{files.output}: {PAIRS} of {PAIRS} pairs, ")
    files.output.write_text("".join(expected().splitlines(keepends=True)[: len(RUN["q4"])]))
    caplog.clear()
    rerank_run(pool, **files.paths())
    assert f"{files.output}: 1 of {len(RUN)} queries are there already" in caplog.messages


def test_scores_keep_every_bit_they_have(pool: RerankerPool, files: Files) -> None:
    rerank_run(pool, **files.paths())
    for line in files.output.read_text().splitlines():
        query, _, key, _, score, _ = line.split()
        assert np.float32(score) == np.float32(score_of(QUERIES[query], DOCUMENTS[key]))


def test_top_n_and_a_tag(pool: RerankerPool, files: Files) -> None:
    rerank_run(pool, **files.paths(), top_n=2, tag="mine")
    assert files.output.read_text() == expected(2).replace(" mp_rerank\n", " mine\n")


def test_work_cut_off_at_any_byte_is_gone_on_with(pool: RerankerPool, files: Files) -> None:
    whole = expected()
    ends = [len("".join(whole.splitlines(keepends=True)[: sum(map(len, list(RUN.values())[:i]))])) for i in range(6)]
    for cut in range(len(whole) + 1):
        files.output.write_text(whole[:cut])
        done = rerank_run(pool, **files.paths())
        assert files.output.read_text() == whole, cut
        assert done.found_queries == sum(end <= cut for end in ends[1:]), cut
        assert done.queries == 5 - done.found_queries


def test_with_top_n_it_is_gone_on_with_too(pool: RerankerPool, files: Files) -> None:
    whole = expected(2)
    for cut in range(0, len(whole), 7):
        files.output.write_text(whole[:cut])
        rerank_run(pool, **files.paths(), top_n=2)
        assert files.output.read_text() == whole


def test_it_starts_no_worker_when_there_is_nothing_left_to_do(pool: RerankerPool, files: Files) -> None:
    files.output.write_text(expected())
    assert rerank_run(pool, **files.paths()).pairs == 0
    assert pool.workers() == []


def test_overwriting_begins_again(pool: RerankerPool, files: Files) -> None:
    files.output.write_text("something else\n")
    assert rerank_run(pool, **files.paths(), overwrite=True).queries == 5
    assert files.output.read_text() == expected()


def test_after_a_kill_no_query_is_there_twice_or_missing(make_pool: MakePool, tmp_path: Path, fifo: Fifo) -> None:
    documents = {**DOCUMENTS, "gate": f"!once {tmp_path / 'met'} {fifo.order}"}
    run = {**RUN, "q0": ["d0", "gate", "d1"]}  # the last query
    files = Files(tmp_path, documents, run)
    script = f"""
from mp_rerank import ModelSpec, RerankerPool, bulk
bulk.PAIRS_IN_FLIGHT_CPU = 1  # the last is submitted when all but the one before it are written
pool = RerankerPool(ModelSpec("fake", loader="fakes:load"), devices="cpu", workers=1)
bulk.rerank_run(pool, **{ {name: str(path) for name, path in files.paths().items()}!r})
"""
    ended = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )
    fifo.wait_until_read()
    workers = psutil.Process(ended.pid).children(recursive=True)
    ended.send_signal(signal.SIGKILL)
    assert ended.wait(PATIENCE) == -signal.SIGKILL
    assert psutil.wait_procs(workers, timeout=PATIENCE)[1] == []
    fifo.release()
    whole, there = expected(documents=documents, run=run), files.output.read_text()
    assert whole.startswith(there)
    assert {"q4", "q3", "q2"} <= {line.split()[0] for line in there.splitlines()}
    done = rerank_run(make_pool(isolation="thread"), **files.paths())
    assert files.output.read_text() == whole
    assert done.queries + done.found_queries == 5
    assert 3 <= done.found_queries < 5


def ranked(output: Path) -> dict[str, list[str]]:
    """The documents of each query, best first, once it is sure that their scores say the same."""
    found: dict[str, list[str]] = {}
    scores: dict[str, list[float]] = {}
    for line in output.read_text().splitlines():
        query, _, key, rank, score, _ = line.split()
        found.setdefault(query, []).append(key)
        scores.setdefault(query, []).append(float(score))
        assert int(rank) == len(found[query])
    for query, values in scores.items():
        assert values == sorted(values, reverse=True), query
        assert len(set(values)) == len(values), query
    return found


BAD = {"raises": "!raise too\x1b odd", "kills": "!os._exit 9", "nothing": "!nan"}


@pytest.mark.parametrize("top_n", [None, 3])
@pytest.mark.parametrize("bad", [("raises",), ("nothing",), ("raises", "nothing", "kills")])
def test_documents_that_cannot_be_scored_do_not_end_the_work(
    make_pool: MakePool,
    tmp_path: Path,
    bad: tuple[str, ...],
    top_n: int | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bulk, "PAIRS_IN_FLIGHT_CPU", 1)
    run = {**RUN, "q3": ["d0", *bad, "d1"], "q2": list(bad), "q0": ["d5", "d6", "d7", *bad]}
    files = Files(tmp_path, {**DOCUMENTS, **BAD}, run)
    options = {"workers": 1} if "kills" in bad else {"isolation": "thread"}
    spec = ModelSpec("fake", loader="fakes:load_with_nan")
    done = rerank_run(make_pool(spec, **options), **files.paths(), top_n=top_n)
    assert [(f.query, f.document) for f in done.failures] == [(q, d) for q in ("q3", "q2", "q0") for d in bad]
    assert done.pairs == sum(map(len, run.values())) - 3 * len(bad)
    assert str(done).endswith(f"; {3 * len(bad)} pairs of 3 queries could not be scored")
    causes = {f.document: f.cause for f in done.failures if f.query == "q3"}
    assert causes == {
        key: {"raises": "ValueError: too\\x1b odd", "kills": "it ended 3 workers", "nothing": "its score is nan"}[key]
        for key in bad
    }
    if "kills" in bad:
        assert [f.cause for f in done.failures if f.document == "kills"][1:] == [
            "not tried: it ended 3 workers with query q3"
        ] * 2
    assert {r.getMessage() for r in caplog.records if r.name == "mp_rerank.bulk"} == {
        f"query {f.query}, document {f.document}: not scored: {f.cause} [mp-rerank explain pair-not-scored]"
        for f in done.failures
    }
    good = {query: [key for key in keys if key in DOCUMENTS] for query, keys in run.items()}
    whole: dict[str, list[str]] = {query: [] for query in run}
    for line in expected(run=good).splitlines():
        whole[line.split()[0]].append(line.split()[2])
    for query in ("q3", "q2", "q0"):
        whole[query] += bad  # kept, and last
    assert ranked(files.output) == {query: keys[:top_n] for query, keys in whole.items()}
    if "kills" not in bad:
        text = files.output.read_text()
        files.output.write_text(text[: 2 * len(text) // 3])  # it is gone on with as ever
        assert rerank_run(make_pool(spec, isolation="thread"), **files.paths(), top_n=top_n).found_queries
        assert files.output.read_text() == text


def test_a_model_that_scores_nothing_ends_the_work(make_pool: MakePool, tmp_path: Path) -> None:
    files = Files(tmp_path, {key: f"!raise out of order {key}" for key in DOCUMENTS})
    with pytest.raises(ScoringError, match=r"no document .* 3 queries in a row, the last q2: .* order d"):
        rerank_run(make_pool(isolation="thread"), **files.paths())
    assert set(ranked(files.output)) == {"q4", "q3"}


def test_no_worker_left_ends_the_work(make_pool: MakePool, files: Files) -> None:
    pool = make_pool(ModelSpec("fake", loader="fakes:load_deadly"), workers=1, max_restarts=1)
    with pytest.raises(WorkerCrashedError, match="2 workers in a row ended"):
        rerank_run(pool, **files.paths())
    assert files.output.read_text() == ""


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no limit on the size of files")
def test_a_full_disk_is_named_and_the_work_gone_on_with(pool: RerankerPool, files: Files) -> None:
    import resource

    whole = expected()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*out\.run") as caught:
            rerank_run(pool, **files.paths())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(files.output)
    assert files.output.read_text() == whole[: len(whole) // 2]
    rerank_run(pool, **files.paths())
    assert files.output.read_text() == whole


def test_an_output_that_is_no_file_is_refused(pool: RerankerPool, files: Files) -> None:
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="/dev/full: it is not a regular file"):
            rerank_run(pool, **{**files.paths(), "output": Path("/dev/full")}, overwrite=overwrite)


class Slow:
    """A pool that scores a request only when its result is waited for."""

    def __init__(self) -> None:
        self.outstanding = 0
        self.most = 0

    def start(self) -> None:
        pass

    def workers(self) -> list[WorkerInfo]:
        return [WorkerInfo(slot=i, state="ready", generation=1, device="cpu", threads=1) for i in range(2)]

    def submit(self, query: str, documents: list[str], top_n: int | None) -> Any:
        self.outstanding += len(documents)
        self.most = max(self.most, self.outstanding)
        pool = self

        class Waiting(Future[Any]):
            def done(self) -> bool:
                return False

            def result(self, timeout: float | None = None) -> list[RerankResult]:
                pool.outstanding -= len(documents)
                return [RerankResult(i, 0.5, document) for i, document in enumerate(documents)]

        return Waiting()


def test_only_so_many_pairs_are_in_flight(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PAIRS_IN_FLIGHT_CPU", 8)  # for each of the two
    pool = Slow()
    done = rerank_run(pool, **files.paths())  # type: ignore[arg-type]
    assert max(map(len, RUN.values())) < pool.most <= 16
    assert pool.outstanding == 0
    assert done.pairs == PAIRS
    assert len(files.output.read_text().splitlines()) == PAIRS


def test_two_queries_are_in_flight_however_long_they_are(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PAIRS_IN_FLIGHT_CPU", 1)
    pool = Slow()
    assert rerank_run(pool, **files.paths()).pairs == PAIRS  # type: ignore[arg-type]
    assert pool.most == max(len(a) + len(b) for a, b in pairwise(RUN.values()))


def test_beir_and_tab_separated_files_say_the_same(pool: RerankerPool, files: Files, tmp_path: Path) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps({"_id": k, "text": t, "metadata": {}}) + "\n\n" for k, t in QUERIES.items()))
    corpus = tmp_path / "corpus.tsv"
    corpus.write_text("".join(f"{k}\t{t}\r\n" for k, t in DOCUMENTS.items()))
    rerank_run(pool, queries=queries, corpus=corpus, run=files.run, output=files.output)
    assert files.output.read_text() == expected()


def test_a_title_goes_before_the_text(pool: RerankerPool, files: Files) -> None:
    documents = {key: f"title {key} {text}" for key, text in DOCUMENTS.items()}
    files.corpus.write_text(
        "".join(json.dumps({"_id": k, "title": f"title {k}", "text": t}) + "\n" for k, t in DOCUMENTS.items())
    )
    rerank_run(pool, **files.paths())
    assert files.output.read_text() == expected(documents=documents)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run", None, r"first\.run: No such file"),
        ("queries", None, r"queries\.tsv: No such file"),
        ("corpus", None, r"corpus\.jsonl: No such file"),
        ("run", "", r"first\.run: there is nothing in it"),
        ("run", "q1 Q0 d1 1 0.5\n", r"first\.run, line 1: 6 columns are needed, not 5"),
        ("run", "q1 Q0 d1 1 1 t\nq1 Q0 d1 2 1 t\n", r"first\.run: query q1 has a document twice"),
        ("run", "q1 Q0 d1 1 1 t\nq2 Q0 d1 1 1 t\nq1 Q0 d2 2 1 t\n", "the lines of query q1 do not stand together"),
        ("run", "q1 Q0 d99 1 1 t\n", r"corpus\.jsonl: document d99 of .*first\.run is not in it"),
        ("run", "q99 Q0 d1 1 1 t\n", r"queries\.tsv: query q99 of .*first\.run is not in it"),
        ("queries", "q1 no tab\n", r"queries\.tsv, line 1: an id, a tab and a text are needed"),
        ("corpus", '{"_id": "d1", "text": "a"}\n{"_id": 2}\n', r"corpus\.jsonl, line 2: an object with '_id' and"),
        ("corpus", "{\n", r"corpus\.jsonl, line 1: not JSON: .* \(column 2\)"),
        ("corpus", b"\xff\n", r"corpus\.jsonl, line 1: not UTF-8"),
        ("output", "q4 Q0 d1 1 0.5\n", r"out\.run, line 1: not a line of a run"),
        ("output", "q1 Q0 d1 1 0.5 mp_rerank\n", r"out\.run, line 1: query 'q1' is not the run's next"),
        (
            "output",
            "q4 Q0 d1 1 0.5 mp_rerank\nq3 Q0 d1 1 0.5 mp_rerank\n",
            "line 2: query q4 has 1 lines, and 7 are due",
        ),
        ("output", "q4 Q0 d1 1 0.5 other\n", "line 1: it is tagged 'other', and this would be 'mp_rerank'"),
    ],
)
def test_mistakes_in_files_are_named_before_anything_is_scored(
    pool: RerankerPool, files: Files, name: str, text: str | bytes | None, words: str
) -> None:
    path: Path = getattr(files, name)
    if text is None:
        path.unlink()
    elif isinstance(text, bytes):
        path.write_bytes(text)
    else:
        path.write_text(text)
    with pytest.raises(ValueError, match=words):
        rerank_run(pool, **files.paths())
    assert pool.workers() == []
    assert (not files.output.exists()) or (name == "output" and files.output.read_text() == text)


def test_mistakes_in_the_call_are_named(pool: RerankerPool, files: Files) -> None:
    with pytest.raises(ValueError, match="top_n: at least 1"):
        rerank_run(pool, **files.paths(), top_n=0)
    with pytest.raises(ValueError, match="tag: one word"):
        rerank_run(pool, **files.paths(), tag="two words")
    with pytest.raises(TypeError, match="overwrite: True or False is needed, not 'false'"):
        rerank_run(pool, **files.paths(), overwrite="false")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="top_n: a whole number is needed, not '3'"):
        rerank_run(pool, **files.paths(), top_n="3")  # type: ignore[arg-type]


def test_a_models_tag_is_one_word() -> None:
    assert model_tag(ModelSpec("cross-encoder/ms-marco-MiniLM-L6-v2")) == "mp_rerank:ms-marco-MiniLM-L6-v2"
    assert model_tag(ModelSpec(dtype="bfloat16", max_length=128)) == "mp_rerank:builtin:bfloat16:128"
    assert model_tag(ModelSpec("/some where/my model/")) == "mp_rerank:my-model"


def test_two_folders_of_one_name_have_two_tags(tmp_path: Path) -> None:
    """So that neither's output is taken for the other's, and gone on with."""
    folders = [tmp_path / version / "model" for version in ("v1", "v2")]
    for folder in folders:
        folder.mkdir(parents=True)
    tags = {model_tag(ModelSpec(f"{folder}/")) for folder in folders}
    assert len(tags) == 2
    assert all(tag.startswith("mp_rerank:model:") for tag in tags)


QRELS = {
    "trec": "q0 0 d0 1\nq0 0 d2 0\nq1 0 d8 2\n",
    "beir": "query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td2\t0\nq1\td8\t2\n",
}


@pytest.mark.parametrize("form", QRELS)
def test_measures_of_both_runs(tmp_path: Path, form: str) -> None:
    need("ir_measures")
    qrels = tmp_path / "qrels"
    qrels.write_text(QRELS[form])
    good, bad = tmp_path / "good.run", tmp_path / "bad.run"
    good.write_text("q0 Q0 d0 1 3 t\nq0 Q0 d2 2 2 t\nq1 Q0 d8 1 9 t\n")
    bad.write_text("q0 Q0 d2 1 3 t\nq0 Q0 d0 2 2 t\nq1 Q0 d1 1 9 t\n")  # the judged one second, and not at all
    assert evaluate(qrels, [good, bad], ["nDCG@10", "RR@10", "R@100"]) == [
        pytest.approx({"nDCG@10": 1.0, "RR@10": 1.0, "R@100": 1.0}),
        pytest.approx({"nDCG@10": 0.63093 / 2, "RR@10": 0.25, "R@100": 0.5}, abs=1e-5),
    ]


def test_mistakes_about_measures(tmp_path: Path) -> None:
    need("ir_measures")
    qrels = tmp_path / "qrels"
    qrels.write_text("q0 d0\n")
    with pytest.raises(ValueError, match="measures: 'nDCGG@10' is not known"):
        evaluate(qrels, [], ["nDCGG@10"])
    with pytest.raises(ValueError, match="line 1: neither a TREC nor a BEIR judgement"):
        evaluate(qrels, [])


def test_without_ir_measures_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mp-rerank\[metrics\]'"):
        evaluate(tmp_path / "qrels", [])


def command(files: Files, *options: str) -> subprocess.CompletedProcess[str]:
    named = [f"--{name}={path}" for name, path in files.paths().items()]
    return subprocess.run(
        [*fakes.COMMAND, "run", *named, "--devices=cpu", "--workers=1", *options],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )


def test_the_command_names_mistakes_in_one_line(files: Files) -> None:
    for options, words in (
        (["--metrics", "nDCG@10"], "--metrics: they need --qrels"),
        (["--run", "missing.run"], "missing.run: No such file or directory"),
        (["--top-n", "0"], "top_n: at least 1 is needed"),
    ):
        done = command(files, *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("mp-rerank: error: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_command_reranks_goes_on_and_measures(files: Files, tmp_path: Path) -> None:
    need("ir_measures")
    first = command(files)
    assert (first.returncode, first.stdout) == (0, "")
    assert first.stderr.startswith(f"{files.output}: 5 queries, {PAIRS} pairs in ")
    whole = files.output.read_text()
    assert {line.split()[5] for line in whole.splitlines()} == {"mp_rerank:builtin"}
    files.output.write_text(whole[: len(whole) // 2])
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\n")
    again = command(files, "--qrels", str(qrels), "--metrics", "RR@10", "nDCG@5")
    assert again.returncode == 0
    assert "were there already" in again.stderr
    assert [line.split()[:4] for line in files.output.read_text().splitlines()] == [
        line.split()[:4] for line in whole.splitlines()
    ]
    header, before, after = (line.split() for line in again.stdout.splitlines())
    assert header == ["run", "RR@10", "nDCG@5"]
    assert before == [str(files.run), "1.0000", "1.0000"]
    assert after[0] == str(files.output)
