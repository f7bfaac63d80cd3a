"""Which matrices of two inputs belong together, and their maps."""

from __future__ import annotations

from .comparison import Comparison
from .pair import Pair, judge_pair, load
from .plan import Plan, make_plan

__all__ = ["Comparison", "Pair", "Plan", "judge_pair", "load", "make_plan"]
