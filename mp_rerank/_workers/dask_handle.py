"""A pool's hold on a worker in a Dask cluster: a session, with one model, in the process of a Dask worker.

The other end is ``dask_seat.py``. Slices go over a connection of the session's own, or through the scheduler where
there is no way to the worker (``dask_relay.py``).
"""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Future
from typing import Any

from mp_rerank._recipe import Recipe
from mp_rerank._workers.child import Launch, Options, Pairs, Scored, WorkerFacts
from mp_rerank._workers.dask import GOODBYE_SECONDS, Member, Place, SeatLeftError
from mp_rerank._workers.launching import LaunchError
from mp_rerank._workers.logs import POOL_LOGGER, QueuedLogger
from mp_rerank.errors import ClusterError

__all__ = ["DaskHandle"]

logger = QueuedLogger(POOL_LOGGER)

# How often a session shows that it is alive.
BEAT_SECONDS = 1.0
# How long a worker whose model hangs has to end itself, before its nanny is asked to end it.
DIE_SECONDS = 2.0


class DaskHandle:
    """A worker in a Dask worker's process. See ``handle.WorkerHandle``.

    Args:
        place: where.
        launch: what to load.
        on_exit: called on the cluster's thread, once, when the session has ended without having been told to: with
            ``None``, for nobody here learns an exit code. Not where ``loaded`` says that there never was one.

    Attributes:
        left: whether the Dask worker was told to leave by its cluster: then no slice is to blame.
    """

    def __init__(self, place: Place, launch: Launch, on_exit: Callable[[int | None], None]) -> None:
        self.killable = place.killable
        self.loaded: Future[None] = Future()
        self.pid: int | None = None
        self.left = False
        self._place = place
        self._cluster = place.cluster
        self._launch = launch
        self._on_exit = on_exit
        self._numbers = 0
        self._calls: dict[int, Future[Any]] = {}
        self._outbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._member: Member | None = None
        self._heard = 0.0
        self._settled = False  # whether the model has been loaded and made fast: until then it may be silent
        self._retired = False
        self._over = threading.Event()
        self._cluster.loading[self] = place.name
        self._cluster.call_soon(self._begin)

    @property
    def alive(self) -> bool:
        return not self._over.is_set()

    def describe(self, recipe: Recipe | None) -> Future[WorkerFacts]:
        return self._call("describe", recipe)

    def score(self, pairs: Pairs, options: Options = None) -> Future[Scored]:
        return self._call("score", pairs, options)

    def resident_bytes(self) -> int | None:
        return None  # Dask's own limit of memory holds: the process is not the pool's

    def kill(self) -> None:
        if self.killable and self.alive:
            self._soon(self._kill)

    def retire(self) -> None:
        self._cluster.loading.pop(self, None)
        self._soon(self._retire)

    def abandon(self) -> None:
        self._over.set()

    def join(self, timeout: float) -> None:
        self._over.wait(timeout)

    def _call(self, name: str, *arguments: Any) -> Future[Any]:
        if self._over.is_set():
            raise RuntimeError("the worker has ended")
        self._numbers += 1
        future: Future[Any] = Future()
        message = {"call": self._numbers, "name": name, "arguments": pickle.dumps(arguments)}
        self._cluster.call_soon(self._put, future, message)
        return future

    def _soon(self, fn: Callable[[], object]) -> None:
        try:
            self._cluster.call_soon(fn)
        except RuntimeError:  # the pool has ended
            self._over.set()

    # On the cluster's thread.

    def _begin(self) -> None:
        self._task = self._cluster.keep(self._live())

    def _put(self, future: Future[Any], message: dict[str, Any]) -> None:
        if self._over.is_set() or self._retired:
            future.set_exception(BrokenExecutor("the worker has ended"))
            return
        self._calls[message["call"]] = future
        self._outbox.put_nowait(message)

    def _kill(self) -> None:
        if self._member is None:
            self._task.cancel()  # not there yet
        else:
            self._outbox.put_nowait({"die": True})
            self._cluster.keep(self._make_sure_it_dies(self._member))

    def _retire(self) -> None:
        if not self._retired:
            self._retired = True
            if self._member is None:
                self._task.cancel()
            self._outbox.put_nowait({"bye": True})
            self._cluster.call_later(GOODBYE_SECONDS, self._task.cancel)  # it may be able to hear nothing

    async def _make_sure_it_dies(self, member: Member) -> None:
        """Have a worker ended by its nanny whose own event loop hangs too."""
        await asyncio.wait([self._task], timeout=DIE_SECONDS)
        if not self._over.is_set():
            await self._cluster.end_process(member)

    async def _live(self) -> None:
        comm = None
        try:
            with self._cluster.awaited():
                comm = await self._open()
            writing = asyncio.ensure_future(self._write(comm))
            beating = asyncio.ensure_future(self._beat(comm))
            try:
                await self._read(comm)
            finally:
                beating.cancel()
                writing.cancel()
        except SeatLeftError as error:
            self.left = True
            self.loaded.set_exception(error)
        except ClusterError as error:
            self.loaded.set_exception(LaunchError(str(error), hopeless=True))
        except (OSError, RuntimeError, asyncio.CancelledError) as error:
            logger.debug("the session with %s has ended: %r", self._place, error)
        finally:
            if comm is not None:
                comm.abort()
            self._end()

    def _end(self) -> None:
        self._over.set()
        self._cluster.loading.pop(self, None)
        calls, self._calls = self._calls, {}
        for future in calls.values():
            future.set_exception(BrokenExecutor("the worker has ended"))
        if self._retired:
            return
        if self._member is not None:
            self._cluster.forget(self._member)
        if self._member is not None or not self.loaded.done():
            self._on_exit(None)

    async def _open(self) -> Any:
        """The session's connection: with the worker that the place has now, or is given within the time."""
        cluster = self._cluster
        deadline = cluster.time() + cluster.timeout
        while True:
            member = cluster.find(str(self._place))
            if member is not None:
                try:
                    comm = await cluster.open(member, self._launch)
                except (OSError, asyncio.TimeoutError) as error:
                    logger.debug("worker %s cannot be reached: %s", member.address, error)
                    cluster.forget(member)
                else:
                    self._member, self.pid = member, member.pid
                    self._heard = cluster.time()
                    self._calls[0] = self.loaded
                    return comm
            if cluster.lost is not None or cluster.time() > deadline:
                raise SeatLeftError(f"{self._place} has left the cluster, or cannot be reached")
            await asyncio.sleep(BEAT_SECONDS / 20)

    async def _write(self, comm: Any) -> None:
        try:
            while True:
                message = await self._outbox.get()
                await comm.write(message)
                if "bye" in message:
                    await comm.close()
        except OSError:
            comm.abort()

    async def _beat(self, comm: Any) -> None:
        """Ask for a sign of life, and end a session that has given none for too long."""
        number = 0
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            silent = self._cluster.time() - self._heard
            if self._settled and silent > self._cluster.timeout:
                logger.warning(
                    "%s has been silent for %.0f s: given up [mp-rerank explain host-silent]", self._place, silent
                )
                comm.abort()
                return
            number += 1
            self._outbox.put_nowait({"beat": number})

    async def _read(self, comm: Any) -> None:
        while True:
            message = await comm.read()
            self._heard = self._cluster.time()
            if "call" in message:
                self._resolve(message)
            elif "left" in message:
                self.left = True
                return

    def _resolve(self, message: Mapping[str, Any]) -> None:
        future = self._calls.pop(message["call"], None)
        if future is None:
            return
        outcome = pickle.loads(message["outcome"])
        if isinstance(outcome, WorkerFacts):
            self._settled = True
            self._cluster.loading.pop(self, None)
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
