"""How much an update may be scaled until it makes a new direction among the leading k.

The critical scale of an update is the smallest factor s at which one of the k leading directions of
``W0 + s ΔW`` has a score below ε.  Below 1, it has happened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import DEFAULT_EPSILON, NOT_NEGATIVE, POSITIVE_SHARE, check_values, whole
from bulkedge.rmt._arrays import Array, enter_real

from ._reduced import Reduced, drawn, measured
from ._scan import GENERIC_DRAWS, first_new
from ._update_svd import UpdateSVD
from .predict import BaseSpectrum, budget


def critical_scale(spectrum: BaseSpectrum, strongest: float, *, top_k: int = 10) -> float | None:
    """The critical scale by the only number that a budget has: ``θ_k / ‖ΔW‖₂``.

    An outlier is almost entirely new where it appears, at θ_c, and counts once it is among the k
    leading directions, at θ_k; the strongest spike gets there first.  Cost: none, once the
    base is measured.

    Args:
        spectrum: The base.
        strongest: ``‖ΔW‖₂``.
        top_k: How many leading directions are judged; all if there are fewer.

    Returns:
        The scale; None for no update, or a base without a limit, in which every update makes a new
        direction: its k-th value is zero or tied.

    Raises:
        InputError: If the strength is negative or not finite, or ``top_k`` no count.

    References:
        Xie, arXiv:2607.23711, with θ_c in the place of θ_k.

    Example:
        >>> W0 = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
        >>> round(critical_scale(BaseSpectrum.of(W0), 2 * 200**0.5), 2)  # twice the threshold
        0.5
    """
    check_values("critical_scale", strongest=(strongest, NOT_NEGATIVE))
    limit = budget(spectrum, 1, top_k=top_k).top_k_threshold
    return limit / strongest if strongest > 0 and limit > 0 else None


def generic_scale(
    spectrum: BaseSpectrum,
    theta: Array,
    *,
    top_k: int = 10,
    epsilon: float = DEFAULT_EPSILON,
    draws: int = GENERIC_DRAWS,
) -> float | None:
    """The critical scale of an update if only its strengths are known.

    The median over draws of its vectors, beside the base's own leading values: all spikes at once,
    with the mixing of vectors and the repulsion of values.  Cost: some ten milliseconds.

    Args:
        spectrum: The base.
        theta: Strengths, the singular values of the update, shape ``(r,)``.
        top_k: How many leading directions are judged; all if there are fewer.
        epsilon: The score below which one is new, on the left.
        draws: Of the vectors.

    Returns:
        The scale, within a few per cent.  It is 0 where something is new at every scale above the
        rounding of the base's values, None where nothing turns new up to 8 σ_k/‖ΔW‖₂.

    Raises:
        InputError: If strengths are not one row, or a setting makes no sense.

    References:
        Benaych-Georges and Nadakuditi, arXiv:1103.2221, for the part of the bulk.

    Example:
        >>> W0 = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
        >>> 0.4 < generic_scale(BaseSpectrum.of(W0), [2 * 200**0.5]) < 0.7
        True
    """
    _check("generic_scale", top_k, epsilon)
    top_k = min(top_k, *spectrum.shape)
    check_values("generic_scale", draws=(draws, whole(1)))
    strengths = enter_real(theta)[0].cpu()
    if strengths.ndim != 1 or not bool((strengths.isfinite() & (strengths >= 0)).all()):
        raise InputError(f"expected one row of finite strengths ≥ 0, got {theta!r:.60}")
    gamma = strengths[strengths > 0].sort(descending=True).values
    if len(gamma) == 0:
        return None
    problems = drawn(spectrum.values, spectrum.shape, gamma, top_k, draws, seed=0)
    return _scale(first_new([problems], top_k, epsilon, (draws,)).median(), spectrum, gamma)


def aligned_scale(
    spectrum: BaseSpectrum,
    leading: tuple[Tensor, Tensor, Tensor],
    update: UpdateSVD,
    *,
    top_k: int = 10,
    epsilon: float = DEFAULT_EPSILON,
    sides: Sequence[Literal["left", "right"]] = ("left",),
) -> float | None:
    """The critical scale of a known update, given the leading triplets of its base.

    The overlaps of the update with these are measured; the bulk represents the rest of the base.
    An update along base vectors beyond the q leading ones, which strengthens what the base has, is
    treated as generic there: its scale may be far off.

    Cost: O((m + n) q r) for the components, q = 32 triplets, and some 30 eigenproblems of q + 4r
    rows; no product with the base.

    Args:
        spectrum: The base.
        leading: Its leading triplets, U ``(m, q)``, σ ``(q,)`` and V ``(n, q)``, q ≥ ``top_k``.
        update: Its spikes; the 64 strongest count.
        top_k: How many leading directions are judged; all if there are fewer.
        epsilon: The score below which one is new.
        sides: On which.

    Returns:
        The scale, within a few per cent of that of the small matrix.  It is 0 where something is
        new at every scale above the rounding of the base's values, None for no update, or where
        nothing turns new up to 8 σ_k/‖ΔW‖₂.

    Raises:
        InputError: If there are fewer than ``top_k`` triplets, shapes do not fit, or a setting
            makes no sense.

    Example:
        >>> from bulkedge.triplet import thin_svd
        >>> from bulkedge.update import Secular, update_svd
        >>> generator = torch.Generator().manual_seed(0)
        >>> W0, B, A = (
        ...     torch.randn(shape, generator=generator).double()
        ...     for shape in [(60, 80), (60, 1), (1, 80)]
        ... )
        >>> update = update_svd(B, A, 0.1, (60, 80))
        >>> found = aligned_scale(BaseSpectrum.of(W0), thin_svd(W0), update)
        >>> scores = [
        ...     Secular.from_svd(*thin_svd(W0), B, A, 0.1 * scale).triplets(10).left_score.min()
        ...     for scale in (found / 1.05, found * 1.05)
        ... ]
        >>> bool(scores[1] < 0.5 <= scores[0])
        True
    """
    _check("aligned_scale", top_k, epsilon)
    top_k = min(top_k, *spectrum.shape)
    problem = _measured(spectrum, leading, update, top_k)
    if problem is None:
        return None
    problems = [problem if side == "left" else problem.T for side in sides]
    return _scale(first_new(problems, top_k, epsilon), spectrum, update.gamma)


def aligned_scores(
    spectrum: BaseSpectrum,
    leading: tuple[Tensor, Tensor, Tensor],
    update: UpdateSVD,
    scales: Sequence[float],
    *,
    top_k: int = 10,
    sides: Sequence[Literal["left", "right"]] = ("left",),
) -> Tensor:
    """The scores of the leading directions of ``W0 + s ΔW``, by the law of :func:`aligned_scale`.

    Cost: as there, with one eigenproblem for each scale and side.

    Args:
        spectrum: The base.
        leading: Its leading triplets, as for :func:`aligned_scale`.
        update: Its spikes, at least one.
        scales: The factors s on the update.
        top_k: How many leading directions are judged.
        sides: On which.

    Returns:
        Shape ``(len(scales), len(sides), k)``, k = ``min(top_k, m, n)``, the strongest direction
        first.

    Raises:
        InputError: As of :func:`aligned_scale`, and for an update of zero.

    Example:
        >>> from bulkedge.triplet import thin_svd
        >>> from bulkedge.update import update_svd
        >>> generator = torch.Generator().manual_seed(0)
        >>> shapes = [(60, 80), (60, 1), (1, 80)]
        >>> W0, B, A = (torch.randn(shape, generator=generator).double() for shape in shapes)
        >>> update = update_svd(B, A, 0.5, (60, 80))
        >>> found = aligned_scores(BaseSpectrum.of(W0), thin_svd(W0), update, [0.0, 1.0], top_k=1)
        >>> [round(float(score), 2) for score in found.flatten()]
        [1.0, 0.32]
    """
    check_values("aligned_scores", top_k=(top_k, whole(1)))
    top_k = min(top_k, *spectrum.shape)
    problem = _measured(spectrum, leading, update, top_k)
    if problem is None:
        raise InputError("expected an update with spikes, got zero")
    unit = float(update.gamma[0]) / float(spectrum.values[0])
    s = torch.as_tensor(scales, dtype=torch.float64) * unit
    problems = [problem if side == "left" else problem.T for side in sides]
    return torch.stack([one.scores(s, top_k).flip(-1) for one in problems], dim=1)


def _measured(
    spectrum: BaseSpectrum,
    leading: tuple[Tensor, Tensor, Tensor],
    update: UpdateSVD,
    top_k: int,
) -> Reduced | None:
    """The small matrix of base and update; None for no update."""
    U, sigma, V = leading
    shapes = (len(U), len(V)), (len(update.P), len(update.Q))
    if shapes != (spectrum.shape, spectrum.shape) or not U.shape[1] == len(sigma) == V.shape[1]:
        raise InputError(
            f"expected triplets and spikes of a base of shape {spectrum.shape}, got {shapes[0]} "
            f"and {shapes[1]}"
        )
    if len(sigma) < min(top_k, len(spectrum.values)):
        raise InputError(f"expected the {top_k} leading triplets and more, got {len(sigma)}")
    if update.rank == 0:
        return None
    return measured(leading, spectrum.values, spectrum.shape, update, top_k)


def _check(name: str, top_k: int, epsilon: float) -> None:
    check_values(name, top_k=(top_k, whole(1)), epsilon=(epsilon, POSITIVE_SHARE))


def _scale(found: Tensor, spectrum: BaseSpectrum, gamma: Tensor) -> float | None:
    """A scale in units of ``σ₁/‖ΔW‖₂`` as one of the update; None for none."""
    scale = float(found) * float(spectrum.values[0]) / float(gamma[0])
    return scale if scale < math.inf else None
