"""A package's import put off until something of it is called: for what the libraries import and scoring never calls.

sentence-transformers imports scikit-learn, and that SciPy, for similarities and evaluations: a fifth of the time that a
worker takes to import what it needs.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["deferred"]


@contextmanager
def deferred(package: str) -> Iterator[None]:
    """Within, ``from package.module import name`` binds a function that does the import when it is first called.

    Afterwards the package is imported as ever. Where it is missing, or already there, nothing changes. For a process
    with one thread: what others import meanwhile would be put off too. Whoever needs a name for anything but a call
    (a base class) fails, and is to be imported again without this.
    """
    if package in sys.modules or importlib.util.find_spec(package) is None:
        yield
        return
    finder = _Finder(package)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if finder.covers(name)]:
            del sys.modules[name]


class _Finder(MetaPathFinder, Loader):
    def __init__(self, package: str) -> None:
        self._package = package

    def covers(self, name: str) -> bool:
        return name == self._package or name.startswith(f"{self._package}.")

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if self.covers(fullname) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(self.__name__), name)(*arguments, **options)

        call.__name__ = call.__qualname__ = name
        return call
