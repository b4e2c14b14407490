"""Imported by the fork server, once: what every worker needs, so that each fork has it already.

One thread only: a fork does not take threads along, and a library that has started some would wait for them. A worker
sets its own number before the first of them is needed. Nothing may touch a GPU: a fork could not use it afterwards.

The server ends with the process that started it. Once it serves, it hears of that end itself. While it imports, a
thread looks, and is gone before the first fork.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Iterator

from mp_rerank._workers.child import die_with_parent_thread, import_engine, set_threads

# How soon a server that is still importing follows its parent, where the system does not see to it.
WATCH_SECONDS = 0.5


@contextlib.contextmanager
def _leaving_with_parent() -> Iterator[None]:
    done = threading.Event()
    parent = os.getppid()

    def watch() -> None:
        while not done.wait(WATCH_SECONDS):
            if os.getppid() != parent:
                os._exit(1)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()


die_with_parent_thread()
try:
    os.getcwd()
except OSError:  # deleted: MKL ends a process that imports torch there
    os.chdir(os.sep)
set_threads(1)
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # torch.cuda.is_available() then asks the driver's library, not CUDA

with _leaving_with_parent(), contextlib.redirect_stderr(io.StringIO()):
    import_engine()
