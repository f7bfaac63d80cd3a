"""What a tuned direction is called: the words, which of them are counted, and the rule.

A new verdict is a word in :class:`Verdict` and a region of score and overlap in :func:`verdict`.
Commands, records and repairs take the words from here; how each is shown is in
``report/verdicts.py``.  Nothing here needs torch, so that ``bulkedge --help`` answers at once.
"""

from __future__ import annotations

from enum import Enum
from itertools import product


class Verdict(str, Enum):
    """What a tuned singular vector is, seen from the base."""

    ALIGNED = "aligned"
    """Its score reaches ε: a base vector, kept."""
    ROTATED = "rotated"
    """Its score is below ε, but at least half its energy lies in the base's leading 2k-space."""
    INTRUDER = "intruder"
    """Its score is below ε, and most of it lies outside that space."""
    UNDECIDED = "undecided"
    """The vector itself is not known well enough to say."""


COUNTED = (Verdict.ROTATED, Verdict.INTRUDER)
"""The verdicts of new directions, the milder first."""

HALF_THE_ENERGY = 0.5**0.5
"""The overlap at which half of a vector's square lies in the base's leading space."""


def verdict(
    score: float, subspace_overlap: float, *, epsilon: float, vector_error: float = 0.0
) -> Verdict:
    """The verdict on one direction.

    Args:
        score: Its score.
        subspace_overlap: Its overlap with the base's leading 2k-space.
        epsilon: The threshold; the paper's is ``DEFAULT_EPSILON``.
        vector_error: Bound on the error of the tuned vector, hence of both figures.

    Returns:
        The verdict; ``UNDECIDED`` when a threshold lies within the error of what it is set for.

    Example:
        >>> verdict(0.3, 0.9, epsilon=0.5).value, verdict(0.3, 0.4, epsilon=0.5).value
        ('rotated', 'intruder')
    """
    if not abs(score - epsilon) >= vector_error:  # nor is NaN decided
        return Verdict.UNDECIDED
    if score >= epsilon:
        return Verdict.ALIGNED
    if not abs(subspace_overlap - HALF_THE_ENERGY) >= vector_error:
        return Verdict.UNDECIDED
    return Verdict.ROTATED if subspace_overlap >= HALF_THE_ENERGY else Verdict.INTRUDER


def certain_verdict(
    epsilon: float, lower: float, upper: float, overlap_lower: float, overlap_upper: float
) -> Verdict:
    """The verdict that holds in the whole of both intervals; ``UNDECIDED`` if there is none.

    One that holds at all four pairs of ends holds between them, because the region of each verdict
    is convex.

    Args:
        epsilon: The threshold.
        lower: The least that the score can be.
        upper: The most that it can be.
        overlap_lower: The least that the overlap can be.
        overlap_upper: The most that it can be.

    Returns:
        The verdict.

    Example:
        >>> certain_verdict(0.5, 0.6, 0.7, 0.0, 1.0).value
        'aligned'
        >>> certain_verdict(0.5, 0.4, 0.7, 0.0, 1.0).value
        'undecided'
    """
    ends = product((lower, upper), (overlap_lower, overlap_upper))
    found = {verdict(*end, epsilon=epsilon) for end in ends}
    return found.pop() if len(found) == 1 else Verdict.UNDECIDED
