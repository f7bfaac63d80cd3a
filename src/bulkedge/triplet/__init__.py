"""Leading singular triplets of a matrix that is known by its products."""

from ._result import SingularTriplets, Status
from ._triplet import singular_triplet
from .solver import BlockKrylov, DenseSVD, Solver

__all__ = ["BlockKrylov", "DenseSVD", "SingularTriplets", "Solver", "Status", "singular_triplet"]
