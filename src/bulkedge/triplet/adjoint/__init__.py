"""Backward solvers: one method a file, each a frozen dataclass with its tolerances.

They all solve the one system behind the derivative of singular vectors.  For each column i, given
φ ⊥ U and ψ ⊥ V, find p ⊥ U and q ⊥ V with::

    K_i [p; q] = [φ; ψ],        K_i = [[σ_i I, −A], [−Aᵀ, σ_i I]].

K_i is singular (``K_i [u_i; v_i] = 0``) and, with k > 1, has small eigenvalues ``σ_i − σ_j`` inside
the block; both lie in the span of U and V.  On the complement it is symmetric positive definite
with smallest eigenvalue ``σ_i − σ_{k+1}``, for every i ≤ k.
"""

from ._system import AdjointSolver, System
from .augmented import AugmentedLeastSquares
from .deflated_cg import DeflatedCG
from .dense import ExplicitSVD
from .kkt import KKT
from .minres import Minres
from .push_through import PushThrough

__all__ = [
    "KKT",
    "AdjointSolver",
    "AugmentedLeastSquares",
    "DeflatedCG",
    "ExplicitSVD",
    "Minres",
    "PushThrough",
    "System",
]
