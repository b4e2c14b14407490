"""A function of the standard library, replaced for one thread and for a moment.

multiprocessing has no setting for what a worker is told about its parent. So its functions for that are replaced by a
switch each. A switch calls the original for everybody, except for the thread that is starting a worker at that moment.

A switch is put in once in the life of the process, and stays. It carries what it needs on itself. So a second copy of
this module (a reload, a package that is bundled twice) finds the switch that is there and uses it; two switches that
call each other cannot come about.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

__all__ = ["replaced_on_this_thread"]

# The attribute of a switch that holds its replacements: a threading.local with ``instead``.
MARK = "_mp_rerank_replacements"

_lock = threading.Lock()


@contextmanager
def replaced_on_this_thread(module: ModuleType, name: str, instead: Callable[..., Any]) -> Iterator[None]:
    """Within, calls of ``module.name`` by this thread go to ``instead``; those of other threads to the original."""
    replacements = _switch(module, name)
    before = getattr(replacements, "instead", None)
    replacements.instead = instead
    try:
        yield
    finally:
        replacements.instead = before


def _switch(module: ModuleType, name: str) -> Any:
    """Put a switch in the place of ``module.name``, unless there is one; what it holds."""
    with _lock:
        original = getattr(module, name)
        replacements = getattr(original, MARK, None)
        if replacements is not None:
            return replacements
        replacements = threading.local()

        @functools.wraps(original)
        def switch(*args: Any, **options: Any) -> Any:
            return (getattr(replacements, "instead", None) or original)(*args, **options)

        setattr(switch, MARK, replacements)
        setattr(module, name, switch)
        return replacements
