"""How much an update may be scaled until it makes a new direction among the leading k.

The critical scale of an update is the smallest factor s at which one of the k leading directions of
``W0 + s ΔW`` has a score below ε.  Below 1, it has happened.
"""

from __future__ import annotations

from bulkedge._fields import NOT_NEGATIVE, check_values

from .predict import BaseSpectrum, budget


def critical_scale(spectrum: BaseSpectrum, strongest: float, *, top_k: int = 10) -> float | None:
    """The critical scale that is expected of a generic update: ``θ_k / ‖ΔW‖₂``.

    An outlier is nearly all new where it is born, at θ_c, and counts once it stands among the k
    leading directions, at θ_k; the strongest spike is the first to get there.  Cost: none, once the
    base is measured.

    Args:
        spectrum: The base.
        strongest: ``‖ΔW‖₂``.
        top_k: How many leading directions are judged.

    Returns:
        The scale; None for no update, or a base whose edge is hard, which has no limit.

    Raises:
        InputError: If the strength is negative or not finite, or ``top_k`` no count.

    References:
        Xie, arXiv:2607.23711, with θ_c in the place of θ_k.

    Example:
        >>> import torch
        >>> W0 = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
        >>> round(critical_scale(BaseSpectrum.of(W0), 2 * 200**0.5), 2)  # twice the threshold
        0.5
    """
    check_values("critical_scale", strongest=(strongest, NOT_NEGATIVE))
    limit = budget(spectrum, 1, top_k=top_k).leading
    return limit / strongest if strongest > 0 and limit > 0 else None
