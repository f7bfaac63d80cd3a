"""What a forward method is asked."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bulkedge._linmap import LinearMap
from bulkedge.triplet._result import SingularTriplets

from ._start import Randomness


class Solver(Protocol):
    """What :func:`singular_triplet` asks of a method."""

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The k leading triplets of A, m ≥ n; ``start`` is a guess of V, shape ``(n, ≥ 1)``."""
        ...
