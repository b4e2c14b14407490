"""A real server of the fake model, with real sockets, in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
