"""How the pages become a site: ``make docs``, strict."""

project = "bulkedge"
author = "The bulkedge authors"
copyright = "2026, the bulkedge authors"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["simulate"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# pages are read on a forge, too, where links to files of the repository lead somewhere
suppress_warnings = ["myst.xref_missing"]
html_theme = "alabaster"
html_theme_options = {
    "description": "Spectral instruments for neural-network weights",
    "fixed_sidebar": True,
    "page_width": "70rem",
}
