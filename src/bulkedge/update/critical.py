"""How much an update may be scaled until it makes a new direction among the leading k.

The critical scale of an update is the smallest factor s at which one of the k leading directions of
``W0 + s ΔW`` has a score below ε.  Below 1, it has happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bulkedge._errors import InputError
from bulkedge._fields import NOT_NEGATIVE, check_values

from .predict import BaseSpectrum, budget

WIDTH = 1.1
"""A bracket ends where its high end is at most this many times its low end."""
REACH = 64.0
"""The search looks no further than this factor away from where it begins."""
LADDER = 1.25
"""Below a bracket the search looks again, in steps by this factor."""
RUNGS = 6
"""This many steps of the ladder are tried."""


@dataclass(frozen=True)
class ScaleBracket:
    """Where an update, growing from zero, makes its first new direction, as far as was looked.

    Attributes:
        low: A scale at which nothing is new; 0 if none was found.
        high: A scale above at which something is new; None if none was found.
        undecided: At how many of the scales that were tried this stayed open.
        tried: How many scales were tried.
    """

    low: float
    high: float | None
    undecided: int
    tried: int


def bracket_scale(
    is_new: Callable[[float], bool | None],
    start: float = 1.0,
    known: Mapping[float, bool | None] | None = None,
) -> ScaleBracket:
    """The critical scale of an update, between two scales no more than 10 % apart.

    By bisection on log s.  What is open counts as new for the low end and as not new for the high
    end: it widens the bracket and never moves an end to where nothing is decided.  New directions
    may come and go as s grows.  So six scales below the bracket are tried, too, in steps by 1.25,
    and the search goes on below any of them at which something is new.  Cost: about a dozen calls,
    more where that happens.

    Args:
        is_new: Whether one of the leading directions of ``W0 + s ΔW`` is new; None if it is open.
        start: A scale to begin at, such as the one that is expected.
        known: Answers for scales that need not be asked again.

    Returns:
        The bracket.  An end that lies more than a factor of 64 from the start is not found.

    Raises:
        InputError: If the start is not positive and finite.

    Example:
        >>> found = bracket_scale(lambda s: s > 0.3)
        >>> found.low < 0.3 <= found.high <= 1.1 * found.low
        True
    """
    if not 0 < start < math.inf:
        raise InputError(f"expected a positive finite start, got {start!r:.40}")
    answers = dict(known or {})

    def ask(scale: float) -> bool | None:
        if scale not in answers:
            answers[scale] = is_new(scale)
        return answers[scale]

    low, high = _ends(ask, start)
    for _ in range(RUNGS):  # each time from what lies lower
        rungs = {low / LADDER**i for i in range(1, RUNGS + 1)} if low else set()
        below = [scale for scale in sorted({*rungs, *answers}) if scale < low and ask(scale)]
        if not below:
            break
        low, high = _ends(ask, below[0])
    undecided = sum(found is None for found in answers.values())
    return ScaleBracket(low, high, undecided, len(answers))


def _ends(ask: Callable[[float], bool | None], start: float) -> tuple[float, float | None]:
    """The two ends; both searches ask at the same scales as long as nothing is open."""
    low, _ = _bisect(lambda scale: ask(scale) is not False, start)
    _, high = _bisect(lambda scale: ask(scale) is True, start)
    return low or 0.0, high


def _bisect(beyond: Callable[[float], bool], start: float) -> tuple[float | None, float | None]:
    """Scales before and beyond, close to each other; None for one that is out of reach."""
    low = high = None
    scale, factor = start, 0.5 if beyond(start) else 2.0
    while start / REACH <= scale <= start * REACH and (low is None or high is None):
        low, high = (low, scale) if beyond(scale) else (scale, high)
        scale *= factor
    while low is not None and high is not None and high > WIDTH * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return low, high


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
    limit = budget(spectrum, 1, top_k=top_k).top_k_threshold
    return limit / strongest if strongest > 0 and limit > 0 else None
