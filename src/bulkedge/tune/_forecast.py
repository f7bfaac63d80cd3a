"""How strong updates will be when a run ends, from how strong they are in its first steps.

The strength of a LoRA that begins at zero grows nearly as a power of the sum of the learning rates,

    ‖s·B·A‖₂ ∝ (Σ learning rates)^p

B moves by about a learning rate a step, along one direction at first (p = 1), and ever less so.
``benchmarks/early_warning.py`` measures p, and how often a forecast was right.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bulkedge._errors import InputError

from ._core_svd import spikes
from ._matrix import DORA, AdaptedMatrix

EXPONENTS = 0.5, 0.75, 1.1
"""p of one layer in ten is lower than the first, and of one in ten higher than the last; the median
lies between them."""


@dataclass(frozen=True)
class Forecast:
    """The strength of one update at the end of a run, and when it reaches its threshold.

    Attributes:
        name: The name of the layer.
        strength: Its strongest spike now, over θ_k.
        at_end: The strength at the end over θ_k: low, expected and high.
        crossing: The first step at which it is at θ_k: early, expected and late; each is None if
            that is not before the end, and the present step if it is there already.
    """

    name: str
    strength: float
    at_end: tuple[float, float, float]
    crossing: tuple[int | None, int | None, int | None]


def forecasts(strengths: Mapping[str, float], step: int, rates: Sequence[float]) -> list[Forecast]:
    """What is expected of each layer, those first that will exceed their thresholds most.

    Args:
        strengths: The strongest spike of each layer now, over θ_k.
        step: How many steps there were so far.
        rates: The learning rate of every step of the run, first to last.

    Returns:
        One entry for each layer.

    Raises:
        InputError: If the run has not begun, or is over.
    """
    sums = list(itertools.accumulate(map(float, rates)))
    if not 1 <= step <= len(sums) or not sums[step - 1] > 0:
        raise InputError(
            f"expected the learning rates of all steps of a run, of which {step} are done, got "
            f"{len(sums)} with the sum {sums[step - 1] if 1 <= step <= len(sums) else 0:g} so far; "
            "ask after the first steps, and give those to come, too"
        )
    grown = [x / sums[step - 1] for x in sums]
    low, middle, high = EXPONENTS
    found = [
        Forecast(
            name,
            strength,
            (
                strength * grown[-1] ** low,
                strength * grown[-1] ** middle,
                strength * grown[-1] ** high,
            ),
            tuple(_crossing(strength, step, grown, p) for p in (high, middle, low)),  # pyright: ignore
        )
        for name, strength in strengths.items()
    ]
    return sorted(found, key=lambda x: -x.at_end[1])


def _crossing(strength: float, step: int, grown: Sequence[float], p: float) -> int | None:
    """The first step, from the present one on, at which a strength is 1."""
    for i in range(step - 1, len(grown)):
        if strength * grown[i] ** p >= 1:
            return i + 1
    return None


def strengths_of(matrices: Sequence[object], thresholds: Mapping[str, float]) -> dict[str, float]:
    """The strongest spike of each update of low rank over its threshold.

    Args:
        matrices: Any; those that are not adapted, and DoRA, are left out.
        thresholds: By name; layers without one are left out.

    Returns:
        Strengths by name.
    """
    own = [
        x
        for x in matrices
        if isinstance(x, AdaptedMatrix) and x.form != DORA and x.name in thresholds
    ]
    heads = {i: x for core in spikes(own) for i, x in zip(core.members, core.heads, strict=True)}
    return {x.name: heads[i] / thresholds[x.name] for i, x in enumerate(own)}
