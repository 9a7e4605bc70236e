"""Sphinx builds these pages: ``make docs`` writes them to ``build/docs``."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import structlora_pyg

project = "structlora_pyg"
author = "The structlora_pyg authors"
version = release = structlora_pyg.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "generated",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
default_role = "py:obj"  # `name` in a docstring links to what it names
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
exclude_patterns = ["README.md"]

html_theme = "furo"
html_title = f"structlora_pyg {release}"
html_static_path = ["figures"]
html_show_sourcelink = False
html_theme_options = {"source_repository": "", "navigation_with_keys": True}


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}objects.inv", timeout=5):
            return True
    except OSError:
        return False


# A machine without network builds the same pages, with names of other libraries in plain text.
intersphinx_mapping = {
    name: (url, None)
    for name, url in {
        "python": "https://docs.python.org/3/",
        "torch": "https://docs.pytorch.org/docs/stable/",
        "torch_geometric": "https://pytorch-geometric.readthedocs.io/en/latest/",
        "peft": "https://huggingface.co/docs/peft/main/en/",
        "transformers": "https://huggingface.co/docs/transformers/main/en/",
    }.items()
    if _reachable(url)
}
