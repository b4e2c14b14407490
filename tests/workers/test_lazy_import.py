"""A package whose import is put off is imported when something of it is called, and by everybody else as ever."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mp_rerank._workers.lazy_import import deferred


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """``heavy``, whose ``heavy.sums`` leaves a mark when it is imported, and ``user``, which imports from it."""
    mark = tmp_path / "imported"
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text("")
    (tmp_path / "heavy" / "sums.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nclass Base: pass\ndef add(a, b=1): return a + b\n"
    )
    (tmp_path / "user.py").write_text("from heavy.sums import add\n")
    (tmp_path / "heir.py").write_text("from heavy.sums import Base\nclass Heir(Base): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    for name in ("heavy", "heavy.sums", "user", "heir"):
        sys.modules.pop(name, None)


def test_it_is_imported_with_the_first_call(package: Path) -> None:
    with deferred("heavy"):
        user = importlib.import_module("user")
    assert not package.exists()
    assert user.add(2, b=3) == 5
    assert package.exists()


def test_afterwards_others_import_the_real_one(package: Path) -> None:
    with deferred("heavy"):
        importlib.import_module("user")
    assert not [name for name in sys.modules if name.startswith("heavy")]
    assert importlib.import_module("heavy.sums").Base


def test_what_needs_more_than_calls_fails_and_can_be_imported_without(package: Path) -> None:
    with pytest.raises(TypeError), deferred("heavy"):
        importlib.import_module("heir")
    assert importlib.import_module("heir").Heir()


def test_one_that_is_there_or_missing_is_left_alone(package: Path) -> None:
    real = importlib.import_module("heavy.sums")
    with deferred("heavy"):
        assert importlib.import_module("user").add is real.add
    with deferred("a_package_that_is_missing"), pytest.raises(ModuleNotFoundError):
        importlib.import_module("a_package_that_is_missing")
