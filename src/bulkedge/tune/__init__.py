"""Fine-tuning whose updates stay below their thresholds, and instruments that watch it.

Everything here works on plain torch parameters and on PEFT's LoRA layers.  What needs a library of
the extra ``[hf]`` has a module of its own: :mod:`bulkedge.tune.peft`,
:mod:`bulkedge.tune.trainer`, :mod:`bulkedge.tune.callback`.
"""

from ._core_svd import effective_rank
from ._layers import AdaptedMatrix, adapted_matrices
from .clip import SpikeClip
from .control import LayerState, RankController
from .holder import AdapterHolder, Holder, ThresholdHolder
from .monitor import FullMatrix, LayerFigures, Monitor, Watched, full_matrices
from .orthonormal import OrthonormalFactors
from .penalty import IntruderPenalty
from .triplets import LeadingTriplets
from .update_cap import UpdateCap, hold_update

__all__ = [
    "AdaptedMatrix",
    "AdapterHolder",
    "FullMatrix",
    "Holder",
    "IntruderPenalty",
    "LayerFigures",
    "LayerState",
    "LeadingTriplets",
    "Monitor",
    "OrthonormalFactors",
    "RankController",
    "SpikeClip",
    "ThresholdHolder",
    "UpdateCap",
    "Watched",
    "adapted_matrices",
    "effective_rank",
    "full_matrices",
    "hold_update",
]
