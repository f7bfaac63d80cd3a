"""Task against retention: weaker copies of a fine-tune, each evaluated, side by side."""

from __future__ import annotations

from bulkedge.records.frontier import Axes, FrontierRecord, Gain, Measured

from .evaluation import Evaluate
from .points import SCALES, STRENGTHS
from .run import frontier

__all__ = [
    "SCALES",
    "STRENGTHS",
    "Axes",
    "Evaluate",
    "FrontierRecord",
    "Gain",
    "Measured",
    "frontier",
]
