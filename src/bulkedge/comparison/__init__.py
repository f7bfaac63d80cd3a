"""Which matrices of two inputs belong together, and their maps."""

from __future__ import annotations

from .comparison import Comparison
from .finite import what_is_not_finite
from .inputs import EXPERTS, by_weight, check_inputs, find_inputs, with_moments
from .pair import Pair, judge_pair, load
from .plan import Plan, make_plan

__all__ = [
    "EXPERTS",
    "Comparison",
    "Pair",
    "Plan",
    "by_weight",
    "check_inputs",
    "find_inputs",
    "judge_pair",
    "load",
    "make_plan",
    "what_is_not_finite",
    "with_moments",
]
