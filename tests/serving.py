"""Real servers of the fake model, with real sockets: in this process, or in one of their own."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mp_rerank.config import ModelSpec
from mp_rerank.server.app import App
from mp_rerank.server.config import ServerConfig
from mp_rerank.server.models import Models
from mp_rerank.server.run import Server, listen

POOL = {"devices": "cpu", "workers": 2, "restart_backoff": 0.01}


class Running:
    """A server that runs.

    Attributes:
        url: where.
        models, app, server: its parts.
    """

    def __init__(self, url: str, models: Models, app: App, server: Server) -> None:
        self.url = url
        self.models = models
        self.app = app
        self.server = server

    @property
    def pool(self) -> Any:
        """The first model's."""
        return self.models.first.pool


@contextmanager
def serving(
    models: Mapping[str, ModelSpec],
    pool: Mapping[str, Any] | None = None,
    *,
    load: bool = True,
    at: int = 0,
    **options: Any,
) -> Iterator[Running]:
    """A server for as long as the context lasts; ``at`` is its port, options are fields of ``ServerConfig``."""
    options.setdefault("memory", "64GiB")
    config = ServerConfig(models=models, port=at, pool={**POOL, **(pool or {})}, **options)
    served = Models(config.models, memory=config.memory, aliases=config.aliases, options=config.pool_options)
    try:
        if load:
            served.load()
        with listen(config) as (sock, url):
            app = App(config, served)
            server = Server(config, app)
            started = threading.Event()

            async def run() -> None:
                serve = asyncio.ensure_future(server.serve([sock]))
                while not (server.started or serve.done()):
                    await asyncio.sleep(0.002)
                started.set()
                await serve

            thread = threading.Thread(target=asyncio.run, args=(run(),), name="test-server")
            thread.start()
            try:
                started.wait()
                yield Running(url, served, app, server)
            finally:
                server.should_exit = True
                thread.join()
    finally:
        served.close(drain=False)


TESTS = Path(__file__).parent
FAKE_SERVER = """
import logging, sys
sys.path.insert(0, {tests!r})
from mp_rerank.config import ModelSpec
from mp_rerank.server.config import ServerConfig
from mp_rerank.server.keys import Keys
from mp_rerank.server.run import serve

logging.basicConfig(level=logging.WARNING, format="%(message)s")
keys = lambda: Keys.read({keys!r})
pool = {{"devices": "cpu", "workers": 2, "max_restarts": 0}}
models = {{"fake": ModelSpec({name!r}, loader={loader!r})}}
serve(ServerConfig(models, memory="64GiB", pool=pool, port=0, keys=keys()), keys=keys)
"""


class ServerProcess:
    """A server process.

    Attributes:
        process, url: it, and where it listens.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = self.wait_for(r"listening at (\S+),")
        self._rest = threading.Thread(target=self._read, daemon=True)

    def wait_for(self, pattern: str) -> str:
        """What the first group of ``pattern`` is in the next line of the log that has it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError("".join(self.lines))

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr

    def end(self, seconds: float = 60.0) -> int:
        """Wait for its end; its exit code."""
        self._rest.start()
        return self.process.wait(seconds)


@contextmanager
def server_process(name: str = "fake", loader: str = "fakes:load", keys: str | None = None) -> Iterator[ServerProcess]:
    code = FAKE_SERVER.format(tests=str(TESTS), name=name, loader=loader, keys=keys)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            yield ServerProcess(process)
        finally:
            if process.poll() is None:
                process.kill()
