"""Fine-tuning whose updates stay below their limits, and instruments that watch it.

Everything here works on plain torch parameters and on PEFT's LoRA layers.  What needs a library of
the extra ``[hf]`` has a module of its own, :mod:`bulkedge.tune.peft` and
:mod:`bulkedge.tune.trainer`, and is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

from ._full import FullMatrix, full_matrices
from ._layers import AdaptedMatrix, adapted_matrices
from ._watched import Watched
from .clip import SpikeClip
from .control import LayerState, RankController
from .drift import DriftClip, DriftPenalty
from .figures import LayerFigures
from .holder import AdapterHolder, Holder, ThresholdHolder
from .monitor import Monitor
from .orthonormal import OrthonormalFactors
from .penalty import IntruderPenalty
from .triplets import LeadingTriplets
from .update_cap import hold_update

if TYPE_CHECKING:
    from .trainer import Hold as Hold
    from .trainer import IntruderMonitor as IntruderMonitor
    from .trainer import PenaltyMixin as PenaltyMixin

_IN_TRAINER = ("Hold", "IntruderMonitor", "PenaltyMixin")

__all__ = [
    "AdaptedMatrix",
    "AdapterHolder",
    "DriftClip",
    "DriftPenalty",
    "FullMatrix",
    "Hold",
    "Holder",
    "IntruderMonitor",
    "IntruderPenalty",
    "LayerFigures",
    "LayerState",
    "LeadingTriplets",
    "Monitor",
    "OrthonormalFactors",
    "PenaltyMixin",
    "RankController",
    "SpikeClip",
    "ThresholdHolder",
    "Watched",
    "adapted_matrices",
    "full_matrices",
    "hold_update",
]


def __getattr__(name: str) -> object:
    if name in _IN_TRAINER:
        return getattr(importlib.import_module(".trainer", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
