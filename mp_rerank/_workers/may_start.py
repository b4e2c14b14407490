"""Where workers must not be started, or could not live: said at once, with what to do about it."""

from __future__ import annotations

import importlib.util
import multiprocessing.process
import sys
from multiprocessing import spawn

from mp_rerank._workers import child, green

__all__ = ["check_may_spawn", "check_may_start_threads", "check_may_use_cluster"]

OR_A_THREAD = 'isolation="thread" works here: one model on a thread of this process'


def check_may_start_threads() -> None:
    """Raise ``RuntimeError`` where the pool's threads would wait for ever, and say why."""
    green.check_waits()


def check_may_use_cluster() -> None:
    """Raise ``RuntimeError`` where a Dask cluster cannot be spoken to, and say why."""
    if importlib.util.find_spec("distributed") is None:
        raise RuntimeError("cluster: this needs Dask: pip install 'mp-rerank[dask]', here and for every Dask worker")
    if green.threads_are_green():
        raise RuntimeError(
            "cluster: threads are greenlets here (gevent or eventlet has replaced them), and an event loop on one of "
            "them stops the others: start this pool in a process that is not patched"
        )


def check_may_spawn() -> None:
    """Raise ``RuntimeError`` where starting worker processes would be wrong, and say why.

    Inside a worker a pool would multiply itself. So it would in a frozen program that multiprocessing has started as a
    helper, and that does not know it. While a child of ``multiprocessing`` is still importing its main module, every
    child would start children of its own. A daemonic process may have none. Without semaphores there is no executor.
    """
    if child.in_worker_process():
        raise RuntimeError("this is a worker of a RerankerPool: a pool cannot be started inside one")
    current = multiprocessing.process.current_process()
    if _is_unaware_helper():
        raise RuntimeError(
            "a RerankerPool cannot be started here: multiprocessing has started this frozen program as a helper of the "
            "first one, and it has begun like any other; call multiprocessing.freeze_support() first thing in its main "
            "module"
        )
    if getattr(current, "_inheriting", False):
        raise RuntimeError(
            "a RerankerPool cannot be started while a multiprocessing child is importing its main module; another "
            'library spawned this process: put the code that starts the pool under if __name__ == "__main__":'
        )
    if current.daemon:
        raise RuntimeError(
            "a RerankerPool cannot start workers in a daemonic process, such as Celery's and multiprocessing.Pool's: "
            f"it may have no children. {OR_A_THREAD}; or start the pool in a process that is not daemonic"
        )
    _check_semaphores()


def _is_unaware_helper() -> bool:
    """Whether this process was started to run code of multiprocessing's, and runs its own main module in place of it.

    multiprocessing starts the executable with arguments for Python, which a frozen program takes for its own.
    """
    if not getattr(sys, "frozen", False):
        return False
    arguments = sys.argv[1:]
    return spawn.is_forking(sys.argv) or any("from multiprocessing." in argument for argument in arguments)


def _check_semaphores() -> None:
    if sys.platform == "win32":
        return
    try:
        import _multiprocessing  # type: ignore[import-not-found]
        from multiprocessing.synchronize import SemLock

        # Made and unlinked in one go: it is never seen by anybody, nor by multiprocessing's tracker.
        make_name = getattr(SemLock, "_make_name", None)
        if make_name is not None:
            _multiprocessing.SemLock(1, 1, 1, make_name(), True)
    except (ImportError, OSError) as error:
        raise RuntimeError(
            f"a RerankerPool cannot start worker processes: this system gives no semaphores "
            f"({type(error).__name__}: {error}). They are kept in /dev/shm, which must be there, be writable and have "
            f"room (in a container: mount a tmpfs on it). {OR_A_THREAD}"
        ) from error
