"""Whether a Krylov space may have missed a singular vector: what its Gaussian start vectors prove.

Of a cluster of nearly equal values a Krylov space finds one vector at once, the one that its start
block points to.  It finds the others only as far as the random vectors of that block have a part in
them.
A vector that was missed does not show in the residuals.  It has a component on the random vectors,
though, and that component can be bounded.

Let P, Q, ``B = X S Yᵀ``, C = L Y be those of :class:`Bidiagonalization`, and G the Gaussian vectors
among its start block, ``G = P X T``.  Take d Ritz vectors with values between two cuts, and suppose
that there are d + 1 singular values of A or more.  Then some unit vector ``u = Σ α_i u_i`` in the
span of d + 1 neighbours is orthogonal to those Ritz vectors.  For each of its parts the recurrences
give ``⟨û_j, u_i⟩ = s_j C_jᵀ w_i / (σ_i² − s_j²)`` with ``w_i = P₊ᵀu_i``, hence

    Gᵀu = Σ_i α_i H(σ_i)ᵀ w_i,    H(σ) = Σ_j C_j T_jᵀ s_j / (σ² − s_j²)

over the other Ritz vectors j, and ``‖Gᵀu‖² ≤ (d + 1) · max ‖H(σ)‖²`` between the cuts, which falls
as fast as the space converges.  But G is Gaussian.  The smallest singular value of the
(d + 1) × p Gaussian matrix ``[u_i]ᵀG`` is that small with a tiny probability only (Chen and
Dongarra, SIAM J. Matrix Anal. Appl. 27 (2005), doi:10.1137/040616413), for all runs of d + 1
neighbours together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from bulkedge._precision import exact

from ._bidiagonal import Bidiagonalization, Ritz
from ._rounding import UNIT, Rounding

VALUES_BEYOND_K = 3
"""The search for a cut goes this many values beyond the k-th, as these may be equal to it."""
CUT_POSITIONS = (0.75, 0.5, 0.25, 0.0)
"""A cut below the k-th Ritz value is tried at these parts of its distance to the next one."""
MAX_BISECTIONS = 12
"""After this many rounds of bisection nothing is claimed."""
MAX_CELLS = 2048
"""With more cells than this nothing is claimed, which bounds time and memory."""
CELL_GROWTH = 1.03
"""Beyond the largest Ritz value s, a cell from ``s + t`` on ends at ``s + CELL_GROWTH t``."""
FIRST_CELL = 1e-3
"""The first of those cells begins at ``s + FIRST_CELL s``."""


class Between(NamedTuple):
    """Ritz vectors and the cuts around them: see :meth:`Unseen.nothing_missed`."""

    first: int
    end: int
    low: float
    high: float


@dataclass(frozen=True)
class Unseen:
    """What may hide from a Krylov space.

    Attributes:
        ritz: Its Ritz vectors.
        coordinates: T, those of the Gaussian vectors in the left Ritz vectors, shape ``(d, p)``.
        outside: Norm of the part of them that rounding has put outside the space.
        rounding: How far the space is from exact recurrences and orthonormal bases.
        frobenius: ‖A‖_F, or more.
        dimension: m, the number of left singular vectors.
        failure_probability: Probability, over the Gaussian vectors, that any statement about this
            space is wrong: the shares of all runs of neighbours add up to it.
    """

    ritz: Ritz
    coordinates: Tensor
    outside: float
    rounding: Rounding
    frobenius: float
    dimension: int
    failure_probability: float

    @classmethod
    def of(
        cls,
        process: Bidiagonalization,
        ritz: Ritz,
        probes: Tensor,
        frobenius: float,
        failure_probability: float,
        rounding: Rounding,
    ) -> Unseen:
        """What may hide from a process that began with the probes, among other vectors.

        Args:
            process: The space.
            ritz: Its Ritz vectors.
            probes: G, independent standard normal entries, float64, shape ``(m, p)``.
            frobenius: ‖A‖_F, or more.
            failure_probability: Probability, over the probes, that a statement may be wrong.
            rounding: How far the space is from exact recurrences and orthonormal bases.

        Returns:
            The evidence.
        """
        start = exact(process.left[:, : process.start_size]).cpu()
        inside = start.mT @ probes
        outside = float(torch.linalg.matrix_norm(probes - start @ inside))
        # The start block was orthonormalised from probes that were rounded to the dtype.
        outside += torch.finfo(process.left.dtype).eps * float(torch.linalg.matrix_norm(inside))
        T = ritz.left[: process.start_size].mT @ inside
        return cls(ritz, T, outside, rounding, frobenius, len(probes), failure_probability)

    def nothing_missed(self, first: int, end: int, low: float, high: float) -> bool:
        """Whether the Ritz vectors ``first … end − 1`` are all that lies between two cuts.

        Args:
            first: The index of the first of those with a value between the cuts.
            end: One past the index of the last.
            low: The lower cut.
            high: The upper cut.

        Returns:
            True if it is proved that A has no more singular values in ``[low, high]``.
        """
        return self.nothing_missed_each([Between(first, end, low, high)])[0]

    def nothing_missed_each(self, parts: Sequence[Between]) -> list[bool]:
        """:meth:`nothing_missed` of several parts of the spectrum, whose cells go side by side.

        Args:
            parts: Ritz vectors and the cuts around them.

        Returns:
            Whether it is proved, of each.
        """
        by_size = {size: self._limit(size) for size in {part.end - part.first for part in parts}}
        limits = torch.tensor([by_size[p.end - p.first] for p in parts], dtype=torch.float64)
        open_ = limits > 0
        if not bool(open_.any()):
            return open_.tolist()
        index = torch.arange(len(self.ritz.left))
        first, end = torch.tensor([part[:2] for part in parts]).unbind(dim=1)
        others = (index < first[:, None]) | (index >= end[:, None])
        owner, centre, radius = self._cells_of(parts, open_.nonzero().flatten().tolist())
        for _ in range(MAX_BISECTIONS):
            at_centre, on_cell = self._norm_bounds(centre, radius, others[owner])
            open_[owner[at_centre > limits[owner]]] = False
            pending = (on_cell > limits[owner]) & open_[owner]
            owner, centre, radius = owner[pending], centre[pending], radius[pending] / 2
            many = torch.bincount(owner, minlength=len(parts)) > MAX_CELLS
            open_ &= ~many
            if len(owner) == 0:
                return open_.tolist()
            owner, radius = owner.repeat(2), radius.repeat(2)
            step = radius[: len(centre)]
            centre = torch.cat([centre - step, centre + step])
        open_[owner] = False
        return open_.tolist()

    def _cells_of(self, parts: Sequence[Between], which: list[int]) -> tuple[Tensor, ...]:
        """The first cells of some parts: to which part each belongs, its centre and radius."""
        cells = []
        for i in which:
            part = parts[i]
            high = min(part.high, self.frobenius)
            cells.append(self._cells(2 * (part.end - part.first) + 3, part.low, high))
        owner = numpy.repeat(which, [len(centre) for centre, _ in cells])
        columns = (owner, *(numpy.concatenate(column) for column in zip(*cells, strict=True)))
        return tuple(map(torch.from_numpy, columns))

    def _cells(self, count: int, low: float, high: float) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Centres and radii of cells: equal ones as far as Ritz values reach, then growing."""
        top = float(self.ritz.sigma[0])
        inner = min(high, max(low, (1 + FIRST_CELL) * top))
        edges = numpy.linspace(low, inner, count)  # a few numbers, for which NumPy is quicker
        if inner < high:
            edges = numpy.concatenate([edges[:-1], _growing_edges(top, inner, high)])
        return (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2

    def lowest_cut(self, k: int) -> float | None:
        """A number above which no singular value is missing among the leading Ritz values.

        Args:
            k: How many have to be above it.

        Returns:
            A cut below the k-th Ritz value that as many singular values as Ritz values exceed: the
            lowest that can be proved of a few that are tried.  For a matrix of lower rank, a cut
            that is above zero beyond rounding.  None where nothing is proved.
        """
        values = self.ritz.sigma[: len(self.ritz.residuals)]
        s = torch.cat([values, values.new_zeros(1)])
        between = [[x] for x in ((s[:-1] + s[1:]) / 2).tolist()]
        rank = min(k, len(values))
        lowest = [self._zero_threshold]
        if rank == k:
            last, following = s[k - 1 : k + 1].tolist()
            lowest = [last - part * (last - following) for part in CUT_POSITIONS]
        choices = [*between[: max(rank - 1, 0)], lowest, *between[rank:]]
        firsts = [float("inf"), *(cuts[0] for cuts in choices[:rank])]
        likely = [Between(i, i + 1, firsts[i + 1], firsts[i]) for i in range(rank)]
        known = dict(zip(likely, self.nothing_missed_each(likely), strict=True)) if likely else {}
        end, above = 0, float("inf")
        for i, cuts in enumerate(choices[: rank + VALUES_BEYOND_K]):
            # Where no cut above the next value can be proved, the two are taken as one cluster.
            cut = next((x for x in cuts if self._known(known, Between(end, i + 1, x, above))), None)
            if cut is not None:
                end, above = i + 1, cut
            if end >= rank:
                return above
        return None

    def _known(self, known: dict[Between, bool], part: Between) -> bool:
        """:meth:`nothing_missed`, from what is known already."""
        return known[part] if part in known else self.nothing_missed(*part)

    @cached_property
    def norm_bound(self) -> float:
        """A number beyond which there is no singular value."""
        limit = self._limit(0)
        top = float(self.ritz.sigma[0])
        edges = torch.from_numpy(_growing_edges(top, (1 + FIRST_CELL) * top, self.frobenius))
        if not limit > 0 or len(edges) < 2:
            return self.frobenius
        centre, radius = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
        everything = torch.ones(len(self.ritz.left), dtype=torch.float64)
        _, on_cell = self._norm_bounds(centre, radius, everything)
        failed = (on_cell > limit).nonzero()
        return float(edges[int(failed[-1]) + 1 if len(failed) else 0])

    @property
    def _zero_threshold(self) -> float:
        """A singular value above this is not zero, whatever rounding has done."""
        size = float(torch.linalg.matrix_norm(self.coordinates))
        tiny = torch.finfo(torch.float64).tiny
        return 4 * self.rounding.noise * size / max(self._limit(1), tiny)

    def _limit(self, known: int) -> float:
        """What ``max ‖H‖`` must stay below where this many Ritz vectors are known."""
        probes = self.coordinates.shape[1]
        probability = self.failure_probability / (self.dimension * max(probes, 1))
        smallest = smallest_eigenvalue_bound(known + 1, probes, probability)
        return math.sqrt(smallest / (known + 1)) / (1 + self.rounding.defect) - self.outside

    @cached_property
    def _weights(self) -> tuple[Tensor, Tensor]:
        """``(CᵀC) ∘ (TTᵀ)``, whose forms are the squares of ‖H‖ and its slopes; and ‖T_j‖²."""
        C, T = self.ritz.lacking[:, : len(self.coordinates)], self.coordinates
        C = torch.nn.functional.pad(C, (0, len(T) - C.shape[1]))
        return (C.mT @ C) * (T @ T.mT), T.square().sum(dim=1)

    def _norm_bounds(self, centre: Tensor, radius: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds on ‖H‖_F, with what rounding adds, at the centres and on the whole cells."""
        K, T2 = self._weights
        c, r, s = centre[:, None], radius[:, None], self.ritz.sigma[: len(T2)]
        apart = (c - s) * (c + s)  # exact to rounding where they are close
        distance = ((c - s).abs() - r).clamp_min(0.0)  # to the nearest point of the cell
        nearest = distance * torch.where(c > s, c - r + s, c + r + s).abs()
        curvature = s * (6 * (c + r).square() + 2 * s.square()) / nearest.pow(3)
        value, slope = s / apart, 2 * c * s / apart.square()
        norms = K.diagonal().clamp_min(0.0).sqrt()
        counted = others > 0
        contributes = counted & (norms > 0)
        value, slope = (x.masked_fill(~contributes, 0.0) for x in (value, slope))
        curvature = curvature.masked_fill(~contributes, 0.0) @ norms
        size, steepness = (self._root_of_form(K, norms, x) for x in (value, slope))
        noise_at_centre = self._noise((c - s).abs().masked_fill(~counted, torch.inf))
        noise_on_cell = self._noise(distance.masked_fill(~counted, torch.inf))
        at_centre = size + noise_at_centre
        on_cell = size + radius * steepness + radius.square() / 2 * curvature + noise_on_cell
        return at_centre.nan_to_num(nan=torch.inf), on_cell.nan_to_num(nan=torch.inf)

    def _noise(self, distance: Tensor) -> Tensor:
        """What the rounding of the recurrences adds, for Ritz values at these distances."""
        # Each vector's own rounding where it was measured, else the bound that holds for all.
        T2 = self._weights[1]
        single = min(len(self.rounding.leading), len(T2))
        alone = (T2[:single].sqrt() * self.rounding.leading[:single]) / distance[:, :single]
        rest = (T2[single:] / distance[:, single:].square()).sum(dim=1).sqrt()
        return 2**0.5 * (alone.sum(dim=1) + self.rounding.noise * rest)

    @staticmethod
    def _root_of_form(K: Tensor, norms: Tensor, x: Tensor) -> Tensor:
        """``√(xᵀ K x)`` for each row of x, with what float64 may lose where its terms cancel."""
        lost = 4 * len(norms) * UNIT * (x.abs() @ norms).square()
        return (((x @ K) * x).sum(dim=1).clamp_min(0.0) + lost).sqrt()


def smallest_eigenvalue_bound(rows: int, columns: int, probability: float) -> float:
    """A number that the smallest eigenvalue of ``Z Zᵀ``, Z Gaussian, very probably exceeds.

    Args:
        rows: Rows of Z.
        columns: Columns of Z; with fewer columns than rows the bound is 0.
        probability: The probability that the eigenvalue is smaller.

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


def _growing_edges(top: float, low: float, high: float) -> numpy.ndarray:
    """Edges of cells from low to high that grow with their distance from top, which is below."""
    if not top < low < high:  # top may be 0, or too small for a number just above it
        return numpy.array([high])
    count = math.ceil(math.log((high - top) / (low - top)) / math.log(CELL_GROWTH))
    steps = (low - top) * CELL_GROWTH ** numpy.arange(1, count)
    return numpy.concatenate([[low], top + steps, [high]])
