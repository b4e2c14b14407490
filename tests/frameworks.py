"""Whether a framework is there: its tests are skipped without it, except where every framework is promised."""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from types import ModuleType

import pytest

# No framework is to tell its makers of these tests.
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")


def need(name: str) -> ModuleType:
    """The module ``name``, or a skip; under ``tox -e newest``, the error that importing it ended in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a framework warns of while it is imported is its own affair
        if os.environ.get("MP_RERANK_INTEGRATIONS") == "required":
            return import_module(name)
        return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)
