"""Workers of a Dask cluster as seats: which there are, and how each is reached.

    Cluster       one pool's hold on a cluster: a thread with an event loop, `mp_rerank-cluster`. It asks the scheduler
                  for its workers, meets each, and tells the dispatcher of the seats that there are
    Place         where a seat is: the nanny of a Dask worker, or the worker itself where it has none. A place outlives
                  its workers: a nanny starts another when one dies

What a pool has in a Dask worker, a session with one model, is in ``dask_handle.py``.

Dask is asked for membership. Slices go over its own connections straight to the worker, not as tasks: a task takes 9 to
11 ms through the scheduler, a message 0.5 ms, and the scheduler may die meanwhile. Nothing here decides what is scored
where; and nothing here is Dask's: ``distributed`` is imported on the cluster's thread, for those who ask for a cluster.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from mp_rerank._planning.plan import Seat
from mp_rerank._within import within
from mp_rerank._workers.child import Launch
from mp_rerank._workers.launching import LaunchError
from mp_rerank._workers.logs import POOL_LOGGER, QueuedLogger
from mp_rerank.config import PoolConfig
from mp_rerank.errors import ClusterError

__all__ = ["GOODBYE_SECONDS", "Cluster", "Member", "Place", "SeatLeftError"]

logger = QueuedLogger(POOL_LOGGER)

# How often the scheduler is asked for its workers; more rarely where they are many, for each takes 1.5 kB.
POLL_SECONDS = 1.0
WORKERS_A_POLL_SECOND = 100
# One try to connect. A cluster's own ``timeout`` is what all tries together may take.
CONNECT_SECONDS = 5.0
# How long a closing pool takes leave of its workers.
GOODBYE_SECONDS = 2.0
SEATED = ("running", "paused")

Ask = Callable[..., Awaitable[Any]]


class SeatLeftError(LaunchError):
    """The Dask worker has left the cluster, or cannot be reached: its seat is no more. Nobody is to blame."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hopeless=False)


@dataclass(frozen=True)
class Member:
    """A Dask worker that has been met.

    Attributes:
        address: of the worker; another one each time its nanny starts it.
        name: of its place: the nanny's address, or the worker's own.
        nanny: the nanny's address; empty without one.
        threads: Dask's ``nthreads``.
        device: what it has: its first GPU, or the CPU.
        pid: its process; ``None`` where that is on another machine.
        direct: whether it can be reached from here; else the scheduler hands on what is said.
    """

    address: str
    name: str
    nanny: str
    threads: int
    device: str
    pid: int | None
    direct: bool


@dataclass(frozen=True)
class Place:
    """Where a seat is, in a cluster."""

    cluster: Cluster
    name: str
    killable: bool

    def __str__(self) -> str:
        return self.name

    def __deepcopy__(self, memo: object) -> Place:
        """The place itself: plans are copied, and there is one cluster."""
        return self

    @property
    def loading(self) -> bool:
        """Whether a model of this pool's is being loaded there: what is sent there now is scored after that."""
        return self.name in tuple(self.cluster.loading.values())


class Cluster:
    """One pool's hold on a Dask cluster.

    Args:
        config: ``cluster``, ``cluster_timeout``, and what seats there are to have.
        cpu_only: whether the model computes on a CPU only.

    Attributes:
        timeout: seconds that the scheduler, or a worker, may be silent or away.
        lost: the error, while the scheduler cannot be reached and that has been so for longer.
        loading: handles whose models are being loaded and proved, and the names of their places.
    """

    def __init__(self, config: PoolConfig, *, cpu_only: bool) -> None:
        assert config.cluster is not None
        self.timeout = config.cluster_timeout
        self.lost: ClusterError | None = None
        self.loading: dict[object, str] = {}  # each change is one step, on this thread or the dispatcher's
        self._address = config.cluster.address
        self._security = config.cluster.security
        self._devices = ("cpu",) if cpu_only else tuple(config.devices)
        self._threads = config.threads_per_worker
        self._alone = config.workers is None  # no seats on this machine
        self._notify: Callable[[tuple[Seat, ...], ClusterError | None], None] | None = None
        self._first: Future[tuple[Seat, ...]] = Future()
        self._members: dict[str, Member] = {}  # by address
        self._meetings: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, ClusterError] = {}
        self._awaited = 0  # handles that wait for a worker
        self._wake = asyncio.Event()
        self._sessions: set[asyncio.Task[None]] = set()
        self._idle: list[Any] = []  # connections to the scheduler over which nothing is asked at the moment
        self._connection_args: dict[str, Any] = {}
        self._plugin = b""
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="mp_rerank-cluster", daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        return f"the Dask cluster at {self._address}"

    # What other threads call.

    def first_seats(self) -> tuple[Seat, ...]:
        """The seats, once there are any and each worker has been met; waits for the cluster's ``timeout`` at most.

        Where the pool has seats on this machine too, those of the cluster may come later.

        Raises:
            ClusterError: no scheduler, no workers, or one that cannot be a seat.
        """
        return self._first.result()

    def watch(self, notify: Callable[[tuple[Seat, ...], ClusterError | None], None]) -> None:
        """Have ``notify`` called on the cluster's thread, again and again: with the seats there are, and ``lost``."""
        self._notify = notify

    def call_soon(self, fn: Callable[..., object], *args: Any) -> None:
        """Call ``fn`` on the cluster's thread. Raises ``RuntimeError`` once that has ended."""
        self._loop.call_soon_threadsafe(fn, *args)

    def call_later(self, seconds: float, fn: Callable[[], object]) -> None:
        """On the cluster's thread: call ``fn`` there in so many seconds."""
        self._loop.call_later(seconds, fn)

    def time(self) -> float:
        """Now, on the clock of the cluster's event loop, in seconds."""
        return self._loop.time()

    def close(self) -> None:
        """Take leave of the workers, and end the thread; waits for it a moment."""
        try:
            self.call_soon(self._closing.set)
        except RuntimeError:  # it has ended
            pass
        self._thread.join(2 * GOODBYE_SECONDS)

    # The thread.

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        except BaseException as bug:
            logger.exception("the thread of %s failed [mp-rerank explain cluster-thread-failed]", self)
            self._lose(f"its thread failed: {bug!r}")
        finally:
            self._loop.close()
            if not self._first.done():
                self._first.set_exception(ClusterError(f"{self}: the pool was closed", address=self._address))

    async def _serve(self) -> None:
        from distributed.security import Security

        from mp_rerank._workers.dask_seat import SeatPlugin

        security = self._security if self._security is not None else Security()
        self._connection_args = security.get_connection_args("client")
        self._plugin = pickle.dumps(SeatPlugin())
        watching = self._loop.create_task(self._watch())
        await self._closing.wait()
        for task in (watching, *self._meetings.values()):
            task.cancel()
        if self._sessions:
            await asyncio.wait(self._sessions, timeout=GOODBYE_SECONDS)
        others = asyncio.all_tasks(self._loop) - {asyncio.current_task(self._loop)}
        left, until = others, self._loop.time() + GOODBYE_SECONDS
        while left and self._loop.time() < until:  # again: Dask's own code may swallow one, before Python 3.12
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=GOODBYE_SECONDS / 10)
        for task in others - left:
            if not task.cancelled():
                task.exception()  # nobody's any more, and asyncio would log it
        for comm in self._idle:
            comm.abort()

    async def _watch(self) -> None:
        """Ask the scheduler for its workers, again and again."""
        comm = None
        try:
            began = heard = self._loop.time()
            while True:
                try:
                    if comm is None:
                        comm = await self.connect(self._address)
                    identity = await _ask(comm, self.timeout, op="identity")
                except (OSError, asyncio.TimeoutError, ValueError, RuntimeError, TypeError) as error:
                    if comm is not None:
                        comm.abort()
                        comm = None
                    passing = isinstance(error, OSError | asyncio.TimeoutError)
                    if not passing or self._loop.time() - heard > self.timeout:
                        self._lose(f"no scheduler answers: {type(error).__name__}: {error}")
                    pause = POLL_SECONDS / 5
                else:
                    heard = self._loop.time()
                    self.lost = None
                    self._see(identity["workers"])
                    self._tell_first(heard - began)
                    pause = POLL_SECONDS * max(1.0, len(identity["workers"]) / WORKERS_A_POLL_SECOND)
                    if self._awaited or not self._first.done():
                        pause = POLL_SECONDS / 10
                if self._notify is not None:
                    self._notify(self._seats(), self.lost)
                try:
                    await within(pause, self._wake.wait())
                except asyncio.TimeoutError:
                    pass
                self._wake.clear()
        finally:
            if comm is not None:
                comm.abort()

    def _lose(self, why: str) -> None:
        if self.lost is None:
            self.lost = ClusterError(f"{self} is lost: {why}", address=self._address)
            logger.error("%s [mp-rerank explain ClusterError]", self.lost)
            if not self._first.done():
                self._first.set_exception(self.lost)

    def _see(self, workers: Mapping[str, Mapping[str, Any]]) -> None:
        """Meet the workers that are new, forget those that have gone."""
        present = {address: info for address, info in workers.items() if info["status"] in SEATED}
        for known in (self._members, self._refused):
            for address in known.keys() - present.keys():
                del known[address]
        for address in present.keys() - self._members.keys() - self._refused.keys() - self._meetings.keys():
            meeting = self._meetings[address] = self._loop.create_task(self._meet(address, present[address]))
            meeting.add_done_callback(lambda _, address=address: self._meetings.pop(address))  # type: ignore[misc]

    def _tell_first(self, waited: float) -> None:
        """Give ``first_seats``, once there is something to say."""
        if self._first.done():
            return
        if self._refused:
            self._first.set_exception(next(iter(self._refused.values())))
        elif self._meetings and waited <= self.timeout:
            return
        elif self._members or not self._alone:
            self._first.set_result(self._seats())
        elif waited > self.timeout:
            words = f"{self} has had no worker that could be reached for {self.timeout:g} s"
            self._first.set_exception(ClusterError(words, address=self._address))

    def _seats(self) -> tuple[Seat, ...]:
        places = {member.name: member for member in self._members.values()}
        return tuple(
            Seat(
                device=self._device(member),
                threads=self._threads or member.threads,
                place=Place(self, member.name, bool(member.nanny)),
            )
            for member in places.values()
        )

    def _device(self, member: Member) -> str:
        asked = self._devices[0]
        if asked == "auto":
            return member.device
        return "cuda:0" if asked == "cuda" else asked

    # Workers.

    async def _meet(self, address: str, info: Mapping[str, Any]) -> None:
        """Find out whether a worker that the scheduler names can be a seat."""
        try:
            try:
                comm = await self.connect(address)
                try:
                    member = await self._introduce(partial(_ask, comm, self.timeout), address, info, direct=True)
                finally:
                    comm.abort()
            except (OSError, asyncio.TimeoutError):
                member = await self._introduce(partial(self.ask_through, address), address, info, direct=False)
                logger.info("worker %s of %s cannot be reached from here: through the scheduler", address, self)
        except (OSError, asyncio.TimeoutError) as error:  # it has ended; or it is not there yet
            logger.debug("worker %s of %s cannot be reached: %s", address, self, error)
            await asyncio.sleep(POLL_SECONDS)
        except Exception as error:
            refusal = error if isinstance(error, ClusterError) else self._refusal(address, repr(error))
            self._refused[address] = refusal
            logger.error("%s [mp-rerank explain ClusterError]", refusal)
        else:
            self._members[address] = member

    async def _introduce(self, ask: Ask, address: str, info: Mapping[str, Any], *, direct: bool) -> Member:
        from mp_rerank._workers import dask_seat

        await self._add_plugin(ask, address)
        try:
            hello = await ask(op=dask_seat.HELLO)
        except RuntimeError as error:
            raise self._refusal(address, str(error)) from None
        ours = dask_seat.versions()
        for name, version in ours.items():
            if hello["versions"].get(name) != version:
                theirs = hello["versions"].get(name)
                raise self._refusal(address, f"it has {name} {theirs}, and this process {version}: install the same")
        nanny = info.get("nanny") or ""
        return Member(
            address=address,
            name=nanny or address,
            nanny=nanny,
            threads=info["nthreads"],
            device=hello["device"],
            pid=hello["pid"] if hello["machine"] == dask_seat.this_machine() else None,
            direct=direct,
        )

    async def _add_plugin(self, ask: Ask, address: str) -> None:
        """Let a worker be a seat. Raises ``ClusterError``, saying why it cannot be."""
        from mp_rerank._workers.dask_seat import PLUGIN_NAME

        try:
            answer = await ask(op="plugin-add", plugin=self._plugin, name=PLUGIN_NAME)
        except RuntimeError as error:
            why = str(error)
            if "No module named" in why:
                why += ": install the same version of mp_rerank, with its extra dask, for every worker"
            raise self._refusal(address, why) from None
        if answer.get("status") != "OK":
            raise self._refusal(address, str(answer.get("exception_text", answer)))

    async def ask_through(self, address: str, **message: Any) -> Any:
        """Have the scheduler ask a worker; its answer. Raises as ``_ask``; ``OSError`` where that cannot reach it."""
        while self._idle and self._idle[-1].closed():
            self._idle.pop()
        comm = self._idle.pop() if self._idle else await self.connect(self._address)
        try:
            answer = await _ask(comm, self.timeout, op="proxy", worker=address, msg=message)
        except BaseException as error:
            comm.abort()
            # Dask has one way to say that something was raised, at the worker or on the way to it.
            unreached = ("CommClosedError", "OSError", "Timed out", "ConnectionError")
            if isinstance(error, RuntimeError) and any(word in str(error) for word in unreached):
                raise OSError(str(error)) from None
            raise
        self._idle.append(comm)
        return answer

    async def open(self, member: Member, launch: Launch) -> Any:
        """A session's connection. Raises ``OSError``, ``ClusterError``."""
        from mp_rerank._workers.dask_relay import PoolEnd
        from mp_rerank._workers.dask_seat import SESSION

        if not member.direct:
            ask = partial(self.ask_through, member.address)
            await self._add_plugin(ask, member.address)
            end = PoolEnd(ask, uuid.uuid4().hex)
            await end.write({"launch": pickle.dumps(launch)})
            return end
        comm = await self.connect(member.address)
        try:
            await self._add_plugin(partial(_ask, comm, self.timeout), member.address)
            await comm.write({"op": SESSION, "launch": pickle.dumps(launch)})
        except BaseException:
            comm.abort()
            raise
        return comm

    async def end_process(self, member: Member) -> None:
        """Have a worker ended by its nanny, which starts another."""
        try:
            comm = await self.connect(member.nanny if member.direct else self._address)
            try:
                if member.direct:
                    await _ask(comm, self.timeout, op="restart", timeout=self.timeout)
                else:
                    await _ask(comm, self.timeout, op="restart_workers", workers=[member.address], timeout=self.timeout)
            finally:
                comm.abort()
        except (OSError, asyncio.TimeoutError, RuntimeError) as error:
            logger.warning(
                "the nanny %s could not end its worker: %s [mp-rerank explain nanny-failed]", member.nanny, error
            )

    def _refusal(self, address: str, why: str) -> ClusterError:
        return ClusterError(f"worker {address} of {self} cannot be used: {why}", address=address)

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """A worker is waited for: ask the scheduler more often."""
        self._awaited += 1
        self._wake.set()
        try:
            yield
        finally:
            self._awaited -= 1

    def find(self, name: str) -> Member | None:
        """The worker that a place has now."""
        return next((member for member in self._members.values() if member.name == name), None)

    def forget(self, member: Member) -> None:
        """It could not be reached: it must be met again before it is a seat."""
        self._members.pop(member.address, None)

    async def connect(self, address: str) -> Any:
        """A connection to a server of the cluster. Raises ``OSError``."""
        from distributed.comm import connect

        timeout = min(CONNECT_SECONDS, self.timeout)
        # Not deserialized: what an error holds may need modules that are not here, or import torch.
        return await within(
            timeout + 1.0, connect(address, timeout=timeout, deserialize=False, **self._connection_args)
        )

    def keep(self, session: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a handle's session; the cluster's end waits for it."""
        task = self._loop.create_task(session)
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)
        return task


async def _ask(comm: Any, seconds: float, **message: Any) -> Any:
    """Send ``message`` and wait for the answer, so many seconds.

    Raises:
        OSError: the connection is lost.
        RuntimeError: the other end raised an error.
    """
    await comm.write({"reply": True, **message})
    try:
        answer = await within(seconds, comm.read())
    except asyncio.TimeoutError:
        raise OSError(f"no answer to {message['op']} within {seconds:g} s") from None
    if isinstance(answer, dict) and answer.get("status") == "uncaught-error":
        raise RuntimeError(answer.get("exception_text", "an unknown error"))
    if answer is None:
        raise RuntimeError(f"it knows no operation {message['op']}")
    return answer
