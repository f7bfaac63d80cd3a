"""A record as people and other programs want it: views of what was found, nothing is computed."""

from .budget import budget_csv, print_budget
from .checks import to_junit
from .comparison import SideBySide, print_comparison
from .formats import FORMATS, format_of, read, render
from .frontier import frontier_csv, frontier_page, print_frontier
from .gate import Failure, Gate, failure_lines
from .html import to_html
from .markdown import to_markdown
from .repairs import print_repair
from .several import print_several, several_csv, several_line
from .table import to_csv, to_parquet
from .terminal import print_record, verdict_line

__all__ = [
    "FORMATS",
    "Failure",
    "Gate",
    "SideBySide",
    "budget_csv",
    "failure_lines",
    "format_of",
    "frontier_csv",
    "frontier_page",
    "print_budget",
    "print_comparison",
    "print_frontier",
    "print_record",
    "print_repair",
    "print_several",
    "read",
    "render",
    "several_csv",
    "several_line",
    "to_csv",
    "to_html",
    "to_junit",
    "to_markdown",
    "to_parquet",
    "verdict_line",
]
