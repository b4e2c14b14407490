"""The rooms of the house, as the README lists them: every module has one, and imports from no room further down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mp_rerank"


def rooms() -> dict[str, int]:
    """Module, or package with all that is in it -> the number of its room."""
    rows = (ROOT / "README.md").read_text(encoding="utf-8").partition("| room | is for |")[2].splitlines()[2:]
    listed = [re.findall(r"`(\w+)/?`", row.split("|")[1]) for row in rows if row.startswith("|")]
    return {name: number for number, names in enumerate(listed) for name in names}


def imported(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Modules of the package that a module imports as it is imported itself.

    Who takes a public name from the door imports what stands behind it, the last of which is ``shared``.
    """
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mp_rerank"):
            _, _, inner = node.module.partition(".")
            names = [inner] if inner else [alias.name if alias.name in known else "shared" for alias in node.names]
            yield from (name.partition(".")[0] for name in names)


def test_every_module_has_a_room_and_imports_from_none_further_down() -> None:
    found = rooms()
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if name == "__init__":  # the door: it shows what is within
            continue
        seen.add(name)
        for other in imported(ast.parse(path.read_text(encoding="utf-8")), set(found)):
            assert found[other] <= found[name], f"{path.name} imports {other}, of a room further down"
    assert seen == found.keys()
