"""Measures what the plan can only guess: how many workers, with how many threads, and how large batches.

The best setup so far is compared with one challenger at a time. Both are started and take turns on the same pairs, so
that whatever else the machine does slows both. A challenger takes over if it is faster by ``MARGIN``, and in all rounds
but one. So a tie keeps the default.

Setups are tried in ladders: fewer workers with more threads each, larger batches, and so on. Each ladder starts at the
best setup so far, and ends when a step is slower.

Scores do not depend on the setup. What would change them, such as another dtype, is measured only if it is asked for
(``variants``), and never takes over.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date

import numpy as np

from mp_rerank._checks import check_flag, check_seconds
from mp_rerank._pairs import Pair, estimate_pair, estimate_text
from mp_rerank._planning import tuning_cache as tuned
from mp_rerank._planning.machine import Machine, read_machine
from mp_rerank._planning.plan import default_batch_tokens, fitting_workers, make_plan
from mp_rerank._planning.tuning_cache import Tuned
from mp_rerank._text import one_line
from mp_rerank.config import ModelSpec, PoolConfig
from mp_rerank.errors import RequestTimeoutError, RerankError
from mp_rerank.pool import RerankerPool
from mp_rerank.results import Scores

__all__ = ["DEFAULT_WORDS", "Report", "Setup", "Trial", "make_pairs", "random_documents", "tune"]

logger = logging.getLogger(__name__)

# A challenger that is faster by less than this ties.
MARGIN = 0.05
# A step that is slower by more than this ends its ladder.
WORSE = 0.03
# Rounds of a duel, and how long one takes at least. In a shorter one too much time goes to its end, when some workers
# have nothing left to do.
ROUNDS, MIN_ROUNDS = 5, 3
ROUND_SECONDS = 1.0
BATCHES_A_WORKER = 4
# A challenger with less than this part of the best's speed in its first round gets no second round.
HOPELESS = 0.7
# A challenger's round is given up when it takes so many times as long as the best's.
PATIENCE = 3.0
# Batches that would take a worker longer than this are not tried: they would hold up other requests.
BATCH_SECONDS = 1.0
# Requests in flight at a time.
AGENTS = 8

DEFAULT_WORDS = (20, 60, 120, 240)
QUERY_WORDS = 8
VOCABULARY = (
    "the of and to in is was for on that with as it by from at his are an be this which or had not have one their has "
    "city people water year number world state river house music history church school language war king family island "
    "company north south east west century government population university building system species small large early"
)


@dataclass(frozen=True)
class Setup:
    """A way to run a model: the three settings of ``PoolConfig``, and the model's own in ``spec``."""

    spec: ModelSpec
    workers: int
    threads: int
    batch_tokens: int

    def __str__(self) -> str:
        dtype = f", {self.spec.dtype}" if self.spec.dtype else ""
        return f"{self.workers} x {self.threads} threads, batches of {self.batch_tokens} tokens{dtype}"


@dataclass
class Trial:
    """The result of one setup.

    Attributes:
        setup: what was tried.
        pairs_per_second: the median of its rounds; 0 without a round.
        ratio: its speed as a multiple of the best setup's before it: the median over their rounds; 0 without a round.
        verdict: the result in words.
        score_difference: the largest difference of its scores from the best setup's.
    """

    setup: Setup
    pairs_per_second: float = 0.0
    ratio: float = 0.0
    verdict: str = ""
    score_difference: float = 0.0


@dataclass
class Report:
    """What ``tune`` found.

    Attributes:
        trials: in the order they were made; the first is the default setup.
        best: the fastest setup of the model as it was given.
        times_the_default: the best setup's speed as a multiple of the default's.
        seconds: how long ``tune`` took.
        variants: the trials of the variants; the ``ratio`` of each is to the best setup.
        kept: whether the answer was kept. It is not if there was time for the default only.
    """

    trials: list[Trial] = field(default_factory=list)
    best: Trial | None = None
    times_the_default: float = 1.0
    seconds: float = 0.0
    variants: list[Trial] = field(default_factory=list)
    kept: bool = False


def tune(
    spec: ModelSpec,
    pairs: Sequence[Pair],
    *,
    devices: str | Sequence[str] = "auto",
    seconds: float = 120.0,
    variants: Sequence[ModelSpec] = (),
    keep: bool = True,
    progress: Callable[[Trial], None] = lambda trial: None,
    machine: Machine | None = None,
) -> Report:
    """Find the fastest setup for ``spec`` on this machine, and keep it for later pools.

    Args:
        spec: the model.
        pairs: typical ``(query, document)`` pairs; they are scored again and again.
        devices: as in ``PoolConfig``.
        seconds: when to stop. Only the start and the first round of the default setup may take longer.
        variants: other forms of the same model, whose scores may differ. Each is measured with the best setup's workers
            and batches, and that setup is kept for it.
        keep: whether to keep the answers.
        progress: called with each trial when it is over.
        machine: the machine to choose setups for; ``None``: this one.

    Raises:
        ModelLoadError, WorkerCrashedError: the model cannot be loaded with the default setup.
        TypeError, ValueError: an argument is not as it should be.
    """
    if not pairs:
        raise ValueError("pairs: at least one is needed")
    check_seconds("seconds", seconds)
    check_flag("keep", keep)
    here = machine or read_machine()
    begun = time.monotonic()
    made = make_plan(PoolConfig(devices=devices, tuned=False), spec, here)
    used = list(dict.fromkeys(seat.device for seat in made.seats))
    default = Setup(spec, len(made.seats), made.seats[0].threads, default_batch_tokens(spec, used[0]))
    report = Report()
    with _Ring(used, pairs, begun + seconds) as ring:
        report.best = ring.enter(default)
        report.trials.append(report.best)
        progress(report.best)
        for ladder in _ladders(default, used, here, spec):
            for step in ladder(ring.best):
                trial = ring.challenge(step)
                report.trials.append(trial)
                progress(trial)
                if ring.best is step:
                    report.best = trial
                    report.times_the_default *= trial.ratio
                elif trial.ratio < 1 - WORSE:
                    break
        for variant in variants:
            trial = ring.challenge(replace(ring.best, spec=variant), change=False)
            report.variants.append(trial)
            progress(trial)
        report.best.pairs_per_second = ring.speed
    report.seconds = time.monotonic() - begun
    if keep and any(trial.ratio for trial in report.trials[1:]):
        report.kept = _keep(report, used, here)
    return report


def make_pairs(documents: Sequence[str]) -> list[Pair]:
    """A pair for each document; its query is made of the first words of another document."""
    texts = list(documents)
    random.Random(0).shuffle(texts)
    return [(" ".join(texts[i - 1].split()[:QUERY_WORDS]), text) for i, text in enumerate(texts)]


def random_documents(words: Sequence[int], count: int = 400) -> list[str]:
    """``count`` documents of common English words, whose lengths are spread around each of ``words`` in equal parts."""
    chance = random.Random(0)
    vocabulary = VOCABULARY.split()
    means = [words[i % len(words)] for i in range(count)]
    return [" ".join(chance.choices(vocabulary, k=max(1, round(chance.gauss(mean, mean / 4))))) for mean in means]


Ladder = Callable[[Setup], Iterator[Setup]]


def _ladders(default: Setup, devices: Sequence[str], machine: Machine, spec: ModelSpec) -> list[Ladder]:
    """What to vary. Each ladder is a function from the best setup so far to the setups to try next."""
    on_cpu = devices[0].startswith("cpu")

    def fewer_workers(best: Setup) -> Iterator[Setup]:
        workers = best.workers
        while workers > 1:
            workers //= 2
            yield replace(best, workers=workers, threads=max(1, machine.cores // workers))

    def both_threads_of_a_core(best: Setup) -> Iterator[Setup]:
        workers = machine.affinity if machine.quota is None else min(machine.affinity, int(machine.quota))
        if best.workers < workers <= fitting_workers(machine, spec, PoolConfig())[0]:
            yield replace(best, workers=workers, threads=1)

    def more_on_each_device(best: Setup) -> Iterator[Setup]:
        workers = 2 * len(devices)
        yield replace(best, workers=workers, threads=max(1, machine.cores // workers))

    def smaller_batches(best: Setup) -> Iterator[Setup]:
        tokens = best.batch_tokens
        while tokens > default.batch_tokens // 4:
            tokens //= 2
            yield replace(best, batch_tokens=tokens)

    def larger_batches(best: Setup) -> Iterator[Setup]:
        tokens = best.batch_tokens
        while default.batch_tokens <= tokens < 4 * default.batch_tokens:
            tokens *= 2
            yield replace(best, batch_tokens=tokens)

    sizes: list[Ladder] = [smaller_batches, larger_batches]
    return [fewer_workers, both_threads_of_a_core, *sizes] if on_cpu else [*sizes, more_on_each_device]


class _Ring:
    """The pool of the best setup so far, and duels with it."""

    def __init__(self, devices: Sequence[str], pairs: Sequence[Pair], deadline: float) -> None:
        self._devices = devices
        self._pairs = list(pairs)
        self._deadline = deadline
        self._pool: RerankerPool | None = None
        self._start_seconds = 0.0
        self._tokens = statistics.mean(estimate_pair(estimate_text(q), d, None) for q, d in self._pairs)

    def __enter__(self) -> _Ring:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.close(drain=False)

    def enter(self, setup: Setup) -> Trial:
        """Start the default setup and measure its speed, which says how long a round is."""
        self.best = setup
        self._pool = self._start(setup, None)
        warm_up = self._take(0.0, setup)
        self._score(self._pool, warm_up)
        self.speed = len(warm_up) / self._score(self._pool, warm_up)[0]
        return Trial(setup, self.speed, 1.0, "the default")

    def challenge(self, setup: Setup, *, change: bool = True) -> Trial:
        """Compare ``setup`` with the best. If it wins, and ``change`` is set, it is the best from then on."""
        trial = Trial(setup)
        tokens_a_worker = self.speed * self._tokens / self.best.workers
        if setup.batch_tokens > max(self.best.batch_tokens, tokens_a_worker * BATCH_SECONDS):
            trial.verdict = "not measured: a batch would take too long"
            return trial
        texts = self._take(ROUND_SECONDS * self.speed, setup)
        expected = len(texts) / self.speed
        if time.monotonic() + self._start_seconds + 2 * MIN_ROUNDS * expected > self._deadline:
            trial.verdict = "not measured: no time left"
            return trial
        pool = None
        try:
            pool = self._start(setup, self._deadline - time.monotonic())
            theirs, ours = self._duel(pool, texts, trial)
        except RequestTimeoutError:
            trial.verdict = f"more than {PATIENCE:g} times slower"
            trial.ratio = 1 / PATIENCE
        except RerankError as error:
            trial.verdict = f"it failed: {one_line(error)}"
        else:
            trial.pairs_per_second = len(texts) * statistics.median(1 / seconds for seconds in theirs)
            trial.ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            self.speed = len(texts) * statistics.median(1 / seconds for seconds in ours)
            rounds_won = sum(a > b for a, b in zip(ours, theirs, strict=True))
            if trial.ratio < 1 - WORSE:
                trial.verdict = "slower"
            elif trial.ratio <= 1 + MARGIN or rounds_won < max(MIN_ROUNDS, len(ours)) - 1:
                trial.verdict = "a tie"
            else:
                trial.verdict = "faster"
                if change:
                    self.best, self.speed = setup, trial.pairs_per_second
                    self._pool, pool = pool, self._pool
        finally:
            if pool is not None:
                pool.close(drain=False)
        return trial

    def _start(self, setup: Setup, seconds: float | None) -> RerankerPool:
        begun = time.monotonic()
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        pool = RerankerPool(
            setup.spec,
            devices=self._devices,
            workers=setup.workers,
            threads_per_worker=setup.threads,
            batch_tokens=setup.batch_tokens,
            start_method="forkserver" if forks else "spawn",
            start_timeout=seconds,
            max_restarts=0,
            coalesce=False,  # the same pairs come up again and again
            tuned=False,
        ).start()
        self._start_seconds = time.monotonic() - begun
        return pool

    def _take(self, pairs: float, setup: Setup) -> list[Pair]:
        """At least ``pairs`` pairs, and enough for all workers of both setups."""
        tokens = BATCHES_A_WORKER * max(side.workers * side.batch_tokens for side in (self.best, setup))
        count = round(max(pairs, tokens / self._tokens, AGENTS))
        return [self._pairs[i % len(self._pairs)] for i in range(count)]

    def _duel(self, pool: RerankerPool, texts: list[Pair], trial: Trial) -> tuple[list[float], list[float]]:
        """Seconds of the challenger's rounds and of the best's. They take turns, and who begins alternates."""
        assert self._pool is not None
        warm_up, own = self._score(self._pool, texts)
        limit = PATIENCE * warm_up
        _, scores = self._score(pool, texts, limit)
        trial.score_difference = float(np.abs(scores - own).max())
        theirs: list[float] = []
        ours: list[float] = []
        while len(ours) < ROUNDS and (not ours or time.monotonic() + sum(ours[-1:] + theirs[-1:]) < self._deadline):
            for challenger in (True, False) if len(ours) % 2 else (False, True):
                if challenger:
                    theirs.append(self._score(pool, texts, limit)[0])
                else:
                    ours.append(self._score(self._pool, texts)[0])
            if ours[0] / theirs[0] < HOPELESS:
                break
        return theirs, ours

    def _score(self, pool: RerankerPool, texts: list[Pair], timeout: float | None = None) -> tuple[float, Scores]:
        begun = time.perf_counter()
        futures = [pool.submit_pairs(texts[i::AGENTS], timeout=timeout) for i in range(AGENTS)]
        parts = [future.result() for future in futures]
        seconds = time.perf_counter() - begun
        scores = np.empty((len(texts), *parts[0].shape[1:]), dtype=np.float32)
        for i, part in enumerate(parts):
            scores[i::AGENTS] = part
        return seconds, scores


def _keep(report: Report, devices: Sequence[str], machine: Machine) -> bool:
    """Keep the answers. Returns whether they could be kept."""
    assert report.best is not None
    answers = [(report.best, report.times_the_default)]
    answers += [(trial, report.times_the_default * trial.ratio) for trial in report.variants if trial.pairs_per_second]
    for trial, times in answers:
        setup = trial.setup
        answer = Tuned(
            setup.workers,
            setup.threads,
            setup.batch_tokens,
            round(trial.pairs_per_second, 1),
            round(times, 3),
            date.today().isoformat(),
        )
        try:
            path = tuned.keep(answer, setup.spec, devices, machine)
        except OSError as error:
            logger.warning("what was tuned cannot be kept: %s [mp-rerank explain tuning-not-kept]", one_line(error))
            return False
        logger.info("%s: %s", path, dataclasses.asdict(answer))
    return True
