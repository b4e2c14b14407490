"""What any kind of worker can do, and the one place that makes one.

A new kind of worker is a class with the members of ``WorkerHandle`` and a line in ``make_handle``. Nothing else asks
which kind a worker is: the scheduling asks what it can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

from mp_rerank._recipe import Recipe
from mp_rerank._workers.child import Launch, Options, Pairs, Scored, WorkerFacts
from mp_rerank._workers.dask import Cluster, Place
from mp_rerank._workers.dask_handle import DaskHandle
from mp_rerank._workers.may_start import check_may_spawn, check_may_start_threads, check_may_use_cluster
from mp_rerank._workers.process import ProcessHandle
from mp_rerank._workers.thread import ThreadHandle
from mp_rerank.config import ModelSpec, PoolConfig

__all__ = ["Templates", "WorkerHandle", "check_may_start", "make_handle", "make_templates", "starting_workers"]


class WorkerHandle(Protocol):
    """One worker, of whichever kind: it begins to load its model as it is made, and making it takes no time.

    Attributes:
        loaded: the worker's first words: that it has loaded its model, or ``ModelLoadError``; ``LaunchError`` if no
            worker came of it.
        killable: whether ``kill`` ends it. One that cannot be killed is never called hung.
        pid: the process it is in, once there is one, if that is on this machine.
        left: whether it ended because whoever owns its machine took it away: nothing that it was scoring is to blame.
    """

    loaded: Future[None]
    killable: bool
    pid: int | None
    left: bool

    @property
    def alive(self) -> bool:
        """Whether there is still something to wait for in ``join``."""

    def describe(self, recipe: Recipe | None) -> Future[WorkerFacts]:
        """Once it has loaded the model: make it fast, by ``recipe`` or by proofs; its facts. Raises as ``score``."""

    def score(self, pairs: Pairs, options: Options = None) -> Future[Scored]:
        """Score ``pairs``, read by ``options``, after what it has.

        Raises:
            RuntimeError: it has ended, or been told to leave.
        """

    def resident_bytes(self) -> int | None:
        """Memory of its own process, shared pages included; ``None`` where it has none, or where nobody can say."""

    def kill(self) -> None:
        """End it now, whatever it is doing; without effect where it is not ``killable``, or once it has ended."""

    def retire(self) -> None:
        """Take no more work, finish the running slice, end. Returns at once."""

    def abandon(self) -> None:
        """It was killed and does not end: nothing of this process is to wait for it, not even as that exits."""

    def join(self, timeout: float) -> None:
        """Wait until it has ended, at most ``timeout`` seconds."""


class Templates(Protocol):
    """What the workers of one model are forked from: processes that have loaded it."""

    def popen(self, launch: Launch) -> Callable[[Any], Any]:
        """What forks the process of the worker ``launch``, given that process."""

    def pids(self) -> list[int]:
        """The processes that there are now."""

    def close(self) -> None:
        """End them, once their workers have ended. Returns at once."""

    @property
    def alive(self) -> bool:
        """Whether one has not ended yet."""

    def join(self, timeout: float) -> None:
        """Wait until all have ended, at most ``timeout`` seconds; nothing waits then for one that has not."""


def make_handle(
    config: PoolConfig,
    launch: Launch,
    on_exit: Callable[[int | None], None],
    templates: Templates | None = None,
    place: Place | None = None,
) -> WorkerHandle:
    """Start a worker of the kind that ``config`` asks for, or at ``place``.

    Args:
        config: ``isolation`` and ``start_method`` say which kind.
        launch: what to start.
        on_exit: called once, on some thread, with the exit code of a worker process that has ended.
        templates: those of the model, as ``make_templates`` made them.
        place: in a Dask cluster; ``None``: on this machine.

    Raises:
        RuntimeError: the system would start no other thread.
    """
    if place is not None:
        return DaskHandle(place, launch, on_exit)
    if config.isolation == "thread":
        # The process is the caller's: its thread settings change only where that is asked for.
        return ThreadHandle(replace(launch, threads=config.threads_per_worker))
    return ProcessHandle(launch, config.start_method, on_exit, templates)


def make_templates(config: PoolConfig) -> Templates | None:
    """What the workers of one model are forked from, if ``config`` asks for such: closed once they have ended."""
    if config.isolation == "thread" or config.start_method != "fork-model":
        return None
    from mp_rerank._workers import template  # not on every system

    return template.Templates()


@contextmanager
def starting_workers(config: PoolConfig, spec: ModelSpec) -> Iterator[Cluster | None]:
    """Workers are made within, and have all ended at its end: keeps what they have in common.

    That is the server that they are forked from; or a cluster, which is given.
    """
    with ExitStack() as common:
        if config.isolation == "process" and config.start_method == "forkserver":
            from mp_rerank._workers import forkserver  # not on every system

            forkserver.lease()
            common.callback(forkserver.release)
        cluster = None
        if config.cluster is not None:
            cluster = Cluster(config, cpu_only=spec.cpu_only)
            common.callback(cluster.close)
        yield cluster


def check_may_start(config: PoolConfig) -> None:
    """Raise ``RuntimeError``, saying why, where workers of the kind ``config`` asks for must not be started."""
    check_may_start_threads()
    if config.cluster is not None:
        check_may_use_cluster()
    if config.isolation == "process" and not (config.cluster is not None and config.workers is None):
        check_may_spawn()
