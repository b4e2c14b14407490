"""Dask clusters of separate processes, as people start them: `dask scheduler` and `dask worker`."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from processes import command_line

ROOT = Path(__file__).parent.parent
PATIENCE = 60.0
# In the environment of every process of a cluster.
CLUSTER_MARK = "MP_RERANK_TEST_CLUSTER"


def need_dask() -> None:
    """Skip where Dask is not installed, unless ``MP_RERANK_CLUSTER=required`` says that it must be."""
    if os.environ.get("MP_RERANK_CLUSTER") != "required":
        import pytest

        pytest.importorskip("distributed")


def workers_of(nanny: psutil.Process) -> list[psutil.Process]:
    """The workers that a nanny watches: one, or none while the next is being started."""
    return [child for child in nanny.children() if "spawn_main" in command_line(child)]


class Processes:
    """A scheduler and its workers, each a process; all of them end with ``close``.

    Args:
        folder: for their files and logs.
        inside: what is put before the scheduler's command line, such as ``["ip", "netns", "exec", "a"]``.
        host: where the scheduler listens.
        port: which one; 0: any.
        protocol: ``"tcp"`` or ``"tls"``.
        arguments: for the scheduler and the workers: TLS, say.
    """

    def __init__(
        self,
        folder: Path,
        *,
        inside: Sequence[str] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        protocol: str = "tcp",
        arguments: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.arguments = list(arguments)
        self.started: list[subprocess.Popen[bytes]] = []
        file = folder / "scheduler.json"
        where = ["--host", host, "--port", str(port), "--protocol", protocol]
        self.scheduler = self.start("scheduler", *where, "--no-dashboard", "--scheduler-file", str(file), inside=inside)
        self.address = json.loads(self._read(file))["address"]

    def start(self, command: str, *arguments: str, inside: Sequence[str] = (), **environ: str) -> psutil.Popen:
        """Start ``dask COMMAND``."""
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        settings = {
            **os.environ,
            "PYTHONPATH": path,
            CLUSTER_MARK: "1",
            "DASK_LOGGING__DISTRIBUTED": "info",
            "DASK_DISTRIBUTED__WORKER__HTTP__ROUTES": "[]",
            **environ,
        }
        with (self.folder / "log").open("ab") as log:
            process = psutil.Popen(
                [*inside, sys.executable, "-m", "dask", command, *arguments, *self.arguments],
                env=settings,
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        self.started.append(process)
        return process

    def worker(
        self, *arguments: str, inside: Sequence[str] = (), host: str = "127.0.0.1", scheduler: str = "", **environ: str
    ) -> psutil.Popen:
        """Start a worker with a nanny, which is the process that is returned; it has one thread."""
        return self.start(
            *("worker", scheduler or self.address, "--nthreads", "1", "--no-dashboard", "--host", host),
            *("--local-directory", str(self.folder), *arguments),
            inside=inside,
            **environ,
        )

    def log(self) -> str:
        """What all processes have said so far."""
        return (self.folder / "log").read_text()

    def wait_for(self, workers: int, seconds: float = PATIENCE) -> None:
        """Return once the scheduler knows so many workers."""
        from distributed.core import rpc

        async def count() -> int:
            async with rpc(self.address) as scheduler:
                found: int = (await scheduler.identity())["n_workers"]
                return found

        deadline = time.monotonic() + seconds
        while asyncio.run(count()) < workers:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def reap(self, but: Sequence[psutil.Popen]) -> None:
        """End, and wait for, every process but those named and the scheduler."""
        for process in self.started:
            if process is not self.scheduler and process not in but:
                process.kill()
                process.wait()

    def close(self) -> None:
        """End all processes, also those that are stopped."""
        left = []
        for process in self.started:
            try:
                left += [process, *psutil.Process(process.pid).children(recursive=True)]
            except psutil.NoSuchProcess:
                process.wait()
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        for process in self.started:
            process.wait()
        psutil.wait_procs(left, timeout=PATIENCE)

    def _read(self, file: Path) -> str:
        deadline = time.monotonic() + PATIENCE
        while not (file.exists() and file.read_text().strip().endswith("}")):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        return file.read_text()
