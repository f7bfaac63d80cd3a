"""Which matrices of two inputs belong together, and their maps."""

from __future__ import annotations

from .comparison import Comparison
from .inputs import check_inputs, find_inputs, names_of, with_moments
from .pair import Pair, judge_pair, load
from .plan import Plan, make_plan

__all__ = [
    "Comparison",
    "Pair",
    "Plan",
    "check_inputs",
    "find_inputs",
    "judge_pair",
    "load",
    "make_plan",
    "names_of",
    "with_moments",
]
