"""What an audit is asked for, and its answer: documents, checked when they are read."""

from __future__ import annotations

from .compare import MatrixChange, RecordComparison, differences
from .recipe import Recipe, make_recipe, read_recipe, takes_recipe
from .record import Part, Record, Run, Tool
from .rows import Direction, Matrix
from .summary import Counts, Summary, summarise
from .tensors import Skipped

__all__ = [
    "Counts",
    "Direction",
    "Matrix",
    "MatrixChange",
    "Part",
    "Recipe",
    "Record",
    "RecordComparison",
    "Run",
    "Skipped",
    "Summary",
    "Tool",
    "differences",
    "make_recipe",
    "read_recipe",
    "summarise",
    "takes_recipe",
]
