"""Forward solvers: one method a file, each a frozen dataclass with its tolerances.

A solver's ``compute(A, k, start, generator)`` sees numbers only: a map A with m ≥ n, the number of
triplets, a guess of the right vectors (or None), and the one source of randomness.  It returns
``SingularTriplets``.
"""

from typing import Protocol

import torch
from torch import Tensor

from bulkedge._linmap import LinearMap
from bulkedge.triplet._result import SingularTriplets

from .block_krylov import BlockKrylov
from .dense import DenseSVD, thin_svd

__all__ = ["BlockKrylov", "DenseSVD", "Solver", "thin_svd"]


class Solver(Protocol):
    """What :func:`singular_triplet` asks of a method."""

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: torch.Generator
    ) -> SingularTriplets:
        """The k leading triplets of A, m ≥ n; ``start`` is a guess of V, shape ``(n, ≥ 1)``."""
        ...
