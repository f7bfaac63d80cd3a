"""Whether a Krylov space may have missed a singular vector: its Gaussian start vectors know.

A Krylov space finds one vector of a cluster of nearly equal values at once, the one that its start
block points to; the others wait for the random vectors of that block.  Such a vector hides from the
residuals, yet it cannot hide from what the random vectors are made of.

Let P, Q, ``B = X S Yᵀ``, C = L Y be those of :class:`Bidiagonalization`, and G the Gaussian vectors
among its start block, ``G = P X T``.  Take d Ritz vectors with values between two cuts, and suppose
that there are d + 1 singular values of A or more.  Then some unit vector ``u = Σ α_i u_i`` in the
span of d + 1 neighbours is orthogonal to those Ritz vectors.  For each of its parts the recurrences
give ``⟨û_j, u_i⟩ = s_j C_jᵀ w_i / (σ_i² − s_j²)`` with ``w_i = P₊ᵀu_i``, hence

    Gᵀu = Σ_i α_i H(σ_i)ᵀ w_i,    H(σ) = Σ_j C_j T_jᵀ s_j / (σ² − s_j²)

over the other Ritz vectors j, and ``‖Gᵀu‖² ≤ (d + 1) · max ‖H(σ)‖²`` between the cuts: it falls as
fast as the space converges.  But G is Gaussian, and the smallest singular value of the
(d + 1) × p Gaussian matrix ``[u_i]ᵀG`` is hardly ever that small (Chen and Dongarra, SIAM J. Matrix
Anal. Appl. 27 (2005), doi:10.1137/040616413), of none of the runs of d + 1 neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ._bidiagonal import Bidiagonalization, Ritz
from ._rounding import UNIT, Rounding

TIED = 3
"""So many beyond the k-th may be equal to it."""
PARTS = (0.75, 0.5, 0.25, 0.0)
"""Where a cut below the k-th Ritz value is tried, in parts of its distance to the next."""
ROUNDS = 12
"""Of bisection at most: what is not decided then is not claimed."""
CELLS = 2048
"""Intervals looked at in one go at most: what bounds time and memory."""
WIDER = 1.03
"""From cell to cell beyond the largest Ritz value, in the distance from there."""
CLEAR = 1e-3
"""How far beyond the largest Ritz value the first of those cells begins."""


@dataclass(frozen=True)
class Unseen:
    """What may hide from a Krylov space.

    Attributes:
        ritz: Its Ritz vectors.
        inside: T, the Gaussian vectors' coordinates in the left ones, shape ``(d, p)``.
        outside: Norm of what rounding has left of them outside the space.
        rounding: How far the space is from exact recurrences and orthonormal bases.
        furthest: ‖A‖_F, or more.
        vectors: How many left singular vectors there are.
        missed: Probability, over the Gaussian vectors, that a statement is wrong.
    """

    ritz: Ritz
    inside: Tensor
    outside: float
    rounding: Rounding
    furthest: float
    vectors: int
    missed: float

    @classmethod
    def by(
        cls,
        process: Bidiagonalization,
        ritz: Ritz,
        probes: Tensor,
        furthest: float,
        missed: float,
        rounding: Rounding,
    ) -> Unseen:
        """What may hide from a process that began with the probes, among other vectors.

        Args:
            process: The space.
            ritz: Its Ritz vectors.
            probes: G, independent standard normal entries, float64, shape ``(m, p)``.
            furthest: ‖A‖_F, or more.
            missed: Probability, over the probes, that a statement may be wrong.
            rounding: How far the space is from exact recurrences and orthonormal bases.

        Returns:
            The evidence.
        """
        start = process.left[:, : process.started].double().cpu()
        inside = start.mT @ probes
        outside = float(torch.linalg.matrix_norm(probes - start @ inside))
        # the probes were rounded to the dtype
        outside += torch.finfo(process.left.dtype).eps * float(torch.linalg.matrix_norm(inside))
        T = ritz.left[: process.started].mT @ inside
        return cls(ritz, T, outside, rounding, furthest, len(probes), missed)

    def nothing(self, first: int, last: int, low: float, high: float) -> bool:
        """Whether the Ritz vectors ``first … last − 1`` are all that lies between two cuts.

        Args:
            first: The first of those with a value between the cuts.
            last: One past the last.
            low: The lower cut.
            high: The upper cut.

        Returns:
            True if A has no more singular values in ``[low, high]``; False says nothing.
        """
        limit = self._limit(last - first)
        high = min(high, self.furthest)
        if not limit > 0:
            return False
        others = torch.ones(len(self.ritz.left), dtype=torch.float64)
        others[first:last] = 0.0
        top = float(self.ritz.sigma[0])
        inner = min(high, max(low, (1 + CLEAR) * top))
        inside = torch.linspace(low, inner, 2 * (last - first) + 3, dtype=torch.float64)
        edges = torch.cat([inside[:-1], _widening(top, inner, high)])
        centre, radius = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
        for _ in range(ROUNDS):
            at, over = self._size(centre, radius, others)
            if bool((at > limit).any()):
                return False
            centre, radius = centre[over > limit], radius[over > limit] / 2
            if len(centre) == 0:
                return True
            if len(centre) > CELLS:
                return False
            centre, radius = torch.cat([centre - radius, centre + radius]), radius.repeat(2)
        return False

    def lowest_cut(self, k: int) -> float | None:
        """A number above which no singular value is missing among the leading Ritz values.

        Args:
            k: How many have to be above it.

        Returns:
            A cut below the k-th Ritz value, the lowest of a few that can be proved: as many
            singular values as Ritz values exceed it.  For a matrix of lower rank, one that rounding
            tells from zero.  None where nothing is proved.
        """
        values = self.ritz.sigma[: len(self.ritz.residuals)]
        s = torch.cat([values, values.new_zeros(1)])
        cuts = [[float(x)] for x in (s[:-1] + s[1:]) / 2]
        rank = min(k, len(cuts))
        below = [float(s[k - 1] - part * (s[k - 1] - s[k])) for part in PARTS] if rank == k else []
        cuts[rank - 1 : rank] = [below or [self._nought]]
        last, above = 0, float("inf")
        for i, lows in enumerate(cuts[: rank + TIED]):
            # one by one, but for those whose residuals fill the gap: these as a space
            low = next((x for x in lows if self.nothing(last, i + 1, x, above)), None)
            if low is not None:
                last, above = i + 1, low
            if last >= rank:
                return above
        return 0.0 if rank == 0 else None

    @cached_property
    def ceiling(self) -> float:
        """Beyond it there is no singular value."""
        limit = self._limit(0)
        top = float(self.ritz.sigma[0])
        edges = _widening(top, (1 + CLEAR) * top, self.furthest)
        if not limit > 0 or len(edges) < 2:
            return self.furthest
        centre, radius = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
        _, over = self._size(centre, radius, torch.ones(len(self.ritz.left)).double())
        failed = (over > limit).nonzero()
        return float(edges[int(failed[-1]) + 1 if len(failed) else 0])

    @property
    def _nought(self) -> float:
        """A value that rounding lets be told from zero."""
        size = float(torch.linalg.matrix_norm(self.inside))
        return 4 * self.rounding.noise * size / max(self._limit(1), torch.finfo(torch.float64).tiny)

    def _limit(self, found: int) -> float:
        """What ``max ‖H‖`` must stay below where so many Ritz vectors are known."""
        probes = self.inside.shape[1]
        least = least_square(found + 1, probes, self.missed / (self.vectors * max(probes, 1)))
        return math.sqrt(least / (found + 1)) / (1 + self.rounding.defect) - self.outside

    @cached_property
    def _weights(self) -> tuple[Tensor, Tensor]:
        """``(CᵀC) ∘ (TTᵀ)``, whose forms are the squares of ‖H‖ and its slopes; and ‖T_j‖²."""
        C, T = self.ritz.lacking[:, : len(self.inside)], self.inside
        C = torch.nn.functional.pad(C, (0, len(T) - C.shape[1]))
        return (C.mT @ C) * (T @ T.mT), T.square().sum(dim=1)

    def _size(self, centre: Tensor, radius: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """‖H‖_F, with what rounding adds, at the centres and at most on the cells."""
        K, T2 = self._weights
        c, r, s = centre[:, None], radius[:, None], self.ritz.sigma[: len(T2)]
        apart = (c - s) * (c + s)  # exact to rounding where they are close
        near = ((c - s).abs() - r).clamp_min(0.0)  # to the nearest point of the cell
        nearest = near * torch.where(c > s, c - r + s, c + r + s).abs()
        curve = s * (6 * (c + r).square() + 2 * s.square()) / nearest.pow(3)
        value, slope = s / apart, 2 * c * s / apart.square()
        own = K.diagonal().clamp_min(0.0).sqrt()
        kept, felt = others > 0, (others > 0) & (own > 0)
        value, slope = (x.masked_fill(~felt, 0.0) for x in (value, slope))
        curve = curve.masked_fill(~felt, 0.0) @ own
        size, steep = (self._root(K, own, x) for x in (value, slope))
        still = self._moved((c - s).abs().masked_fill(~kept, torch.inf))
        most = self._moved(near.masked_fill(~kept, torch.inf))
        at = (size + still).nan_to_num(nan=torch.inf)
        over = size + radius * steep + radius.square() / 2 * curve + most
        return at, over.nan_to_num(nan=torch.inf)

    def _moved(self, apart: Tensor) -> Tensor:
        """What the rounding of the recurrences adds, for Ritz values at these distances."""
        # each vector's own rounding where it is known, else what all of them have together
        T2 = self._weights[1]
        single = min(len(self.rounding.leading), len(T2))
        alone = (T2[:single].sqrt() * self.rounding.leading[:single]) / apart[:, :single]
        rest = (T2[single:] / apart[:, single:].square()).sum(dim=1).sqrt()
        return 2**0.5 * (alone.sum(dim=1) + self.rounding.noise * rest)

    @staticmethod
    def _root(K: Tensor, own: Tensor, x: Tensor) -> Tensor:
        """``√(xᵀ K x)`` for each row of x, with what float64 may lose where its terms cancel."""
        lost = 4 * len(own) * UNIT * (x.abs() @ own).square()
        return (((x @ K) * x).sum(dim=1).clamp_min(0.0) + lost).sqrt()


def least_square(rows: int, columns: int, probability: float) -> float:
    """What the smallest eigenvalue of ``Z Zᵀ`` exceeds but for a probability; Z is Gaussian.

    Args:
        rows: Of Z.
        columns: Of Z; with fewer than rows nothing is exceeded.
        probability: Of being wrong.

    Returns:
        t with ``P(λ_min ≤ t) ≤ L t^q / q ≤ probability``, ``q = (columns − rows + 1)/2``.
    """
    if columns < rows:
        return 0.0
    half = (columns - rows + 1) / 2
    log_l = (
        (columns - rows - 1) / 2 * math.log(2)
        + math.lgamma((columns + 1) / 2)
        - math.lgamma(rows / 2)
        - math.lgamma(columns - rows + 1)
    )
    return math.exp((math.log(probability * half) - log_l) / half)


def _widening(top: float, low: float, high: float) -> Tensor:
    """Edges of cells from low to high, in proportion to their distance from top, below low."""
    if not low < high:
        return torch.tensor([high], dtype=torch.float64)
    count = math.ceil(math.log((high - top) / (low - top)) / math.log(WIDER))
    steps = (low - top) * WIDER ** torch.arange(1, count, dtype=torch.float64)
    ends = torch.tensor([low, high], dtype=torch.float64)
    return torch.cat([ends[:1], top + steps, ends[1:]])
