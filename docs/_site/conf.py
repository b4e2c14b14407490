"""The site: every page of the repository, as it is read there, and the API reference from the docstrings.

    sphinx-build -W --keep-going -c docs/_site . OUT     (`tox run -e docs`)

The source folder is the repository's root, so a link that leads somewhere there leads to the same thing here: see
`repository.py`. Nothing is fetched while the site is built, and its pages load nothing from elsewhere.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from mp_rerank import __version__  # noqa: E402

project = "mp_rerank"
author = "the authors of mp_rerank"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "repository"]

root_doc = "docs/index"
include_patterns = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "bench/results/README.md",
    "docs/**.md",
    "docs/**.rst",
    "mp_rerank/builtin/README.md",
    "mp_rerank/troubleshooting.md",
]
exclude_patterns = [".*", "build", "dist", "docs/_site"]

# Markdown: anchors are GitHub's.
myst_heading_anchors = 4

# The API reference. What the docstrings do not say is not listed.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Frameworks, and what they bring: the reference needs their classes' names only.
autodoc_mock_imports = [
    "ir_measures",
    "langchain_core",
    "langroid",
    "llama_index",
    "pydantic",
    "rerankers",
    "sentence_transformers",
    "torch",
]


def _haystack() -> types.ModuleType:
    """A stand-in whose decorators leave what they decorate as it is: a mock would take its place."""
    module, utils = types.ModuleType("haystack"), types.ModuleType("haystack.utils")

    def component(decorated: object) -> object:
        return decorated

    component.output_types = lambda **_: component  # type: ignore[attr-defined]
    module.component = component  # type: ignore[attr-defined]
    module.Document = type("Document", (), {})  # type: ignore[attr-defined]
    module.default_from_dict = module.default_to_dict = None  # type: ignore[attr-defined]
    utils.ComponentDevice = type("ComponentDevice", (), {})  # type: ignore[attr-defined]
    return sys.modules.setdefault("haystack.utils", utils) and module


sys.modules.setdefault("haystack", _haystack())

html_theme = "furo"
html_title = f"mp_rerank {release}"
html_copy_source = False
html_show_sphinx = html_show_copyright = False
# Furo's own fonts and scripts are in the theme; a link to GitHub's icon is not.
html_theme_options = {"footer_icons": []}
