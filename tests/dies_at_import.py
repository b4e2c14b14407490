"""A loader's module that obeys the environment while a worker imports it."""

from __future__ import annotations

import os

from fakes import FakeModel, load, obey

from mp_rerank._workers.child import in_worker_process

if in_worker_process():
    obey(os.environ["DIES_AT_IMPORT"])

__all__ = ["FakeModel", "load"]
