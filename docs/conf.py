"""Sphinx's settings: `make docs`. Pages are Markdown (MyST), the reference comes from the docstrings."""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import asl_pallas  # noqa: E402

project = "asl_pallas"
release = version = asl_pallas.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = "asl_pallas"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sourcelink = False
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "undoc-members": False, "exclude-members": "tree_flatten, tree_unflatten"}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
maximum_signature_line_length = 100
linkcheck_anchors = False

_BLOCK = re.compile(r":$(?=\n\n\s{4,}\S)", re.MULTILINE)


def _with_code_blocks(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """An indented block after a colon is code: in the docstrings one colon is enough."""
    lines[:] = _BLOCK.sub("::", "\n".join(lines)).split("\n")


def setup(app: Any) -> None:
    # Before napoleon, whose sections are blocks after a colon too.
    app.connect("autodoc-process-docstring", _with_code_blocks, priority=100)
