"""Block Golub–Kahan bidiagonalisation: two bases in which a large matrix is a small one.

From a block P₁ of left vectors the columns ``P₁, AᵀP₁, AAᵀP₁, …`` are orthonormalised as they come,
which gives

    Aᵀ P = Q Bᵀ,      A Q = P B + P₊ L

with P ``(m, d)``, Q ``(n, e)`` orthonormal, B ``(d, e)``, and P₊ the block that comes next,
orthogonal to P; L is zero but for the columns of the last block of Q.  Directions that a block does
not add are left out, so that blocks shrink where the space closes upon itself.

Golub, Luk, Overton, ACM TOMS 7 (1981), doi:10.1145/355945.355946, with full reorthogonalisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._linmap import LinearMap
from bulkedge._precision import exact

from ._transposed import require_agreement

LARGE = 0.03
"""Of a block whose smallest direction is above this part of its norm rounding leaves enough of the
orthogonality: what it has taken is measured."""
DISAGREEMENT = 256.0
"""The two products of a map have B in common to ``noise``; beyond this multiple it is no rounding.
At most 10 was seen."""
STEP_WORK = 4e7
"""What a step costs besides its products, in operations: most of it is the time of Python."""


def step_work(shape: tuple[int, int], block: int, size: int) -> float:
    """About how many operations a step costs.

    Args:
        shape: ``(m, n)`` of the matrix.
        block: How many vectors are multiplied.
        size: How many there are in the basis.

    Returns:
        Those of two products and of the orthogonalisation, and a constant.
    """
    m, n = shape
    return STEP_WORK + 4.0 * block * (m * n + 2 * (m + n) * size)


@dataclass(frozen=True)
class Ritz:
    """The SVD ``B = X S Yᵀ`` and its residual as an SVD of A.

    The pairs ``u = P x_i``, ``v = Q y_i`` satisfy ``Aᵀu = s v`` and ``A v = s u + P₊ (L Y)_i``.

    Attributes:
        sigma: Descending, padded with zeros to ``max(d, e)``.
        left: X, shape ``(d, d)``.
        right: Y, shape ``(e, e)``.
        lacking: ``L Y``, shape ``(b, e)``.
    """

    sigma: Tensor
    left: Tensor
    right: Tensor
    lacking: Tensor

    @property
    def residuals(self) -> Tensor:
        """‖A v − s u‖ of each pair, shape ``(min(d, e),)``."""
        pairs = min(len(self.left), len(self.right))
        return torch.linalg.vector_norm(self.lacking[:, :pairs], dim=0)


class Bidiagonalization:
    """The bases as they grow.

    Args:
        A: Shape ``(m, n)``.
        start: P₁, orthonormal columns, shape ``(m, b)``.
        noise: Directions smaller than this are dropped as rounding: about 4 eps ‖A‖_F.  What
            rounding really does is measured by :mod:`bulkedge.triplet._rounding`.

    Attributes:
        passes: Products with A or Aᵀ so far, two a step.
        work: About how many operations the steps so far have cost.
        check_passes: Products that measured rounding.
        start_size: b, how many vectors P₁ has.
        noise: As given.
    """

    def __init__(self, A: LinearMap, start: Tensor, noise: float) -> None:
        self.map, self.noise = A, noise
        self.passes = self.check_passes = 0
        self.work = 0.0
        self.start_size = start.shape[1]
        # Vectors are rows: products with a thin block are several times faster in this layout.
        self._left = start.new_empty(0, A.shape[0])
        self._right = start.new_empty(0, A.shape[1])
        self._next = start.mT.contiguous()
        self._small = torch.zeros(0, 0, dtype=torch.float64)
        self._last = torch.zeros(start.shape[1], 0, dtype=torch.float64)

    @property
    def left(self) -> Tensor:
        """P, shape ``(m, d)``."""
        return self._left.mT

    @property
    def right(self) -> Tensor:
        """Q, shape ``(n, e)``."""
        return self._right.mT

    @property
    def after(self) -> Tensor:
        """P₊, the block that comes next, shape ``(m, b)``."""
        return self._next.mT

    @property
    def small(self) -> Tensor:
        """B, float64 on the CPU, shape ``(d, e)``."""
        return self._small

    @property
    def last(self) -> Tensor:
        """L, float64 on the CPU, shape ``(b, e)``."""
        width = self._small.shape[1] - self._last.shape[1]
        return torch.nn.functional.pad(self._last, (width, 0))

    @property
    def size(self) -> int:
        """d, the number of left vectors."""
        return len(self._left)

    @property
    def closed(self) -> bool:
        """Whether the next step would add nothing: both spaces are invariant."""
        return len(self._next) == 0

    @property
    def min_sigma_upper_bound(self) -> float:
        """The smallest ``‖A x‖`` for unit x in the span of Q: A's smallest value is no larger."""
        if self._small.shape[1] == 0:
            return 0.0
        return float(torch.linalg.svdvals(torch.cat([self._small, self.last]))[-1])

    def extend(self) -> None:
        """One step: a pass with Aᵀ and one with A.

        Raises:
            InputError: If one product is not the transpose of the other.
        """
        block = self._next
        old = len(self._left)
        self._left = torch.cat([self._left, block])
        image = self.map.rmatmat(block.mT).mT
        known, added, factor = self._split(image, self._right)
        self._require_equal(known, self.last)  # P₊ᵀA Q by either product
        self._right = torch.cat([self._right, added])
        self._small = torch.nn.functional.pad(self._small, (0, len(added), 0, len(block)))
        self._small[old:] = torch.cat([known, factor], dim=1)
        image = self.map.matmat(added.mT).mT
        coupling, self._next, factor = self._split(image, self._left)
        self._require_equal(coupling.mT, self._small[:, len(self._right) - len(added) :])
        self._last = factor.mT
        self.passes += 2
        self.work += step_work(self.map.shape, len(block), self.size)

    def _require_equal(self, one: Tensor, other: Tensor) -> None:
        """InputError unless two parts of B agree, one of each product."""
        difference = float(torch.linalg.vector_norm(one - other))
        if difference > DISAGREEMENT * self.noise:  # whatever the caller takes ‖A‖_F for
            require_agreement(self.map, difference, 0.0)

    def _split(self, rows: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``rows = known·basis + factor·added`` with ``added`` orthonormal, ⊥ basis."""
        known = rows @ basis.mT
        rest = rows - known @ basis
        # Twice is enough (Kahan-Parlett).
        more = rest @ basis.mT
        rest = rest - more @ basis
        X, R = torch.linalg.qr(rest.mT)  # (m, b), (b, b)
        small = exact(R).cpu()
        S, size = torch.linalg.svdvals(small), float(torch.linalg.vector_norm(rows))
        if len(S) and float(S[-1]) > max(LARGE * size, self.noise):
            factor = exact(rest) @ exact(X)
            return exact(known + more).cpu(), X.mT.contiguous(), factor.cpu()
        kept = self.noise / 2 < S  # half, because S is computed with rounding, too
        added = X @ torch.linalg.svd(small).U[:, kept].to(X)
        if len(basis):  # a small direction has lost orthogonality to the rounding of large ones
            added = added - basis.mT @ (basis @ added)
            added = torch.linalg.qr(added).Q
        factor = exact(rest) @ exact(added)
        return exact(known + more).cpu(), added.mT.contiguous(), factor.cpu()

    def ritz(self) -> Ritz:
        """The SVD of B."""
        X, S, Yt = torch.linalg.svd(self._small)
        width = max(self._small.shape)
        sigma = torch.nn.functional.pad(S, (0, width - len(S)))
        inner = Yt.mT[len(Yt) - self._last.shape[1] :]
        return Ritz(sigma, X, Yt.mT, self._last @ inner)
