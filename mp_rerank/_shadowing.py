"""Files that stand in the way of a module that is needed, such as a ``random.py`` in the working directory.

Python looks for a module where the program is, or in the working directory, before it looks in the standard library and
among installed packages. Whatever then imports ``random`` gets the user's file, and fails with an error that does not
say so. ``shadowing`` says so, at the end of such an error's message.

It imports nothing that could be shadowed itself.
"""

from __future__ import annotations

import _imp
import os
import sys
from collections.abc import Iterable, Iterator
from types import TracebackType

__all__ = ["shadowing"]

#: what the package and the libraries beneath it import, beside the standard library
PACKAGES = frozenset(
    {
        "accelerate", "cachetools", "filelock", "fsspec", "huggingface_hub", "jinja2", "networkx", "numpy", "onnx",
        "onnxruntime", "openvino", "packaging", "platformdirs", "psutil", "regex", "requests", "safetensors", "scipy",
        "sentence_transformers", "sklearn", "sympy", "tokenizers", "torch", "tqdm", "transformers", "typing_extensions",
        "yaml",
    }
)  # fmt: skip
NAMES = sys.stdlib_module_names | PACKAGES


def shadowing(error: BaseException | None = None) -> str:
    """What to add to an error's message: `` (FILE shadows the standard library's module NAME: rename it)``, or nothing.

    Args:
        error: what was raised here. Files are named that were imported as such a module, if an import has failed.
            ``None``: another process, which has this one's working directory, has failed to start. Files are named that
            lie there, or where the program is, and that it would import.
    """
    if getattr(sys, "frozen", False):  # the application's modules lie together with the standard library's
        return ""
    if error is not None and not _at_import(error):
        return ""
    try:
        if error is None:
            found = list(_lying_in([os.getcwd(), *sys.path[:1]]))
        else:
            found = [*_in_tracebacks(error), *_imported()]
        shadows = {name: file for name, file in found if _shadows(name, file)}
    except OSError:  # the working directory has been deleted
        return ""
    whose = {name: "package" if name in PACKAGES else "standard library's module" for name in shadows}
    said = "; ".join(f"{file} shadows the {whose[name]} {name}: rename it" for name, file in sorted(shadows.items()))
    return f" ({said})" if said else ""


def _at_import(error: BaseException) -> bool:
    """Whether ``error`` was raised while a module was imported."""
    return any(
        isinstance(each, (ImportError, SyntaxError)) or "<module>" in (frame[1] for frame in _frames(each))
        for each in _chain(error)
    )


def _in_tracebacks(error: BaseException) -> Iterator[tuple[str, str]]:
    """Names and files of the modules whose import raised ``error``, which are not in ``sys.modules`` any more."""
    path = {os.path.realpath(folder) for folder in sys.path}
    for each in _chain(error):
        files = [file for file, function in _frames(each) if function == "<module>"]
        if isinstance(each, SyntaxError) and each.filename:
            files.append(each.filename)
        for file in files:
            if _folder_of(file) in path:  # else it is a module within a package
                yield _name_of(file), file


def _imported() -> Iterator[tuple[str, str]]:
    """Names and files of the modules that are imported."""
    for name in NAMES:
        file = getattr(sys.modules.get(name), "__file__", None)
        if isinstance(file, str):
            yield name, file


def _lying_in(folders: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names and files of the modules in ``folders`` that an import would find before those of the standard library."""
    for name in NAMES:
        if name not in sys.builtin_module_names and not _imp.is_frozen(name):
            for folder in folders:
                file = _file_in(folder, name)
                if file is not None:
                    yield name, file


def _shadows(name: str, file: str) -> bool:
    """Whether ``file`` is not the module ``name`` that is meant."""
    folder = _folder_of(file)
    if name not in NAMES or name != _name_of(file):
        return False
    if os.path.basename(folder) in ("site-packages", "dist-packages", "lib-dynload", "DLLs"):
        return False
    if name in PACKAGES:  # where none of that name is installed, this one stands in nobody's way
        return any(_file_in(other, name) for other in sys.path if os.path.realpath(other) != folder)
    return folder != os.path.realpath(os.path.dirname(os.__file__)) and not folder.endswith(".zip")


def _file_in(folder: str, name: str) -> str | None:
    """The file of the module ``name`` if it is in ``folder``, as source."""
    for file in (os.path.join(folder, f"{name}.py"), os.path.join(folder, name, "__init__.py")):
        if os.path.isfile(file):
            return file
    return None


def _name_of(file: str) -> str:
    """The name under which ``file`` is imported from its folder."""
    stem = os.path.basename(file).partition(".")[0]
    return os.path.basename(os.path.dirname(file)) if stem == "__init__" else stem


def _folder_of(file: str) -> str:
    """The folder on ``sys.path`` that ``file``, a module at the top, is imported from."""
    folder = os.path.dirname(os.path.realpath(file))
    return os.path.dirname(folder) if os.path.basename(file).startswith("__init__.") else folder


def _frames(error: BaseException) -> Iterator[tuple[str, str]]:
    """File and function of each frame of the traceback."""
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame.f_code.co_filename, traceback.tb_frame.f_code.co_name
        traceback = traceback.tb_next


def _chain(error: BaseException) -> list[BaseException]:
    """``error`` and those that led to it."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and each not in found:
            found.append(each)
            waiting += [each.__cause__, each.__context__]
    return found
