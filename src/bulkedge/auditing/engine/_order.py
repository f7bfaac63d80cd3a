"""What a comparison costs, and so in which order to take them."""

from __future__ import annotations

from collections.abc import Sequence

from bulkedge.comparison.plan import Comparison


def largest_first(comparisons: Sequence[Comparison]) -> list[int]:
    """Positions by falling m·n, equal ones in order: no worker is left alone with it at the end."""
    return sorted(range(len(comparisons)), key=lambda i: -comparisons[i].base.size)
