"""The scale at which a growing update makes its first new direction, searched from below.

New directions come and go as s grows: where two singular values of ``W0 + s ΔW`` come close, their
vectors mix, and a mixture may be new over a few per cent of s.  So the search goes upwards from a
scale at which all leading vectors are close to the base's, and between two scales it looks again
wherever a vector has turned so far that something new may lie between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import DEFAULT_EPSILON, POSITIVE_SHARE, check_values, number

REACH = 64.0
"""A bracket is sought no further than this factor away from where the search begins."""
STEP = 1.1
"""Neighbouring scales are no further apart than this factor up to 1."""
FAR_STEP = 1.25
"""Beyond, where nobody scales an update to, they may be this far apart."""
WIDTH = 1.01
"""A bracket, and a window that is looked for, is this wide."""
CLOSE = math.cos(math.pi / 6)
"""Scores from which on the search begins: vectors at most 30° off the base's."""

GREATER = number("greater than 1", lambda x: 1 < x < math.inf)


@dataclass(frozen=True)
class ScaledDirections:
    """The leading directions of ``W0 + s ΔW`` at one scale.

    Attributes:
        scores: Of one side after the other, shape ``(d,)``.
        lower: Lower ends of their intervals.
        upper: Upper ends.
        vectors: The unit vectors in the same order, shape ``(m, k)`` for each side.
    """

    scores: Tensor
    lower: Tensor
    upper: Tensor
    vectors: tuple[Tensor, ...]

    def is_new(self, epsilon: float) -> bool | None:
        """Whether one has a score below ε for certain.

        Args:
            epsilon: ε.

        Returns:
            Whether it has; None if that is open.
        """
        if bool((self.upper < epsilon).any()):
            return True
        return False if bool((self.lower >= epsilon).all()) else None

    def may_hide(self, other: ScaledDirections, epsilon: float) -> bool:
        """Whether one may be new between two scales though none is at either.

        The angle to the nearest base vector changes by no more than a vector turns.  So on a
        straight turn by φ, between vectors that are α and β off the base, none is further off
        than ``(α + β + φ)/2``.

        Args:
            other: At the other scale.
            epsilon: ε.

        Returns:
            True where that is more than ``arccos ε``, or the numbers of vectors differ.
        """
        if [x.shape for x in self.vectors] != [x.shape for x in other.vectors]:
            return True
        turned = [(x * y).sum(0).abs() for x, y in zip(self.vectors, other.vectors, strict=True)]
        off = _angle(self.scores) + _angle(other.scores)
        return bool((off + _angle(torch.cat(turned).to(off)) > 2 * math.acos(epsilon)).any())


Look = Callable[[float], ScaledDirections]


@dataclass(frozen=True)
class ScaleBracket:
    """A bracket of the scale at which a growing update creates its first new direction.

    Attributes:
        low: A scale at which nothing is new, nor at any lower one that was tried; 0 if none was
            found.
        high: The lowest one that was tried at which something is new; None if none was found.
        undecided: For how many of the scales that were tried this stayed open.
        tried: How many scales were tried.
    """

    low: float
    high: float | None
    undecided: int
    tried: int


def bracket_scale(
    look: Look,
    start: float = 1.0,
    known: Mapping[float, ScaledDirections] | None = None,
    *,
    epsilon: float = DEFAULT_EPSILON,
    width: float = WIDTH,
) -> ScaleBracket:
    """The critical scale of an update: nothing is new at the low end, and at no lower scale tried.

    The search begins at the start or below it, where every vector is within 30° of a base vector,
    and goes upwards in steps by 1.1, beyond 1 by 1.25.  It halves a step, down to the
    width, where something is new at its end, or where a vector that turns straight from one end
    to the other may be new on the way (:meth:`ScaledDirections.may_hide`).  What this does not
    prove: a vector that turns aside between two scales, and back, is not seen.  An open answer
    counts as new for the low end, and as not new for the high end, and widens the bracket.

    Cost: some 15 to 25 looks, up to a few hundred where scores stay near ε.

    Args:
        look: The leading directions of ``W0 + s ΔW``.
        start: A scale to begin at, such as the one that is expected.
        known: Known answers for some scales.
        epsilon: The score below which a direction is new.
        width: The greatest ratio of both ends, above 1.

    Returns:
        The bracket.  An end that lies more than a factor of 64 from the start is not found.

    Raises:
        InputError: If the start is not positive and finite, or a setting makes no sense.

    Example:
        >>> def look(s):  # a vector that turns away from a base vector
        ...     angle = torch.tensor([1.2 * s])
        ...     vector = torch.cat([angle.cos(), angle.sin()])[:, None]
        ...     return ScaledDirections(angle.cos(), angle.cos(), angle.cos(), (vector,))
        >>> found = bracket_scale(look)
        >>> found.low < math.pi / 3 / 1.2 <= found.high <= 1.01 * found.low
        True
    """
    check_values("bracket_scale", epsilon=(epsilon, POSITIVE_SHARE), width=(width, GREATER))
    if not 0 < start < math.inf:
        raise InputError(f"expected a positive finite start, got {start!r:.40}")
    search = _Search(look, epsilon, width, dict(known or {}))
    begin = search.begin(start)
    # both climbs look at the same scales as long as nothing is open
    low, _ = search.climb(begin, start, lambda answer: answer is not False)
    _, high = search.climb(begin, start, lambda answer: answer is True)
    answers = [found.is_new(epsilon) for found in search.seen.values()]
    return ScaleBracket(low, high, sum(found is None for found in answers), len(answers))


@dataclass
class _Search:
    """What has been seen, and how to go on."""

    look: Look
    epsilon: float
    width: float
    seen: dict[float, ScaledDirections] = field(default_factory=dict)

    def at(self, scale: float) -> ScaledDirections:
        if scale not in self.seen:
            self.seen[scale] = self.look(scale)
        return self.seen[scale]

    def begin(self, start: float) -> float:
        """The scale to climb from: below what is known to be new, with vectors near the base's."""
        new = (s for s, found in self.seen.items() if found.is_new(self.epsilon) is not False)
        scale = min([start, *new])
        while scale > start / REACH and not bool((self.at(scale).scores >= CLOSE).all()):
            scale /= 2
        return scale

    def climb(
        self, begin: float, start: float, beyond: Callable[[bool | None], bool]
    ) -> tuple[float, float | None]:
        """The ends of the first step beyond; 0 below, or None above, where there is none."""
        if beyond(self.at(begin).is_new(self.epsilon)):
            return 0.0, begin
        low = begin
        while low < start * REACH:
            step = STEP if low < 1 else FAR_STEP
            high = min([min(low * step, start * REACH), *(x for x in self.seen if x > low)])
            if (found := self._first(low, high, beyond)) is not None:
                return found
            low = high
        return low, None

    def _first(
        self, low: float, high: float, beyond: Callable[[bool | None], bool]
    ) -> tuple[float, float] | None:
        """The first step between two scales that leads beyond; None if none does."""
        ends = beyond(self.at(high).is_new(self.epsilon))
        hidden = not ends and self.at(low).may_hide(self.at(high), self.epsilon)
        if high <= self.width * low or not (ends or hidden):
            return (low, high) if ends else None
        middle = math.sqrt(low * high)
        return self._first(low, middle, beyond) or self._first(middle, high, beyond)


def _angle(cosine: Tensor) -> Tensor:
    return torch.arccos(cosine.clamp(0, 1))
