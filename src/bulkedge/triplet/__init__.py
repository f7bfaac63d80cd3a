"""Leading singular triplets of a matrix that is known by its products."""

from ._result import SingularTriplets, Status
from ._triplet import singular_triplet
from .solver import BlockKrylov, Dense, Solver

__all__ = ["BlockKrylov", "Dense", "SingularTriplets", "Solver", "Status", "singular_triplet"]
