"""How the pages become a site: ``make docs``, strict."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

project = "bulkedge"
author = "The bulkedge authors"
copyright = "2026, the bulkedge authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["simulate"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# the names of a module are those of its __all__
autodoc_default_options = {"members": True, "exclude-members": "model_config"}
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
# pages are read on a forge, too, where links to files of the repository lead somewhere
suppress_warnings = ["myst.xref_missing"]
html_theme = "alabaster"
html_theme_options = {
    "description": "Spectral instruments for neural-network weights",
    "fixed_sidebar": True,
    "page_width": "70rem",
}

LITERAL = re.compile(r"(``.*?``)")


def plain_bars(*event: Any) -> None:
    """Docstrings write |x| for an absolute value; between bars, Sphinx would look for a name."""
    lines, literal = event[-1], None
    for i, line in enumerate(lines):
        depth = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and depth <= literal:
            literal = None
        if literal is None and not line.lstrip().startswith((">>>", "...")):
            pieces = LITERAL.split(line)
            pieces[::2] = [piece.replace("|", r"\|") for piece in pieces[::2]]
            lines[i] = "".join(pieces)
        if literal is None and line.rstrip().endswith("::"):
            literal = depth


def plain_returns(*event: Any) -> None:
    """Napoleon takes what stands before a colon for a type, which is in the signature already."""
    lines = event[-1]
    for i, line in enumerate(lines[:-1]):
        if line.strip() in ("Returns:", "Yields:"):
            lines[i + 1] = lines[i + 1].replace(": ", " – ", 1)


def setup(app: Any) -> None:
    """Both are run before napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", plain_bars, priority=400)
    app.connect("autodoc-process-docstring", plain_returns, priority=400)
