"""Fine-tuning that stays below the edge, and instruments that watch it.

Extra ``[hf]``.
"""

from ._layers import AdaptedMatrix, adapted_matrices

__all__ = ["AdaptedMatrix", "adapted_matrices"]
