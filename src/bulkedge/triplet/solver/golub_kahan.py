"""Block Golub–Kahan bidiagonalisation for the k leading singular triplets, without restarts.

Golub, Luk, Overton, ACM TOMS 7 (1981), doi:10.1145/355945.355946.  The cheapest method where a few
correct digits of well-separated triplets are asked for: a step costs two passes and one small SVD,
and the only large matrix that is factored is the block itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import FLAG, NOT_NEGATIVE, TOLERANCE, check_fields, optional, whole
from bulkedge._linmap import LinearMap
from bulkedge._precision import exact
from bulkedge.triplet._bidiagonal import Bidiagonalization, Ritz
from bulkedge.triplet._result import SingularTriplets, Status, neighbour_gaps
from bulkedge.triplet._rounding import (
    ROUNDING_PROBES,
    Rounding,
    measure_residuals,
    measure_rounding,
)
from bulkedge.triplet._unseen import Unseen

from ._start import Randomness, gaussian, start_parts, unforeseen
from .block_krylov import BlockKrylov

WATCHED_STEPS = 4
"""How fast residuals fall is judged after this many steps, by the last two of them."""
ASSUMED_NOISE = 4.0
"""The recurrences are assumed to err by this, in units of eps ‖A‖_F."""


@dataclass(frozen=True)
class GolubKahan:
    """Block Golub–Kahan bidiagonalisation with full reorthogonalisation.

    Cost: two passes over A a step, each with a block of at most ``k + oversample`` vectors; memory
    for ``max_steps`` blocks on either side.  Where ``max_steps`` are not enough, thick-restarted
    :class:`BlockKrylov` continues from there.

    Attributes:
        rtol: Stop when every residual is below ``rtol · σ₁``; None takes eps^¾ of the dtype.
        vector_tol: Stop for a triplet, too, when its residual is below ``vector_tol`` times its
            gap: its vectors are then known to that sine.
        max_steps: Steps before the basis is given up.
        oversample: Vectors carried beyond k.
        failure_probability: Go on until it is proved that no other triplet lies above the k-th, but
            for this probability over the random vectors; ``Status.UNPROVED`` where ``max_steps`` do
            not prove it.  It is that of one call: N calls are all right but for N times as much,
            and a call that is repeated until it proves something counts each time.  Without a
            ``generator`` the seed is a digest of the matrix.  The last gap then ends at a proved
            cut, and residuals and rounding are measured in float64, by two passes each.  Few
            vectors beyond k prove little: give it an ``oversample`` of 8.  None asks for no proof
            and judges by residuals alone, as every other iterative solver does.
        restart: Continue with :class:`BlockKrylov` where ``max_steps`` are not enough; False
            returns what there is, with ``Status.MAX_STEPS``.
        foresee: With ``restart=False``, return what there is as soon as the residuals fall too
            slowly for ``max_steps`` to be enough, even if they soon fall twice as fast.

    Example:
        >>> from bulkedge.triplet import singular_triplet
        >>> A = torch.diag(torch.linspace(3.0, 1.0, 9, dtype=torch.float64))
        >>> solver = GolubKahan(vector_tol=1e-3, failure_probability=1e-9)
        >>> found = singular_triplet(A, solver=solver)
        >>> round(found.sigma.item(), 6), found.status.name
        (3.0, 'CONVERGED')
    """

    rtol: float | None = None
    vector_tol: float = 0.0
    max_steps: int = 24
    oversample: int = 6
    failure_probability: float | None = None
    restart: bool = True
    foresee: bool = False

    def __post_init__(self) -> None:
        check_fields(
            self,
            rtol=optional(TOLERANCE),
            vector_tol=NOT_NEGATIVE,
            max_steps=whole(1),
            oversample=whole(0),
            failure_probability=optional(TOLERANCE),
            restart=FLAG,
            foresee=FLAG,
        )

    def compute(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness
    ) -> SingularTriplets:
        """The k leading triplets of A, m ≥ n, from ``start`` completed by a Gaussian block."""
        size = A.rounding_scale()
        if size == math.inf:
            raise InputError(
                f"expected factors of {A!r} whose norms float64 can hold, got larger ones; divide "
                "them by a large number"
            )
        if self.failure_probability is None:
            return self._search(A, k, start, generator, size)
        found = self._search(A, k, start, unforeseen(generator, A), size)
        residuals = measure_residuals(A, found, size).to(found.residuals)
        return replace(found, residuals=residuals, passes=found.passes + 2)

    def _search(
        self, A: LinearMap, k: int, start: Tensor | None, generator: Randomness, size: float
    ) -> SingularTriplets:
        """The same with the residuals of the recurrences; ``size`` is the map's rounding scale."""
        n = A.shape[1]
        guess, drawn = start_parts(A, min(k + self.oversample, n), start, generator)
        V = torch.linalg.qr(torch.cat([guess, drawn], dim=1)).Q
        process = Bidiagonalization(A.T, V, ASSUMED_NOISE * torch.finfo(A.dtype).eps * size)
        prover = _Prover(process, exact(drawn).cpu(), size, self.failure_probability, generator)
        excess: list[float] = []
        while True:
            process.extend()
            now = self._state(process, prover, k, n)
            excess.append(now.excess)
            last = process.closed or len(excess) == self.max_steps or self._hopeless(excess)
            if (now.converged and now.proved) or last:
                break
        short = len(now.sigma) < k  # a rank below k leaves vectors to be made up
        if (self.restart and not now.converged) or short:
            return self._go_on(A, k, process, now, generator)
        return _triplets(process, now, k)

    def _state(self, process: Bidiagonalization, prover: _Prover, k: int, n: int) -> _State:
        """Whether the k triplets have converged, and whether it is proved that they lead."""
        ritz = process.ritz()
        sigma, pairs = ritz.sigma[: len(ritz.residuals)], len(ritz.residuals)
        residuals = ritz.residuals[:k] + process.noise / ASSUMED_NOISE
        gaps = _gaps(sigma, ritz.residuals, k, complete=pairs == n)
        excess = self._excess(sigma, residuals, gaps, process)
        converged = process.closed or excess <= 1
        proved = self.failure_probability is None or pairs == n
        if converged and not proved:
            cut = prover.lowest_cut(ritz, k)
            proved = cut is not None
            if cut is not None and pairs >= k:  # what lies below the cut is not known
                gaps[-1] = min(float(gaps[-1]), max(float(sigma[k - 1]) - cut, 0.0))
                excess = self._excess(sigma, residuals, gaps, process)
                converged = process.closed or excess <= 1
        return _State(ritz, sigma, residuals, gaps, excess, converged, proved)

    def _hopeless(self, excess: list[float]) -> bool:
        """Whether residuals fall so slowly that the steps that are left will not be enough."""
        if self.restart or not self.foresee or len(excess) < WATCHED_STEPS:
            return False
        before, now = excess[-3], excess[-1]
        left = self.max_steps - len(excess)
        # at twice the pace of the last two steps, which took ``now / before`` off
        return now > 1 and now * (now / before) ** left > 1

    def _excess(
        self, sigma: Tensor, residuals: Tensor, gaps: Tensor, process: Bidiagonalization
    ) -> float:
        """The largest residual in units of its tolerance."""
        dtype = process.map.dtype
        rtol = torch.finfo(dtype).eps ** 0.75 if self.rtol is None else self.rtol
        enough = torch.maximum(rtol * sigma[:1], self.vector_tol * gaps - process.noise)
        within = residuals <= enough  # both may be 0
        over = torch.where(within, 1.0, residuals / enough.clamp_min(0.0))
        return float(over.max()) if len(over) else 1.0  # of a zero matrix there are none

    def _go_on(
        self,
        A: LinearMap,
        k: int,
        process: Bidiagonalization,
        now: _State,
        generator: Randomness,
    ) -> SingularTriplets:
        """Block Krylov iteration from the leading vectors of a space that was not enough."""
        v = _left_vectors(process, now)[:, : process.start_size]
        rest = BlockKrylov(rtol=self.rtol).compute(A, k, v, generator)
        steps, spent = process.passes // 2, process.passes + process.check_passes
        rest = replace(rest, steps=rest.steps + steps, passes=rest.passes + spent)
        unproved = rest.status is Status.CONVERGED and not now.proved
        return replace(rest, status=Status.UNPROVED) if unproved else rest


class _State(NamedTuple):
    """The triplets after a step: of the process of Aᵀ, so that left and right change places.

    Attributes:
        ritz: The Ritz vectors.
        sigma: All Ritz values that have a pair of vectors.
        residuals: Of the k leading ones.
        gaps: Of the k leading ones.
        excess: The largest residual in units of its tolerance; 1 where all are below.
        converged: Whether each residual is below its tolerance.
        proved: Whether no triplet above the k-th is missing, if a proof was asked for.
    """

    ritz: Ritz
    sigma: Tensor
    residuals: Tensor
    gaps: Tensor
    excess: float
    converged: bool
    proved: bool

    @property
    def status(self) -> Status:
        """How the search has ended, if it ends here."""
        if not self.converged:
            return Status.MAX_STEPS
        return Status.CONVERGED if self.proved else Status.UNPROVED


def _left_vectors(process: Bidiagonalization, now: _State) -> Tensor:
    """The left Ritz vectors, in the dtype of the matrix: right ones of A."""
    return process.left @ now.ritz.left[:, : len(now.sigma)].to(process.left)


def _triplets(process: Bidiagonalization, now: _State, k: int) -> SingularTriplets:
    """The k leading Ritz triplets."""
    right, v = process.right, _left_vectors(process, now)
    return SingularTriplets(
        now.sigma[:k].to(right),
        right @ now.ritz.right[:, :k].to(right),
        v[:, :k].clone(),
        now.residuals.to(right),
        now.gaps.to(right),
        steps=process.passes // 2,
        passes=process.passes + process.check_passes,
        status=now.status,
        near=(now.sigma[k:].to(right), v[:, k:]) if len(now.sigma) > k else None,
    )


@dataclass(frozen=True)
class _Prover:
    """Proves that no leading triplet was missed, by the random vectors of the start block."""

    process: Bidiagonalization
    probes: Tensor
    size: float
    failure_probability: float | None
    generator: Randomness

    def lowest_cut(self, ritz: Ritz, k: int) -> float | None:
        """See :meth:`Unseen.lowest_cut`, with the rounding of the process measured."""
        if self.failure_probability is None:
            return None
        # Measuring takes two passes: only if there were a cut with the rounding at its least.
        if self._unseen(ritz, self._least_rounding(ritz)).lowest_cut(k) is None:
            return None
        count = len(ritz.left) + len(ritz.right)
        drawn = gaussian(count, ROUNDING_PROBES, self.generator)
        measured = measure_rounding(self.process, ritz, drawn, self.failure_probability, self.size)
        return self._unseen(ritz, measured).lowest_cut(k)

    def _least_rounding(self, ritz: Ritz) -> Rounding:
        """No rounding in any Ritz vector, and orthonormal bases: a guess that is too good."""
        exact = torch.zeros(len(ritz.left), dtype=torch.float64)
        return Rounding(self.process.noise, exact)

    def _unseen(self, ritz: Ritz, rounding: Rounding) -> Unseen:
        probability = self.failure_probability or 0.0
        return Unseen.of(self.process, ritz, self.probes, self.size, probability, rounding)


def _gaps(sigma: Tensor, residuals: Tensor, k: int, *, complete: bool) -> Tensor:
    """Distances to the nearest neighbour, whatever Ritz values beyond the k-th may yet become."""
    # A Ritz value that has not converged may become any value up to its residual above it.
    highest = (sigma + residuals)[k:].clamp_max(min(sigma[:k].tolist(), default=0.0))
    below = highest.sort(descending=True).values
    return neighbour_gaps(torch.cat([sigma[:k], below]), k, complete=complete)
