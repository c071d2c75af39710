"""Sphinx configuration; the reference is generated from the code (``_ext/reference.py``)."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent / "src")]

import madang  # noqa: E402

project = "Madang"
copyright = "The Madang developers"
author = "The Madang developers"
release = version = madang.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "reference"]
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_ext", "reference/generated"]
html_theme = "furo"
html_title = f"Madang {version}"
html_static_path = ["_static"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
nitpicky = False
