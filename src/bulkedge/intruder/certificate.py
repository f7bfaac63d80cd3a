"""Scores of tuned vectors as rigorous intervals, without an SVD of the base.

A block Golub–Kahan process on W0, begun with the tuned vectors, gives two kinds of evidence, both
from the same small matrices:

* *from above*: no singular vector of W0, found or not, can have a larger component on y than the
  ellipsoid of :mod:`bulkedge.intruder._bound` leaves room for;
* *from below*: where Ritz vectors have converged, :mod:`bulkedge.intruder._converged` says how near
  they are to singular vectors, and y's components on those are known.

Steps are added until the verdict on every direction is the same at both ends of its interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import DEFAULT_EPSILON
from bulkedge._linmap import LinearMap, MatrixLike, Widened, as_map
from bulkedge._precision import full_precision
from bulkedge.triplet import Bidiagonalization, Ritz, Unseen
from bulkedge.triplet._rounding import CHECKS, Rounding, measure_rounding
from bulkedge.triplet.solver._start import Randomness, gaussian

from ._bound import Extent, largest
from ._converged import Heads, Space, find_spaces, guess_spectrum
from ._count import Factorisations
from .score import HALF_THE_ENERGY, Verdict

LOOKS = (3, 4, 5, 6, 8, 10, 12, 14, 16, 19, 22)
"""After how many steps the evidence is looked at: a look costs about as much as a step."""
ORTHONORMAL = 1e-3
"""How far Yᵀ Y may be from the identity; rounding in single precision leaves less."""
CEILING = 1.01
"""Multiple of what the largest singular value may be, beyond which there is proved to be none."""
MARGIN = 3.0
"""A cut is tried where the Ritz values leave so many times the rounding error of a count."""
HOPE = 0.7
"""A floor is tried up to this part of the smallest value that the space has seen."""
MISSED = 1e-9
"""Probability, over the probes, that a statement about a matrix is wrong."""
DEARER = 2
"""A factorisation costs about as much as ``min(m, n) / (DEARER · b)`` steps with a block of b."""
DROPPED = 4.0
"""Smaller directions are not added to the space, in units of eps ‖W0‖_F."""
EXPECTED = 16.0
"""To what the recurrences may hold, in the same units: for plans, not for proofs."""


@dataclass(frozen=True)
class Certificate:
    """What is known of k tuned vectors; every figure is in [0, 1], every tensor of shape ``(k,)``.

    Attributes:
        lower: The score is at least this.
        upper: The score is at most this.
        score: The best guess in between: the largest component on a Ritz vector.
        matched_index: The Ritz vector that has it, 0 for the largest value; −1 without one.
        overlap_lower: The overlap ``‖U_{2k}ᵀy‖`` is at least this.
        overlap_upper: The overlap is at most this.
        overlap: The best guess in between.
        verdicts: ``UNDECIDED`` where the ends of an interval disagree.
        cosines: Lower and upper bounds of the cosines of the principal angles between the tuned
            space and the base's leading one, descending.
        similarity: |cosine| of each vector with each of the leading base vectors, as far as they
            have converged, shape ``(k, 2k)``.
        base_sigma: Leading singular values of the base, as far as they have converged.
        spectrum: All singular values of the base, shape ``(min(m, n),)``: first those, then what
            the quadrature of the process makes of the rest.
        steps: Steps that were taken.
        passes: Products with W0 or its transpose.
    """

    lower: Tensor
    upper: Tensor
    score: Tensor
    matched_index: Tensor
    overlap_lower: Tensor
    overlap_upper: Tensor
    overlap: Tensor
    verdicts: tuple[Verdict, ...]
    cosines: tuple[Tensor, Tensor]
    similarity: Tensor
    base_sigma: Tensor
    spectrum: Tensor
    steps: int
    passes: int


def certify(
    W0: MatrixLike,
    Y: Tensor,
    *,
    epsilon: float = DEFAULT_EPSILON,
    errors: Tensor | None = None,
    groups: Tensor | None = None,
    subspace: int | None = None,
    frobenius: float | None = None,
    max_steps: int = 25,
    probes: int = 8,
    generator: torch.Generator | None = None,
) -> Certificate:
    """Bound the intruder score of tuned left singular vectors from both sides.

    Cost: two passes over W0 a step, each with a block of at most ``k + probes`` vectors; usually 5
    to 10 steps.

    Args:
        W0: The base, shape ``(m, n)``; for right vectors give the transpose.  One in half
            precision is widened to float32, a tile at a time.
        Y: Tuned left singular vectors, orthonormal columns, shape ``(m, k)``.
        epsilon: The paper's threshold.
        errors: Bound on ``sin ∠`` between each column and the true tuned vector, shape ``(k,)``;
            for tied ones, on that of their span.  Zero if None.
        groups: The number of the group of each direction, ascending from 0: vectors of one group
            are known as a space only, and bounded as such.  Each its own if None.
        subspace: How many leading base vectors span the space of the overlap; 2k if None.
        frobenius: ``‖W0‖_F`` if it is known; of a map whose products cancel, its
            ``rounding_scale()``.
        max_steps: Steps before the rest is left undecided.
        probes: Random vectors to start from beside Y: they find leading base vectors to which Y is
            orthogonal, and sample the spectrum.
        generator: Source of the probes; a fixed seed if None.

    Returns:
        The intervals and verdicts.

    Raises:
        InputError: If shapes do not fit, Y is not orthonormal, or the base is zero, not finite, or
            of a norm whose powers its dtype cannot hold.

    References:
        docs/certificate.md; the definition is Shuttleworth et al., arXiv:2410.21228.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> W0 = torch.randn(200, 150, generator=generator, dtype=torch.float64)
        >>> W0[0, 0] += 60.0
        >>> known = torch.linalg.svd(W0).U[:, :1]
        >>> certify(W0, known).verdicts[0].value
        'aligned'
    """
    if isinstance(W0, Tensor) and W0.dtype in (torch.float16, torch.bfloat16):
        W0 = Widened(W0, torch.float32)
    A, Y = as_map(W0), Y.detach()
    if Y.ndim != 2 or Y.shape[0] != A.shape[0] or Y.shape[1] == 0:
        raise InputError(f"expected vectors of shape ({A.shape[0]}, k ≥ 1), got {tuple(Y.shape)}")
    m, k = Y.shape
    defect = torch.linalg.matrix_norm(Y.mT.double() @ Y.double() - torch.eye(k).to(Y).double())
    if not float(defect) < ORTHONORMAL:
        raise InputError(
            f"expected orthonormal columns, got ‖YᵀY − I‖ = {float(defect):.2g}; give "
            "torch.linalg.qr(Y).Q"
        )
    size, limits = A.rounding_scale() if frobenius is None else frobenius, torch.finfo(A.dtype)
    if not limits.tiny**0.25 < size < limits.max**0.25:
        raise InputError(
            f"expected a base whose powers {limits.dtype} can hold, got one of norm {size:.3g}; "
            "scale it, or use scores() with an SVD"
        )
    count = max(min(probes, min(A.shape) - k), 0)
    random = generator or numpy.random.default_rng(0)
    drawn = gaussian(m, count, random)
    block = torch.cat([Y.to(A.device, A.dtype), drawn.to(A.device, A.dtype)], dim=1)
    unit = size * limits.eps
    known = torch.zeros(k, dtype=torch.float64) if errors is None else errors.double().cpu()
    with torch.no_grad(), full_precision(A.device):
        process = Bidiagonalization(A, torch.linalg.qr(block).Q, DROPPED * unit)
        judge = _Judge(
            epsilon=epsilon,
            known=known + _outside(Y, process.after) + float(defect),
            groups=torch.arange(k) if groups is None else groups.cpu(),
            subspace=2 * k if subspace is None else subspace,
            rounding=Rounding(EXPECTED * unit),
            frobenius=size,
            probes=drawn,
        )
        return _Search(A, process, judge, Y, max_steps, random).run()


def _outside(Y: Tensor, block: Tensor) -> Tensor:
    """How far each column is from the span of a block with orthonormal columns."""
    Y, block = Y.to(block.device).double(), block.double()
    return torch.linalg.vector_norm(Y - block @ (block.mT @ Y), dim=0).cpu()


class _Search:
    """Steps and looks, until every verdict is the same at both ends of its interval."""

    def __init__(
        self,
        A: LinearMap,
        process: Bidiagonalization,
        judge: _Judge,
        Y: Tensor,
        max_steps: int,
        generator: Randomness,
    ) -> None:
        self.process, self.judge, self.Y, self.max_steps = process, judge, Y, max_steps
        self.generator = generator
        self.factors = Factorisations(A, generator, MISSED)
        self.too_high = float("inf")
        self.hoped_at = max_steps
        self.patience = min(A.shape) // (DEARER * process.started)

    def run(self) -> Certificate:
        """The certificate."""
        step = 0
        while True:
            self.process.extend()
            step += 1
            last = self.process.closed or step == self.max_steps
            if not last and step not in LOOKS:
                continue
            found = self._look(step, last)
            if last or Verdict.UNDECIDED not in found.verdicts:
                return found

    def _look(self, step: int, last: bool) -> Certificate:
        """What is certain after a step, with a factorisation where one may settle more."""
        hopeful = dataclasses.replace(self.judge, hopeful=True)
        hoped, wanted = hopeful.look(self.process, self.Y, self._plausible())
        if wanted > 0 and self._raise_floor(wanted):
            hopeful = dataclasses.replace(self.judge, hopeful=True)
            hoped, _ = hopeful.look(self.process, self.Y)
        if Verdict.UNDECIDED in hoped.verdicts and not last:
            return hoped
        self.hoped_at = min(self.hoped_at, step)
        self._measure()
        found, _ = self.judge.look(self.process, self.Y)
        waited = step - self.hoped_at >= self.patience
        if (last or waited) and _open(found) > _open(hoped):
            self._count()
            found, _ = self.judge.look(self.process, self.Y)
        return found

    def _measure(self) -> None:
        """What rounding has done to the space as it is now: all intervals are to hold with it."""
        count = self.process.left.shape[1] + self.process.right.shape[1]
        drawn = gaussian(count, CHECKS, self.generator)
        rounding = measure_rounding(
            self.process, self.process.ritz(), drawn, MISSED, self.judge.frobenius
        )
        self.judge = dataclasses.replace(self.judge, rounding=rounding)

    def _plausible(self) -> float:
        """Below what x a floor may hold, by what is known so far."""
        if not self.factors.tall:
            return 0.0
        return HOPE * min(self.process.least, self.too_high)

    def _raise_floor(self, x: float) -> bool:
        """Whether every singular value is certain to exceed x."""
        # A vector outside the range of a tall W0 is seen by W0ᵀ as one on a tiny singular value
        # would be, and no product can tell them apart.
        holds = self.factors.all_exceed(x)
        if holds:
            self.judge = dataclasses.replace(self.judge, floor=x)
        else:
            self.too_high = x
        return holds

    def _count(self) -> None:
        """Prove how many singular values lie above a cut: the lowest one that can be."""
        ritz = self.process.ritz()
        values = (ritz.sigma[: len(ritz.residuals)] + self.judge.noise).square()
        cuts = [
            (space.last, space.low)
            for space in self.judge.likely(ritz)
            if _apart(values, space.last, space.low**2) > MARGIN * self.factors.rounding
        ]
        ceiling = (0, CEILING * self.judge.top(ritz))
        for count, x in [*reversed(cuts[-2:]), ceiling]:
            if self.factors.at_most(count, x, self.process, ritz):
                counted = (*self.judge.counted, (count, x))
                self.judge = dataclasses.replace(self.judge, counted=counted)
                return


def _open(found: Certificate) -> int:
    """How many verdicts are."""
    return found.verdicts.count(Verdict.UNDECIDED)


def _apart(squares: Tensor, count: int, x2: float) -> float:
    """How far x² is from the squares of the values above and below it."""
    below = float(squares[count]) if count < len(squares) else 0.0
    return min(float(squares[count - 1]) - x2, x2 - below)


@dataclass(frozen=True)
class _Judge:
    """What a Krylov space says of the directions."""

    epsilon: float
    known: Tensor
    groups: Tensor
    subspace: int
    rounding: Rounding
    frobenius: float
    probes: Tensor
    floor: float = 0.0
    counted: tuple[tuple[int, float], ...] = ()
    hopeful: bool = False

    @property
    def noise(self) -> float:
        """To what the recurrences hold."""
        return self.rounding.noise

    @property
    def errors(self) -> Tensor:
        """Bound on ``sin ∠`` between each direction and what is judged."""
        return self.known + self.rounding.defect

    def look(
        self, process: Bidiagonalization, Y: Tensor, plausible: float = 0.0
    ) -> tuple[Certificate, float]:
        """All intervals as they are after the last step; and what floor would settle more of them.

        Args:
            process: The space.
            Y: The directions.
            plausible: The highest floor worth asking for.

        Returns:
            The certificate, and a floor, 0 if none would help.
        """
        ritz = process.ritz()
        unseen = Unseen.by(process, ritz, self.probes, self.frobenius, MISSED, self.rounding)
        coordinates = ritz.left.mT @ (process.left.mT.double() @ Y.double()).cpu()
        everything = process.closed and min(process.map.shape) == len(ritz.residuals)
        heads = self._heads(unseen, everything)
        extent = Extent(ritz, coordinates, self.noise)
        count = int(self.groups[-1]) + 1
        low, high = self._from_heads(heads, coordinates)
        error = torch.zeros(count, dtype=torch.float64)
        error = error.scatter_reduce(0, self.groups, _chord(self.errors), "amax")
        aligned = low - error >= self.epsilon
        limits = (self.epsilon - error).clamp_min(0.0).square().masked_fill(aligned, torch.inf)
        top = float(ritz.sigma[0]) + float(ritz.residuals.max()) + self.noise
        bound, where = largest(extent, self.groups, limits, (self.floor, top, self.frobenius))
        wanted = max((x for x in where.tolist() if x <= plausible), default=0.0)
        if wanted > 0:
            above, _ = largest(extent, self.groups, limits, (wanted, top, self.frobenius))
            wanted = wanted if bool((above.isfinite() & ~bound.isfinite()).any()) else 0.0
        high = torch.where(aligned | ~bound.isfinite(), high, torch.minimum(high, bound.sqrt()))
        return self._result(process, extent, heads, (low - error, high + error)), wanted

    def likely(self, ritz: Ritz) -> list[Space]:
        """The leading spaces that are whole unless the probes have missed one so far."""
        return Heads(find_spaces(ritz, self.rounding), [], self.probes.shape[1], 0.0).likely

    def top(self, ritz: Ritz) -> float:
        """What the largest singular value may be, as far as it was seen."""
        return float((ritz.sigma[: len(ritz.residuals)] + ritz.residuals).max()) + self.noise

    def _heads(self, unseen: Unseen, everything: bool) -> Heads:
        """The leading Ritz vectors, and which of their spaces are known to be whole."""
        ritz = unseen.ritz
        spaces, probes = find_spaces(ritz, self.rounding), self.probes.shape[1]
        if everything or self.hopeful:
            likely = spaces if everything else self.likely(ritz)
            whole = [space in likely for space in spaces]
            return Heads(spaces, whole, probes, self.top(ritz))
        # of no more than so many values beyond x all are found, and each space has its own
        proved = max(
            (s.last for s in spaces for n, x in self.counted if s.last == n and s.low >= x),
            default=0,
        )
        whole = [s.last <= proved or unseen.nothing(s.first, s.last, s.low, s.high) for s in spaces]
        ceiling = min((x for n, x in self.counted if n == 0), default=self.frobenius)
        return Heads(spaces, whole, probes, min(ceiling, unseen.ceiling))

    def _result(
        self,
        process: Bidiagonalization,
        extent: Extent,
        heads: Heads,
        ends: tuple[Tensor, Tensor],
    ) -> Certificate:
        """Put the figures of groups to their members."""
        t, chord = extent.directions, _chord(self.errors)
        lower, upper = (end.clamp(0.0, 1.0)[self.groups] for end in ends)
        o_lower, o_upper = (end[self.groups] for end in self._overlap(extent, heads))
        o_lower, o_upper = (o_lower - chord).clamp_min(0.0), (o_upper + chord).clamp_max(1.0)
        best, index = t[: len(extent.ritz.residuals)].abs().max(dim=0)
        overlap = torch.linalg.vector_norm(t[: self.subspace], dim=0)
        verdicts = tuple(
            _verdict(self.epsilon, *ends)
            for ends in zip(*(x.tolist() for x in (lower, upper, o_lower, o_upper)), strict=True)
        )
        known = max((space.last for space in (*heads.likely, *heads.leading)), default=0)
        return Certificate(
            lower=lower,
            upper=upper,
            score=torch.minimum(torch.maximum(best, lower), upper),
            matched_index=index,
            overlap_lower=o_lower,
            overlap_upper=o_upper,
            overlap=torch.minimum(torch.maximum(overlap, o_lower), o_upper),
            verdicts=verdicts,
            cosines=self._cosines(extent, heads),
            similarity=t[: self.subspace].abs().mT,
            base_sigma=extent.ritz.sigma[:known],
            spectrum=guess_spectrum(
                extent.ritz, known, process.map.shape, t.shape[1], process.started, self.frobenius
            ),
            steps=process.passes // 2,
            passes=process.passes + process.checks,
        )

    def _from_heads(self, heads: Heads, t: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds on the score of any unit vector in the span of a group, by converged vectors."""
        count = int(self.groups[-1]) + 1
        lower, atom, known = torch.zeros(3, count, dtype=torch.float64)
        for space, whole in zip(heads.spaces, heads.whole, strict=True):
            least = self._extremes(t[space.first : space.last])[0] - space.error
            least = least.clamp_min(0.0)
            if whole:
                lower = torch.maximum(lower, least / (space.last - space.first) ** 0.5)
            atom = torch.maximum(atom, least.square())
            known += least.square()
        # a base vector of one space has nothing of what lies in the others
        return lower, (1 - known + atom).clamp(0.0, 1.0).sqrt()

    def _extremes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest norm that ``rows`` give to a unit vector of each group."""
        sizes = torch.bincount(self.groups)
        norms = torch.linalg.vector_norm(rows, dim=0)
        least = most = norms[sizes.cumsum(0) - 1]
        for g in (sizes > 1).nonzero().flatten().tolist():
            values = torch.linalg.svdvals(rows[:, self.groups == g])
            least, most = least.clone(), most.clone()
            most[g] = values[0] if len(values) else 0.0
            least[g] = values[-1] if len(rows) >= int(sizes[g]) else 0.0
        return least, most

    def _cuts(self, extent: Extent, heads: Heads) -> Iterator[tuple[int, float, Tensor]]:
        """Leading spaces of the base: size, error, and a bound on what the next values hold.

        Yields:
            The size of the space, its error, and a form on the directions that bounds from above
            what is missing up to the 2k-th value.
        """
        t, sigma = extent.directions, extent.ritz.sigma
        pairs = len(extent.ritz.residuals)
        below = float(sigma[self.subspace - 1]) if self.subspace <= pairs else 0.0
        nothing = t.new_zeros(t.shape[1], t.shape[1])
        before = max((s.last for s in heads.leading if s.last <= self.subspace), default=0)
        cuts = [(0, 0.0, heads.ceiling), *((s.last, s.total, s.low) for s in heads.leading)]
        for end, error, reach in cuts:
            if end >= self.subspace:
                yield end, error, nothing
            elif end == before:  # the others say less
                # of orthonormal bases; the computed ones are nearly so (Cauchy's interlacing)
                slack = self.noise + 2 * self.rounding.defect * float(sigma[0])
                low, high = below - slack, reach + slack
                # of a wide interval the parts may bound less than the whole
                for parts in (1, 2, 4):
                    radius = (high - low) / 2 / parts
                    centres = [low + (2 * i + 1) * radius for i in range(parts)]
                    forms = [extent.form(centre, radius) for centre in centres]
                    yield end, error, sum(forms, start=nothing)

    def _overlap(self, extent: Extent, heads: Heads) -> tuple[Tensor, Tensor]:
        """Bounds on ``‖U_{2k}ᵀy‖`` for the vectors of each group."""
        t, count = extent.directions, int(self.groups[-1]) + 1
        lower = torch.zeros(count, dtype=torch.float64)
        upper = torch.ones(count, dtype=torch.float64)
        for end, error, rest in self._cuts(extent, heads):
            least, most = self._extremes(t[:end])
            if end <= self.subspace:
                lower = torch.maximum(lower, least - error)
            more = torch.zeros_like(upper).index_add_(0, self.groups, rest.diagonal())
            upper = torch.minimum(upper, ((most + error).square() + more).sqrt())
        return lower.clamp(0.0, 1.0), upper.clamp(0.0, 1.0)

    def _cosines(self, extent: Extent, heads: Heads) -> tuple[Tensor, Tensor]:
        """Bounds on the cosines of the principal angles with the base's leading space."""
        t = extent.directions
        k = t.shape[1]
        lower, upper = torch.zeros(k, dtype=torch.float64), torch.ones(k, dtype=torch.float64)
        # a space that is wrong by sine δ moves every cosine by at most that
        own = float(torch.linalg.vector_norm(_chord(self.errors)).clamp_max(1.0))
        for end, error, rest in self._cuts(extent, heads):
            values = torch.linalg.svdvals(t[:end])
            values = torch.nn.functional.pad(values, (0, k - len(values)))
            if end <= self.subspace:
                lower = torch.maximum(lower, values - error - own)
            whole = torch.linalg.eigvalsh(t[:end].mT @ t[:end] + rest).flip(0).clamp_min(0.0)
            upper = torch.minimum(upper, whole.sqrt() + error + own)
        return lower.clamp(0.0, 1.0), upper.clamp(0.0, 1.0)


def _verdict(
    epsilon: float, lower: float, upper: float, overlap_lower: float, overlap_upper: float
) -> Verdict:
    """The verdict that holds in the whole of both intervals."""
    if lower >= epsilon:
        return Verdict.ALIGNED
    if upper < epsilon and overlap_lower >= HALF_THE_ENERGY:
        return Verdict.ROTATED
    if upper < epsilon and overlap_upper < HALF_THE_ENERGY:
        return Verdict.INTRUDER
    return Verdict.UNDECIDED


def _chord(sine: Tensor) -> Tensor:
    """``2 sin(θ/2)``: how far two unit vectors at that angle are apart."""
    return 2 * torch.sin(torch.asin(sine.clamp(0.0, 1.0)) / 2)
