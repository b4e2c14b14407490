"""What runs in a worker of a Dask cluster: the seats that pools have in it.

A pool's ``DaskHandle`` (``dask_handle.py``) adds `SeatPlugin` to the worker, and that adds an operation to the
worker's own server. A connection that asks for it becomes a *session*, and stays open for as long as the pool has this
seat. What is said in it are small dicts:

A pool that reaches the scheduler only has them said by that: see ``dask_relay.py``.

    pool    -> worker   launch                              the model to load, in the first message
                        call, name, arguments               of ``LoadedModel``: describe, score; arguments pickled
                        beat                                are you there?
                        die                                 end this process: its model hangs
                        bye                                 the seat is not needed any more
    worker  -> pool     call, outcome                       pickled: a value, or one of this package's errors
                        beat                                yes
                        left                                this worker is being retired: it finished what it had begun

A session's model ends with it. All sessions of a worker compute on one thread, so one slice at a time: loading and
scoring at once in two threads is the race that this package is about. The worker's event loop only passes messages.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import pickle
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import distributed
from distributed.comm import Comm, CommClosedError
from distributed.core import Status
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.threadpoolexecutor import ThreadPoolExecutor

import mp_rerank
from mp_rerank._planning.machine import read_machine
from mp_rerank._workers.child import Launch, LoadedModel, set_threads
from mp_rerank._workers.dask_relay import RELAY, WorkerEnd
from mp_rerank.errors import RerankError

__all__ = ["DIE_EXIT_CODE", "HELLO", "PLUGIN_NAME", "SESSION", "SeatPlugin", "this_machine", "versions"]

logger = logging.getLogger(__name__)

PLUGIN_NAME = "mp_rerank"
HELLO = "mp_rerank_hello"
SESSION = "mp_rerank_session"
# Of a worker that was told to die.
DIE_EXIT_CODE = 76


def versions() -> dict[str, str]:
    """What must be the same at both ends of a session."""
    return {"mp_rerank": mp_rerank.__version__, "distributed": distributed.__version__}


def this_machine() -> str:
    """Names this machine, and within it what process ids mean."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return platform.node()


class SeatPlugin(WorkerPlugin):
    """Lets a Dask worker be a seat. Added by each pool, and again for each session; the first one counts."""

    name = PLUGIN_NAME

    def setup(self, worker: Any) -> None:
        """Add the operations to the worker's server."""
        if SESSION not in worker.handlers:
            seat = WorkerSeat()
            worker.handlers[HELLO] = seat.hello
            worker.handlers[SESSION] = seat.session
            worker.handlers[RELAY] = seat.relay
            worker._mp_rerank_seat = seat

    async def teardown(self, worker: Any) -> None:
        """As the worker closes: finish what is being scored. Not where another pool adds its own plugin."""
        if worker.status is Status.closing:
            await worker._mp_rerank_seat.leave()


class WorkerSeat:
    """One Dask worker: its sessions, and the thread that computes for all of them."""

    def __init__(self) -> None:
        # Of daemon threads: a model that hangs does not keep the worker from ending.
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="mp_rerank-seat")
        self.turn = asyncio.Lock()
        self.sessions: set[Session] = set()
        self._relayed: dict[str, WorkerEnd] = {}
        self._serving: set[asyncio.Task[Status]] = set()

    async def hello(self) -> dict[str, Any]:
        """What a pool must know before it takes a seat here."""
        loop = asyncio.get_running_loop()
        gpus = (await loop.run_in_executor(None, read_machine)).gpus  # may take seconds: nvidia-smi
        return {
            "versions": versions(),
            "device": gpus[0] if gpus else "cpu",
            "pid": os.getpid(),
            "machine": this_machine(),
        }

    async def relay(self, session: str, messages: Sequence[dict[str, Any]], wait: float) -> dict[str, Any]:
        """What a pool says to its session by way of the scheduler, and what the session has to say.

        Raises:
            ConnectionError: the session has ended.
        """
        if session not in self._relayed:
            if not messages or "launch" not in messages[0]:
                raise ConnectionError("the session has ended")
            end = self._relayed[session] = WorkerEnd()
            serving = asyncio.create_task(self.session(end, messages[0]["launch"]))
            self._serving.add(serving)
            serving.add_done_callback(self._serving.discard)
            serving.add_done_callback(lambda _: self._relayed.pop(session))
            messages = messages[1:]
        return await self._relayed[session].answer(messages, wait)

    async def session(self, comm: Comm | WorkerEnd, launch: bytes) -> Status:
        """One pool's session, until it ends."""
        session = Session(self, comm, launch)
        self.sessions.add(session)
        try:
            await session.serve()
        except CommClosedError:  # the pool's process has ended, or cannot be reached
            pass
        finally:
            self.sessions.discard(session)
            session.end()
            comm.abort()
        return Status.dont_reply

    async def leave(self) -> None:
        """End every session once it has sent the scores of the slice that is being scored."""
        await asyncio.gather(*(session.leave() for session in self.sessions))


class Session:
    """A pool's seat here: its model, and its calls in the order they came."""

    def __init__(self, seat: WorkerSeat, comm: Comm | WorkerEnd, launch: bytes) -> None:
        self._seat = seat
        self._comm = comm
        self._launch = launch
        self._model: LoadedModel | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()
        self._over = False  # nothing begins any more

    async def serve(self) -> None:
        """Read messages until the pool says goodbye."""
        self._call(0, self._load)
        while True:
            message = await self._comm.read()
            if "call" in message:
                self._call(message["call"], partial(self._run, message["name"], message["arguments"]))
            elif "beat" in message:
                await self._write({"beat": message["beat"]})
            elif "die" in message:
                logger.error("leaving, as the pool asks: the model hangs [mp-rerank explain worker-hung]")
                os._exit(DIE_EXIT_CODE)
            else:
                return

    async def leave(self) -> None:
        """Begin nothing more, finish what has begun, and say so."""
        self._over = True
        await asyncio.gather(*self._calls, return_exceptions=True)
        try:
            await self._write({"left": True})
            await self._comm.close()
        except OSError:  # the pool has gone
            pass

    def end(self) -> None:
        """Let go of the model, once the slice that is being scored is."""
        self._over = True
        try:
            self._seat.executor.submit(self._forget)
        except RuntimeError:  # the interpreter is leaving
            pass

    def _call(self, number: int, run: Callable[[], Any]) -> None:
        call = asyncio.create_task(self._answer(number, run))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _answer(self, number: int, run: Callable[[], Any]) -> None:
        # Nothing begins before the last outcome is on its way: of what ends this process, the pool would blame whatever
        # it has no answer to.
        async with self._seat.turn:
            if self._over:
                return  # the pool is told once all that had begun is done, and scores it elsewhere
            loop = asyncio.get_running_loop()
            outcome = await loop.run_in_executor(self._seat.executor, _outcome_of, run)
            try:
                await self._write({"call": number, "outcome": outcome})
            except OSError:  # the pool has gone, which the reader notices too
                pass

    async def _write(self, message: dict[str, Any]) -> None:
        async with self._writing:
            await self._comm.write(message)

    # On the seat's thread.

    def _load(self) -> None:
        launch: Launch = pickle.loads(self._launch)
        if "torch" not in sys.modules:
            set_threads(launch.threads or 1)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if launch.threads == 1 else "true")
        self._model = LoadedModel(launch, owns_process=True)
        self._model.load()
        self._model.loaded()

    def _run(self, name: str, arguments: bytes) -> Any:
        assert self._model is not None
        return getattr(self._model, name)(*pickle.loads(arguments))

    def _forget(self) -> None:
        self._model = None
        gc.collect()


def _outcome_of(run: Callable[[], Any]) -> bytes:
    """What ``run`` returns, or its error, pickled; the error is one of this package's, which a pool can unpickle."""
    outcome: Any
    try:
        outcome = run()
    except RerankError as error:
        outcome = error
    except BaseException as error:
        outcome = RerankError(f"{type(error).__name__}: {error}")
    return pickle.dumps(outcome)
