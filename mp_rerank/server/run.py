"""The process that serves: listens, loads, answers, and on SIGTERM takes no more and finishes what it has.

SIGTERM, SIGINT   take no more connections, answer what is there, end the workers, leave
a second one      leave at once; workers are killed
SIGHUP            read the API keys again
SIGUSR1           load the models anew, as their files are now, and switch to them
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from mp_rerank.server.app import App
from mp_rerank.server.config import ServerConfig
from mp_rerank.server.keys import Keys
from mp_rerank.server.models import Models
from mp_rerank.server.protocol import protocol_for

__all__ = ["Server", "listen", "serve"]

logger = logging.getLogger("mp_rerank.server")

KEEP_ALIVE_SECONDS = 75  # longer than the idle connections that proxies keep, which would else meet a closed one
BACKLOG = 1024


class Server(uvicorn.Server):
    """Uvicorn's, for one `App`."""

    def __init__(self, config: ServerConfig, app: App) -> None:
        super().__init__(
            uvicorn.Config(
                app.asgi,
                http=protocol_for(config.limits),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Leave in order; told again, at once."""
        # Uvicorn would raise the signals once more when it is done, and so end the process before its workers.
        self.force_exit = self.force_exit or self.should_exit
        self.should_exit = True


def serve(config: ServerConfig, *, keys: Callable[[], Keys] | None = None) -> None:
    """Serve until a signal comes.

    Args:
        config: what and where.
        keys: reads the API keys again.

    Raises:
        RerankError: a model could not be loaded.
        OSError: it cannot listen there.
        TypeError, ValueError: naming what is wrong.
    """
    models = Models(config.models, memory=config.memory, aliases=config.aliases, options=config.pool_options)
    with listen(config) as (sock, where):
        asyncio.run(_serve(config, models, sock, where, keys))


async def _serve(
    config: ServerConfig, models: Models, sock: socket.socket, where: str, keys: Callable[[], Keys] | None
) -> None:
    app = App(config, models)
    server = Server(config, app)
    _on_hangup(app, keys)
    loading = asyncio.ensure_future(asyncio.to_thread(models.load))
    _on_user_signal(models, loading)

    def loaded(_: object) -> None:
        if loading.exception() is None:
            logger.warning("ready at %s", where)
            _tell_systemd("READY=1")
        else:
            server.should_exit = True

    loading.add_done_callback(loaded)
    logger.warning("listening at %s, loading %s", where, ", ".join(model.name for model in models))
    try:
        await server.serve([sock])
    finally:
        _tell_systemd("STOPPING=1")
        done = loading.done()
        await asyncio.to_thread(models.close, drain=done and not server.force_exit)
        error = await _error_of(loading)
    if error is not None and done:
        raise error


async def _error_of(loading: asyncio.Future[None]) -> BaseException | None:
    await asyncio.wait((loading,))
    return loading.exception()


def _on_hangup(app: App, keys: Callable[[], Keys] | None) -> None:
    def read_again() -> None:
        assert keys is not None
        try:
            app.gate.keys = keys()
        except ValueError as error:
            logger.error("the API keys stay as they were: %s [mp-rerank explain keys-not-read]", error)
        else:
            logger.warning("API keys read: %r", app.gate.keys)

    if keys is not None and hasattr(signal, "SIGHUP"):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, read_again)


def _on_user_signal(models: Models, loading: asyncio.Future[None]) -> None:
    latest = loading

    def load_anew() -> None:
        nonlocal latest
        if latest.done():
            latest = asyncio.ensure_future(asyncio.to_thread(models.reload))
        else:
            logger.warning(
                "the models are being loaded: they are not loaded anew [mp-rerank explain models-still-loading]"
            )

    if hasattr(signal, "SIGUSR1"):
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, load_anew)


@contextlib.contextmanager
def listen(config: ServerConfig) -> Iterator[tuple[socket.socket, str]]:
    """A socket that listens where ``config`` says, and its URL; closed at the end, and a Unix socket's path removed."""
    if config.uds is not None:
        sock, where = _listen_at_path(config.uds, config.uds_mode), f"unix:{config.uds}"
    else:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        made = socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
        # asyncio sets TCP_NODELAY only where a socket says its protocol. Without, an answer's body would wait for the
        # client to acknowledge its headers: 40 ms.
        sock = socket.socket(made.family, made.type, socket.IPPROTO_TCP, fileno=made.detach())
        host, port = sock.getsockname()[:2]
        where = f"http://[{host}]:{port}" if family == socket.AF_INET6 else f"http://{host}:{port}"
    try:
        yield sock, where
    finally:
        sock.close()
        if config.uds is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(config.uds)


def _listen_at_path(path: str, mode: int) -> socket.socket:
    """A Unix socket at ``path``, in place of one that nobody listens at any more."""
    try:
        left = stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        left = False
    if left:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                raise ValueError(f"--uds: another process listens at {path}")
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX)
    before = os.umask(0o777 & ~mode)  # from its first moment nobody else may connect
    try:
        sock.bind(path)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)
    sock.listen(BACKLOG)
    return sock


def _tell_systemd(state: str) -> None:
    """What a unit of ``Type=notify`` waits for; nothing elsewhere."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
