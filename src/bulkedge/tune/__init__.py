"""Fine-tuning that stays below the edge, and instruments that watch it.

Everything here works on plain torch parameters and on PEFT's LoRA layers; what belongs to one of
the libraries of the extra ``[hf]`` has a module of its own: :mod:`bulkedge.tune.peft`,
:mod:`bulkedge.tune.trainer`, :mod:`bulkedge.tune.callback`.
"""

from ._layers import AdaptedMatrix, adapted_matrices
from ._spikes import effective_rank
from .clip import EdgeClip
from .control import RankController
from .monitor import FullMatrix, LayerFigures, Monitor, full_matrices
from .orthonormal import OrthonormalFactors
from .penalty import IntruderPenalty
from .triplets import LeadingTriplets
from .update_cap import hold_update

__all__ = [
    "AdaptedMatrix",
    "EdgeClip",
    "FullMatrix",
    "IntruderPenalty",
    "LayerFigures",
    "LeadingTriplets",
    "Monitor",
    "OrthonormalFactors",
    "RankController",
    "adapted_matrices",
    "effective_rank",
    "full_matrices",
    "hold_update",
]
