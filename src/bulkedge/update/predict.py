"""What an update will do to a base, from the base's singular values alone.

The vectors of the update are assumed isotropic, that is, independent of the base.  Then each of its
spikes θ meets the bulk as in :mod:`bulkedge.rmt`.  The outlier's vector û satisfies exactly

    ⟨u_i, û⟩ = θ (ρ ⟨u_i, u⟩⟨v, v̂⟩ + s_i ⟨v_i, v⟩⟨u, û⟩) / (ρ² − s_i²)                  (left side)

on every base vector u_i, those of the null space (s = 0) included, and ⟨u_i, u⟩, ⟨v_i, v⟩ are
independent Gaussians of variance 1/m, 1/n.  So its squared components are x_i² w_i / Σ_j x_j² w_j
with standard Gaussians x and weights

    w_i ∝ (ρ² β_v/m + s_i² β_u/n) / (ρ² − s_i²)²,     Σ w_i = 1,

β_u, β_v the overlaps.  (On the right m and n, β_u and β_v change places.)  The chance that none
reaches ε², the paper's criterion, is that of |x_i| < t √((1 − w_i)/w_i) for all i with
t = ε/√(1 − ε²), once the rest of the sum is taken for its mean: a product of error functions.

The base's own outliers are no part of the bulk: beside one of them, two vectors mix and two values
repel, which no formula for a single spike has.  So the chance that the layer has a new direction
*among the k leading* is counted over draws of all the update's vectors (``_reduced.py``).  Where
these are known :func:`~bulkedge.update.aligned_scale` uses them; ``Secular`` is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import DEFAULT_EPSILON, renamed
from bulkedge.rmt import BulkFit, Spike, fit_bulk
from bulkedge.rmt._arrays import Array, count, enter_real, real

from ._median import median_score
from ._reduced import drawn
from ._scan import generic_strength
from ._update_svd import require_real, update_svd

DRAWS = 64
"""The chance of a layer is counted over this many draws: its error is 0.06 at most."""
STRONG = 1e6
"""From this many norms of the base on, an update has the leading directions to itself."""


class Expectation(str, Enum):
    """The expected effect of a spike of the update."""

    ABSORBED = "absorbed"
    """Below the threshold: it makes no outlier."""
    ALIGNED = "aligned"
    """It makes an outlier, whose vector some base vector probably matches."""
    INTRUDER = "intruder"
    """It makes an outlier that is probably new: no base vector reaches ε."""


@dataclass(frozen=True)
class BaseSpectrum:
    """The singular values of a base and their bulk.

    Attributes:
        values: All of them, descending, float64, shape ``(min(m, n),)``.
        fit: Bulk, edge and spikes.
    """

    values: Tensor
    fit: BulkFit

    @classmethod
    @renamed(level="significance")
    def of(cls, W0: Tensor, *, significance: float = 0.05) -> BaseSpectrum:
        """Measure a base.

        Cost: one ``svdvals`` in float64.

        Args:
            W0: Shape ``(m, n)``, at least 12 on either side.
            significance: See :func:`bulkedge.rmt.fit_bulk`.

        Returns:
            Its spectrum.

        Raises:
            InputError: If it is not a real finite matrix, or has no bulk.

        Example:
            >>> W0 = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
            >>> BaseSpectrum.of(W0).shape
            (60, 40)
        """
        if W0.ndim != 2:
            raise InputError(f"expected a matrix, got shape {tuple(W0.shape)}")
        values = torch.linalg.svdvals(require_real("W0", W0))
        return cls.from_values(values, (W0.shape[0], W0.shape[1]), significance=significance)

    @classmethod
    @renamed(level="significance")
    def from_values(
        cls,
        values: Array,
        shape: tuple[int, int],
        *,
        significance: float = 0.05,
        exact: int | None = None,
    ) -> BaseSpectrum:
        """The same from singular values that are known already; see :meth:`of`, ``fit_bulk``."""
        fit = fit_bulk(values, shape, significance=significance, exact=exact)
        return cls(enter_real(values)[0].detach().cpu(), fit)

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.fit.shape


@dataclass(frozen=True)
class Prediction:
    """The expected effect of r isotropic spikes, in the order of ``theta``.

    Attributes:
        theta: Strengths, the singular values of the update, shape ``(r,)``.
        threshold: θ_c of the layer.
        edge: Upper edge of its bulk.
        supercritical: Whether θ > θ_c, by so much that float64 distinguishes the outlier from
            the edge (:meth:`bulkedge.rmt.Bulk.supercritical`).
        location: Where the outlier is expected; the edge without one.
        sd: Standard deviation of the location; NaN without one.
        left_overlap: |⟨u, û⟩|², the spike's share of the outlier's left vector.
        right_overlap: |⟨v, v̂⟩|², likewise.
        place: The outlier's rank among the tuned values, 0 the largest.
        left_score: Median of the intruder score of û: its largest cosine with a base vector; NaN,
            as the next three, without an outlier.
        right_score: The same of v̂.
        left_new: Chance that the score of û is below ε.
        right_new: The same of v̂.
        expected: The verdict on the left side.
        top_k_threshold: θ_k, the relevant threshold: beyond it an outlier is among the k judged.
        chance: That one of these k is new on the left, all spikes together; NaN where it was not
            asked for.
    """

    theta: Tensor
    threshold: float
    edge: float
    supercritical: Tensor
    location: Tensor
    sd: Tensor
    left_overlap: Tensor
    right_overlap: Tensor
    place: Tensor
    left_score: Tensor
    right_score: Tensor
    left_new: Tensor
    right_new: Tensor
    expected: tuple[Expectation, ...]
    top_k_threshold: float
    chance: float


@dataclass(frozen=True)
class Budget:
    """How strong a generic update of a layer may be before it creates an outlier.

    Attributes:
        rank: Rank r of the update.
        threshold: θ_c: no outlier as long as ``‖ΔW‖₂`` stays below.
        concentrated: Largest ``‖ΔW‖_F`` that is safe however the update spends it: θ_c.
        spread: Largest ``‖ΔW‖_F`` that is safe if all r spikes are equal: θ_c √r.
        relative: θ_c over ``‖W0‖₂``.
        lora: Largest safe ``‖B·A‖₂`` under the scale α/r; None without an α.
        rslora: The same under α/√r.
        top_k_threshold: θ_k: strength at which an outlier reaches the k-th value of the base, and
            so is among the k leading directions that an audit judges; at most that value.
    """

    rank: int
    threshold: float
    concentrated: float
    spread: float
    relative: float
    lora: float | None
    rslora: float | None
    top_k_threshold: float


def predict(
    base: Tensor | BaseSpectrum,
    B: Tensor,
    A: Tensor,
    scale: float = 1.0,
    *,
    epsilon: float = DEFAULT_EPSILON,
    top_k: int = 10,
    draws: int = DRAWS,
) -> Prediction:
    """The expected effect of the update ``scale·B·A`` on a base that it is independent of.

    Cost: O((m+n) r²) for the spikes and O(p r) for each, p = min(m, n), once the base's singular
    values are known; milliseconds for 64 draws.

    Args:
        base: W0, shape ``(m, n)``, or what is known of it.
        B: Shape ``(m, r)``.
        A: Shape ``(r, n)``.
        scale: The number in front, α/r or α/√r for a LoRA.
        epsilon: The score below which a direction counts as new.
        top_k: How many leading directions an audit judges.
        draws: Of the update's vectors, for the chance of the layer; 0 leaves it out.

    Returns:
        The prediction, a row for each non-zero singular value of the update.

    Raises:
        InputError: If shapes do not fit, something is not real and finite, or the base has no
            bulk.

    References:
        Benaych-Georges and Nadakuditi, arXiv:1103.2221; Shuttleworth et al., arXiv:2410.21228.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> shapes = [(200, 300), (200, 1), (1, 300)]
        >>> W0, B, A = (torch.randn(shape, generator=generator) for shape in shapes)
        >>> found = predict(W0, B, A, scale=0.2)
        >>> found.expected[0].value, bool(found.theta[0] > found.threshold)
        ('intruder', True)
    """
    spectrum = base if isinstance(base, BaseSpectrum) else BaseSpectrum.of(base)
    theta = update_svd(B, A, scale, spectrum.shape).gamma.cpu()
    return predict_spikes(spectrum, theta, epsilon=epsilon, top_k=top_k, draws=draws)


def predict_spikes(
    spectrum: BaseSpectrum,
    theta: Array,
    *,
    epsilon: float = DEFAULT_EPSILON,
    top_k: int = 10,
    draws: int = DRAWS,
) -> Prediction:
    """The prediction for spikes of given strengths: :func:`predict` before there is an update.

    Args:
        spectrum: The base.
        theta: Strengths, shape ``(r,)``, in any order: a list, array or tensor.
        epsilon: The score below which a direction counts as new.
        top_k: How many leading directions an audit judges.
        draws: As for :func:`predict`.

    Returns:
        The prediction, its fields float64 tensors on the CPU.

    Raises:
        InputError: If strengths are not one row, one is negative or not finite, ε is not in
            (0, 1], or a count is invalid.

    Example:
        >>> W0 = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
        >>> found = predict_spikes(BaseSpectrum.of(W0), torch.tensor([40.0, 10.0]))
        >>> [expected.value for expected in found.expected]
        ['intruder', 'absorbed']
    """
    if not 0 < epsilon <= 1:
        raise InputError(f"expected 0 < epsilon ≤ 1, got {epsilon}")
    strengths = enter_real(theta)[0].cpu()
    if strengths.ndim != 1:
        raise InputError(f"expected one row of strengths, got shape {tuple(strengths.shape)}")
    bulk = spectrum.fit.bulk
    spike = bulk.spike(strengths)
    left, right = _component_weights(spectrum, spike)
    others = spectrum.values[: spectrum.fit.spikes]
    stronger = spike.theta.argsort(descending=True, stable=True).argsort()
    place = (others > spike.location[:, None]).sum(1) + stronger
    nothing = torch.where(spike.supercritical, 0.0, math.nan)
    left_new, right_new = (_chance_below(epsilon, side) + nothing for side in (left, right))
    left_score, right_score = (median_score(side) + nothing for side in (left, right))
    return Prediction(
        theta=spike.theta,
        threshold=bulk.threshold,
        edge=bulk.edge,
        supercritical=spike.supercritical,
        location=spike.location,
        sd=spike.sd,
        left_overlap=spike.left_overlap,
        right_overlap=spike.right_overlap,
        place=place,
        left_score=left_score,
        right_score=right_score,
        left_new=left_new,
        right_new=right_new,
        expected=tuple(map(_expectation, spike.supercritical.tolist(), left_new.tolist())),
        top_k_threshold=budget(spectrum, 1, top_k=top_k).top_k_threshold,
        chance=_chance_among(spectrum, strengths, epsilon, count("top_k", top_k, 1), draws),
    )


def budget(
    base: Tensor | BaseSpectrum, rank: int, alpha: float | None = None, *, top_k: int = 10
) -> Budget:
    """How strong a generic update of this rank may be before it creates an outlier.

    An outlier at the k-th value of the base has the strength ``θ_k = D(σ_k)^(−½)``, if σ_k stands
    outside the bulk; inside, θ_k is θ_c, where one is born.  A bulk that ends in a step has no θ_c
    (it is 0): there θ_k is what makes half of random updates new, 0 for a tied σ_k.

    θ_k is at most σ_k: with the k − 1 leading directions of the base, to which it is nearly
    orthogonal, an update of that strength is among the k leading by the minimax principle.

    Args:
        base: W0, shape ``(m, n)``, or what is known of it.
        rank: Rank r of the update.
        alpha: α of a LoRA, for the limits on ``‖B·A‖₂``.
        top_k: How many leading directions an audit judges.

    Returns:
        The budget.

    Raises:
        InputError: If the rank is no whole number in 1 … min(m, n), α or top_k is not positive,
            top_k is not whole, or the base has no bulk.

    Example:
        >>> W0 = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
        >>> found = budget(W0, rank=4, alpha=8.0)
        >>> round(found.threshold / 300**0.5, 2), round(found.spread / found.threshold, 2)
        (1.0, 2.0)
        >>> round(found.threshold / found.lora, 2), round(found.threshold / found.rslora, 2)
        (2.0, 4.0)
    """
    spectrum = base if isinstance(base, BaseSpectrum) else BaseSpectrum.of(base)
    rank = count("a rank", rank, 1, min(spectrum.shape))
    if not real(top_k) >= 1 or (alpha is not None and not real(alpha) > 0):
        raise InputError(f"expected positive alpha and top_k, got {alpha} and {top_k}")
    top_k = count("top_k", top_k, 1)
    threshold = spectrum.fit.threshold
    sigma_k = float(spectrum.values[min(top_k, len(spectrum.values)) - 1])
    if sigma_k > spectrum.fit.bulk.edge:
        reached = float(spectrum.fit.bulk.strength(sigma_k))
    else:  # a bulk that ends in a step has no threshold
        reached = threshold or generic_strength(spectrum.values, spectrum.shape, top_k)
    return Budget(
        rank=rank,
        threshold=threshold,
        concentrated=threshold,
        spread=threshold * math.sqrt(rank),
        relative=threshold / float(spectrum.values[0]),
        lora=None if alpha is None else threshold * rank / alpha,
        rslora=None if alpha is None else threshold * math.sqrt(rank) / alpha,
        top_k_threshold=min(reached, sigma_k),  # few values may make a bulk that ends above them
    )


def _chance_among(
    spectrum: BaseSpectrum, theta: Tensor, epsilon: float, top_k: int, draws: int
) -> float:
    """The share of drawn updates that make one of the k leading left directions new."""
    draws = count("draws", draws, 0)
    gamma, top_k = theta[theta > 0].sort(descending=True).values, min(top_k, *spectrum.shape)
    if draws == 0:
        return math.nan
    if len(gamma) == 0:
        return 0.0
    problems = drawn(spectrum.values, spectrum.shape, gamma, top_k, draws, seed=0)
    scale = (gamma[:1] / spectrum.values[0]).clamp(max=STRONG)
    return float((problems.lowest_score(scale.expand(draws), top_k) < epsilon).sum()) / draws


def _component_weights(spectrum: BaseSpectrum, spike: Spike) -> tuple[Tensor, Tensor]:
    """Mean squared components of the outlier on each base vector, left and right, ``(r, p)``."""
    m, n = spectrum.shape
    p = len(spectrum.values)
    square = spectrum.values.square()
    rho, left, right = (
        x[:, None] for x in (spike.location.square(), spike.left_overlap, spike.right_overlap)
    )
    # A base value may equal ρ: it does at the strength ``Budget.top_k_threshold``.
    far = torch.maximum((rho - square).square(), (torch.finfo(torch.float64).eps * rho).square())
    sides = []
    for size, own, other in ((m, right / m, left / n), (n, left / n, right / m)):
        weight = (rho * own + square * other) / far
        null = (size - p) * own / rho
        sides.append(weight / (weight.sum(-1, keepdim=True) + null))
    return sides[0], sides[1]


def _chance_below(epsilon: float | Tensor, weight: Tensor) -> Tensor:
    """Chance that every component stays below ε."""
    epsilon = torch.as_tensor(epsilon, dtype=weight.dtype)[..., None]
    tangent = epsilon / (1 - epsilon.square()).sqrt()
    rest = (1 - weight).clamp_min(torch.finfo(torch.float64).tiny)  # ε = 1 makes the tangent ∞
    return torch.erf(tangent * (rest / (2 * weight)).sqrt()).prod(-1)


def _expectation(supercritical: bool, new: float) -> Expectation:
    if not supercritical:
        return Expectation.ABSORBED
    return Expectation.INTRUDER if new > 0.5 else Expectation.ALIGNED
