"""Leading singular triplets of a matrix that is known by its products."""

from bulkedge._linmap import Adjoint, Dense, LinearMap, LowRank, Scaled, Sum

from ._bidiagonal import Bidiagonalization, Ritz
from ._result import SingularTriplets, Status, neighbour_gaps, resolution
from ._triplet import singular_triplet
from ._truncate import truncate
from ._unseen import Unseen
from .adjoint import (
    KKT,
    AdjointSolver,
    AugmentedLeastSquares,
    DeflatedCG,
    ExplicitSVD,
    Minres,
    PushThrough,
    System,
)
from .solver import (
    Auto,
    BlockKrylov,
    DenseSVD,
    GolubKahan,
    GradientAscent,
    Lanczos,
    Newton,
    Power,
    RayleighQuotient,
    Refined,
    Riemannian,
    Solver,
    thin_svd,
)

__all__ = [
    "KKT",
    "Adjoint",
    "AdjointSolver",
    "AugmentedLeastSquares",
    "Auto",
    "Bidiagonalization",
    "BlockKrylov",
    "DeflatedCG",
    "Dense",
    "DenseSVD",
    "ExplicitSVD",
    "GolubKahan",
    "GradientAscent",
    "Lanczos",
    "LinearMap",
    "LowRank",
    "Minres",
    "Newton",
    "Power",
    "PushThrough",
    "RayleighQuotient",
    "Refined",
    "Riemannian",
    "Ritz",
    "Scaled",
    "SingularTriplets",
    "Solver",
    "Status",
    "Sum",
    "System",
    "Unseen",
    "neighbour_gaps",
    "resolution",
    "singular_triplet",
    "thin_svd",
    "truncate",
]
