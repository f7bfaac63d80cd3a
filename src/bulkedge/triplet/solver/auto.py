"""The default: a method by size, number of triplets and start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._fields import check_fields, whole
from bulkedge._linmap import LinearMap
from bulkedge.triplet._result import SingularTriplets

from ._start import Randomness
from .block_krylov import BlockKrylov
from .dense import DenseSVD
from .lanczos import Lanczos
from .refined import Refined


@dataclass(frozen=True)
class Auto:
    """Dense below ``dense_below``, else Lanczos for one triplet, block Krylov for several.

    docs/how-to-choose.md shows the measurements behind it.

    Attributes:
        dense_below: Shorter side up to which a full SVD is taken, and the share ``n/4`` of
            triplets beyond which it is.
    """

    dense_below: int = 192

    def __post_init__(self) -> None:
        check_fields(self, dense_below=whole(0))

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The k leading triplets of A, m ≥ n."""
        return self._choose(A, k, start).compute(A, k, start, generator)

    def _choose(self, A: LinearMap, k: int, start: Tensor | None) -> DenseSVD | Refined:
        n = A.shape[1]
        if n <= self.dense_below or 4 * k >= n:
            return DenseSVD()
        if k > 1 or start is not None:
            return Refined(BlockKrylov())
        # In float32 a step or two more here often make the refinement unnecessary.
        return Refined(Lanczos(rtol=1e-6 if A.dtype is torch.float32 else None))
