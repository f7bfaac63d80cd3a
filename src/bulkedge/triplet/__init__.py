"""Leading singular triplets of a matrix that is known by its products."""

from bulkedge._linmap import Adjoint, Dense, LinearMap, LowRank, Scaled, Sum

from ._result import SingularTriplets, Status, resolution
from ._triplet import singular_triplet
from .solver import BlockKrylov, DenseSVD, Solver, thin_svd

__all__ = [
    "Adjoint",
    "BlockKrylov",
    "Dense",
    "DenseSVD",
    "LinearMap",
    "LowRank",
    "Scaled",
    "SingularTriplets",
    "Solver",
    "Status",
    "Sum",
    "resolution",
    "singular_triplet",
    "thin_svd",
]
