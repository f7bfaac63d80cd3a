"""Leading singular triplets of a matrix that is known by its products."""

from ._result import SingularTriplets, Status, resolution
from ._triplet import singular_triplet
from .solver import BlockKrylov, DenseSVD, Solver, thin_svd

__all__ = [
    "BlockKrylov",
    "DenseSVD",
    "SingularTriplets",
    "Solver",
    "Status",
    "resolution",
    "singular_triplet",
    "thin_svd",
]
