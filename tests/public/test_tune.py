"""What is fastest is found, kept, and used by the pools it was measured for, and by no others."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAKE

from mp_rerank import ModelSpec, PoolConfig, RequestTimeoutError, RerankerPool, WorkerCrashedError, cli, tune
from mp_rerank._planning import tuning_cache as tuned
from mp_rerank._planning.machine import Machine, read_machine
from mp_rerank._planning.plan import Seat, make_plan
from mp_rerank._planning.tuning_cache import Tuned, keep, look_up
from mp_rerank.tune import Setup

MakePool = Callable[..., RerankerPool]

GIB = 2**30
ANSWER = Tuned(3, 2, 512, 100.0, 1.25, "2026-01-31")
HERE = Machine(logical=8, affinity=8, physical=4, quota=None, memory_available=64 * GIB, gpus=(), cpu_model="some CPU")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own; with it, what is tuned is used again."""
    monkeypatch.delenv(tuned.SWITCH)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *names, **options: tmp_path / "cache")
    return tmp_path / "cache"


# Keeping.


def test_an_answer_is_kept_for_what_it_was_measured_with_and_nothing_else(tmp_path: Path) -> None:
    spec = ModelSpec(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    keep(Tuned(1, 1, 1, 1.0, 1.0, ""), spec, ["cpu"], HERE)
    keep(ANSWER, spec, ["cpu"], HERE)
    assert look_up(spec, ["cpu"], HERE) == ANSWER
    assert look_up(spec, ["cpu"], dataclasses.replace(HERE, memory_available=GIB)) == ANSWER
    assert look_up(spec, ["cuda:0"], HERE) is None
    assert look_up(dataclasses.replace(spec, dtype="bfloat16"), ["cpu"], HERE) is None
    assert look_up(dataclasses.replace(spec, revision="v2"), ["cpu"], HERE) is None
    for change in ({"cpu_model": "another"}, {"affinity": 4}, {"quota": 2.0}, {"memory_total": 8 * GIB}):
        assert look_up(spec, ["cpu"], dataclasses.replace(HERE, **change)) is None  # type: ignore[arg-type]
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert look_up(spec, ["cpu"], HERE) is None


def test_another_torch_is_another_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(ANSWER, FAKE, ["cpu"], HERE)
    monkeypatch.setattr(tuned, "version", lambda package: "9.9")
    assert look_up(FAKE, ["cpu"], HERE) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"answer": {}}',
        json.dumps({"answer": {**dataclasses.asdict(ANSWER), "workers": 0}}),
        json.dumps({"answer": {**dataclasses.asdict(ANSWER), "threads": "two"}}),
        json.dumps({"answer": {**dataclasses.asdict(ANSWER), "batch_tokens": True}}),
        json.dumps({"answer": {**dataclasses.asdict(ANSWER), "times_the_default": None}}),
        json.dumps({"answer": {**dataclasses.asdict(ANSWER), "from_the_future": 1}}),
    ],
)
def test_a_file_that_is_no_answer_is_no_error(text: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    keep(ANSWER, FAKE, ["cpu"], HERE).write_text(text)
    assert look_up(FAKE, ["cpu"], HERE) is None
    assert "what was tuned cannot be read" in caplog.text


def test_a_file_that_cannot_be_read_is_no_error() -> None:
    path = keep(ANSWER, FAKE, ["cpu"], HERE)
    path.unlink()
    path.mkdir()
    assert look_up(FAKE, ["cpu"], HERE) is None


# Using.


def test_the_plan_goes_by_what_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    by_itself = make_plan(PoolConfig(), FAKE, HERE)
    keep(ANSWER, FAKE, ["cpu"], HERE)
    made = make_plan(PoolConfig(), FAKE, HERE)
    assert (made.seats, made.batch_tokens) == ((Seat("cpu", 2),) * 3, 512)
    assert "3 workers: tuned on 2026-01-31: 1.25 times the default's speed" in made.reasons
    assert make_plan(PoolConfig(tuned=False), FAKE, HERE) == by_itself
    assert make_plan(PoolConfig(isolation="thread"), FAKE, HERE).batch_tokens is None
    monkeypatch.setenv("MP_RERANK_TUNED", "0")
    assert make_plan(PoolConfig(), FAKE, HERE) == by_itself


@pytest.mark.parametrize(
    ("options", "seats", "batch_tokens"),
    [
        ({"workers": 4}, (Seat("cpu", 1),) * 4, None),  # 512 was found for workers of two threads
        ({"workers": 2}, (Seat("cpu", 2),) * 2, 512),
        ({"threads_per_worker": 1}, (Seat("cpu", 1),) * 4, None),
        ({"threads_per_worker": 2}, (Seat("cpu", 2),) * 4, 512),
        ({"batch_tokens": 99}, (Seat("cpu", 2),) * 3, 99),
    ],
)
def test_what_is_asked_for_comes_first(options: dict[str, Any], seats: tuple[Seat, ...], batch_tokens: int) -> None:
    keep(ANSWER, FAKE, ["cpu"], HERE)
    made = make_plan(PoolConfig(**options), FAKE, HERE)
    assert (made.seats, made.batch_tokens) == (seats, batch_tokens)


def test_nothing_is_used_that_memory_does_not_hold_now() -> None:
    keep(ANSWER, FAKE, ["cpu"], HERE)
    made = make_plan(PoolConfig(), FAKE, dataclasses.replace(HERE, memory_available=2 * GIB // 2))
    assert (len(made.seats), made.batch_tokens) == (1, None)
    assert any("not for the 3 tuned on 2026-01-31" in reason for reason in made.reasons)


def test_a_pool_has_the_workers_and_the_batches_that_were_tuned(make_pool: MakePool) -> None:
    documents = [f"{'word ' * 40}{i}" for i in range(30)]
    slices = []
    for answer in (None, dataclasses.replace(ANSWER, workers=1, threads=1, batch_tokens=60)):
        if answer is not None:
            keep(answer, FAKE, ["cpu"], read_machine())
        with make_pool(workers=None if answer else 1, threads_per_worker=None if answer else 1) as pool:
            assert len(pool.workers()) == 1
            pool.rerank("query", documents)
            slices.append(pool.stats().slices)
    assert slices[0] < 10
    assert slices[1] == 30


# Measuring: pools that start at once, of a speed that is given.


class Stub:
    """A pool of the speed ``speed(workers, threads, batch_tokens, dtype)``, in pairs a second. At 0 it cannot start."""

    alive = 0
    speed: Callable[..., float]

    def __init__(self, spec: ModelSpec, **options: Any) -> None:
        self.pairs_per_second = type(self).speed(
            options["workers"], options["threads_per_worker"], options["batch_tokens"], spec.dtype
        )
        assert options["tuned"] is False

    def start(self) -> Stub:
        if not self.pairs_per_second:
            raise WorkerCrashedError("no memory", device="cpu", exit_code=-9, attempts=1)
        type(self).alive += 1
        assert type(self).alive <= 2, "one challenger at a time"
        return self

    def close(self, *, drain: bool) -> None:
        type(self).alive -= 1


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tune.Report]:
    """Tunes pools of the speed given, on a machine of four cores."""

    def score(ring: Any, pool: Stub, texts: list[Any], timeout: float | None = None) -> tuple[float, Any]:
        seconds = len(texts) / pool.pairs_per_second
        if timeout is not None and seconds > timeout:
            raise RequestTimeoutError("late", timeout=timeout, scored=0, total=1)
        return seconds, np.full(len(texts), 0.001 * pool.pairs_per_second)

    monkeypatch.setattr(tune, "RerankerPool", Stub)
    monkeypatch.setattr(tune._Ring, "_score", score)

    def run(
        speed: Callable[..., float], machine: Machine = HERE, spec: ModelSpec = FAKE, **options: Any
    ) -> tune.Report:
        Stub.speed = staticmethod(speed)  # type: ignore[assignment]
        options.setdefault("devices", "cpu")
        report = tune.tune(spec, [("query", "document")], machine=machine, **options)
        assert Stub.alive == 0
        return report

    yield run
    Stub.alive = 0


def tried(report: tune.Report) -> list[tuple[int, int, int]]:
    return [(trial.setup.workers, trial.setup.threads, trial.setup.batch_tokens) for trial in report.trials]


def test_a_tie_keeps_the_default(find: Callable[..., tune.Report]) -> None:
    report = find(lambda workers, threads, batch_tokens, dtype: 10_000.0 + workers)
    assert report.best is report.trials[0]
    assert (report.best.setup, report.times_the_default) == (Setup(FAKE, 4, 1, 1024), 1.0)
    assert (4, 1, 4096) in tried(report)
    assert look_up(FAKE, ["cpu"], HERE) is not None


def test_the_fastest_is_found_and_kept(find: Callable[..., tune.Report]) -> None:
    def speed(workers: int, threads: int, batch_tokens: int, dtype: str | None) -> float:
        return 1000.0 * (1.5 if workers == 2 else 1.0) * (1.2 if batch_tokens == 2048 else 1.0)

    told: list[tune.Trial] = []
    report = find(speed, progress=told.append)
    assert report.best is not None
    assert report.best.setup == Setup(FAKE, 2, 2, 2048)
    assert report.times_the_default == pytest.approx(1.8)
    assert report.kept
    assert told == report.trials
    # A ladder ends where it gets slower, and the next begins at the best.
    assert tried(report) == [
        (4, 1, 1024), (2, 2, 1024), (1, 4, 1024), (8, 1, 1024), (2, 2, 512), (2, 2, 256), (2, 2, 2048), (2, 2, 4096),
    ]  # fmt: skip
    answer = look_up(FAKE, ["cpu"], HERE)
    assert answer is not None
    assert (answer.workers, answer.threads, answer.batch_tokens) == (2, 2, 2048)
    assert (answer.pairs_per_second, answer.times_the_default) == (1800.0, 1.8)
    assert make_plan(PoolConfig(), FAKE, HERE).batch_tokens == 2048


@pytest.mark.parametrize(("dtype", "batch_tokens"), [(None, 1024), ("float32", 1024), ("bfloat16", 2048)])
def test_batches_are_as_many_bytes_in_16_bits(
    dtype: str | None, batch_tokens: int, find: Callable[..., tune.Report]
) -> None:
    report = find(lambda *setup: 1000.0, spec=dataclasses.replace(FAKE, dtype=dtype))
    assert report.trials[0].setup.batch_tokens == batch_tokens


def test_no_more_workers_are_tried_than_memory_and_quota_allow(find: Callable[..., tune.Report]) -> None:
    for change in ({"memory_available": 4 * GIB}, {"quota": 4.0}):
        machine = dataclasses.replace(HERE, **change)  # type: ignore[arg-type]
        assert max(tried(find(lambda *setup: 1000.0, machine)))[0] == 4


def test_a_gpu_is_given_other_batches_and_a_second_worker(find: Callable[..., tune.Report]) -> None:
    machine = dataclasses.replace(HERE, gpus=("cuda:0",))
    report = find(
        lambda workers, threads, batch_tokens, dtype: 1e6 * (2.0 if batch_tokens > 16_384 else 1.0),
        machine,
        devices="cuda",
    )
    assert tried(report) == [
        (1, 4, 16_384), (1, 4, 8192), (1, 4, 4096), (1, 4, 32_768), (1, 4, 65_536), (2, 2, 32_768),
    ]  # fmt: skip
    answer = look_up(FAKE, ["cuda:0"], machine)
    assert answer is not None
    assert (answer.workers, answer.batch_tokens) == (1, 32_768)


def test_what_fails_or_is_hopeless_loses(find: Callable[..., tune.Report]) -> None:
    def speed(workers: int, threads: int, batch_tokens: int, dtype: str | None) -> float:
        return 0.0 if workers == 8 else 1000.0 if workers == 4 else 10.0

    report = find(speed)
    assert report.best is report.trials[0]
    verdicts = {trial.setup.workers: trial.verdict for trial in report.trials}
    assert verdicts[2] == "more than 3 times slower"
    assert verdicts[8] == "it failed: no memory"
    assert 1 not in verdicts


def test_batches_that_would_hold_up_others_are_not_tried(find: Callable[..., tune.Report]) -> None:
    report = find(lambda *setup: 4.0)  # pairs of about 7 tokens
    assert [trial.verdict for trial in report.trials if trial.setup.batch_tokens > 1024] == [
        "not measured: a batch would take too long"
    ]


def test_out_of_time_is_said_and_not_measured(find: Callable[..., tune.Report]) -> None:
    report = find(lambda *setup: 10_000.0, seconds=0.001)
    assert {trial.verdict for trial in report.trials[1:]} == {"not measured: no time left"}
    assert report.best is report.trials[0]
    assert not report.kept
    assert look_up(FAKE, ["cpu"], HERE) is None


def test_a_variant_is_measured_beside_the_best_and_kept_for_itself_alone(find: Callable[..., tune.Report]) -> None:
    variant = dataclasses.replace(FAKE, dtype="bfloat16")
    report = find(
        lambda workers, threads, batch_tokens, dtype: 2000.0 if dtype else 1000.0, variants=[variant], keep=True
    )
    assert report.best is report.trials[0]
    [trial] = report.variants
    assert (trial.ratio, trial.score_difference) == (2.0, 1.0)
    kept, kept_variant = look_up(FAKE, ["cpu"], HERE), look_up(variant, ["cpu"], HERE)
    assert kept is not None
    assert kept_variant is not None
    assert (kept.pairs_per_second, kept_variant.pairs_per_second) == (1000.0, 2000.0)


def test_nothing_is_kept_unless_it_is_to_be(
    find: Callable[..., tune.Report], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    find(lambda *setup: 1000.0, keep=False)
    assert not cache.exists()
    cache.write_text("in the way")
    report = find(lambda *setup: 1000.0)
    assert "what was tuned cannot be kept" in caplog.text
    assert not report.kept


def test_real_pools_are_measured_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROUND_SECONDS": 0.0, "BATCHES_A_WORKER": 1, "ROUNDS": 1, "PATIENCE": 1000.0}.items():
        monkeypatch.setattr(tune, name, value)
    one_core = dataclasses.replace(HERE, affinity=1, physical=1)
    report = tune.tune(FAKE, tune.make_pairs(["one", "two words", "three"]), devices="cpu", machine=one_core)
    assert {trial.verdict for trial in report.trials} <= {"the default", "a tie", "slower", "faster"}
    assert all(trial.score_difference == 0.0 for trial in report.trials)
    assert report.trials[1].pairs_per_second > 0
    with pytest.raises(ValueError, match="pairs: at least one"):
        tune.tune(FAKE, [])


def test_texts_have_the_lengths_asked_for() -> None:
    lengths = [len(document.split()) for document in tune.random_documents([10, 1000], 100)]
    assert max(lengths[0::2]) < 30 < 300 < min(lengths[1::2])
    pairs = tune.make_pairs(["a b c d e f g h i j", "k"])
    assert sorted(pairs) == [("a b c d e f g h", "k"), ("k", "a b c d e f g h i j")]


def test_the_command_prints_what_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "one"}\n"two"\n')
    given: dict[str, Any] = {}

    def fake(spec: ModelSpec, pairs: Any, **options: Any) -> tune.Report:
        given.update(options, spec=spec, pairs=pairs)
        best = tune.Trial(Setup(spec, 2, 2, 2048), 123.4, 1.5, "faster")
        options["progress"](best)
        return tune.Report([best], best, 1.5, 60.0, kept=options["keep"])

    monkeypatch.setattr(tune, "tune", fake)
    arguments = ["tune", "--corpus", str(tmp_path / "corpus.jsonl"), "--dtypes", "bfloat16", "--seconds", "9"]
    assert cli.main(arguments) == 0
    assert sorted(given["pairs"]) == [("one", "two"), ("two", "one")]
    assert given["variants"] == [ModelSpec(dtype="bfloat16")]
    assert (given["seconds"], given["keep"]) == (9.0, True)
    out, err = capsys.readouterr()
    assert "2 x 2 threads, batches of 2048 tokens: 1.50 times the default's speed; kept" in out
    assert "123.4 pairs/s" in err
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert "nothing is kept" in capsys.readouterr().out
    assert cli.main([*arguments, "--dry-run", "--json"]) == 0
    assert given["keep"] is False
    assert json.loads(capsys.readouterr().out)["best"]["setup"]["batch_tokens"] == 2048
