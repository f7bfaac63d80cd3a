"""The figures of a layer that is watched, and those of all layers together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bulkedge._fields import NOT_NEGATIVE, SHARE, optional, whole
from bulkedge._precision import exact
from bulkedge.intruder import COUNTED, Verdict

from ._saved import entries


@dataclass
class LayerFigures:
    """The figures of a layer at its latest check.

    Attributes:
        step: The step of the check.
        intruders: How many leading directions score below ε, and lie mostly outside the base's
            leading space.
        rotated: How many score below ε but lie mostly inside that space.
        undecided: How many verdicts the certificate left open; these are in no other count.
        worst: The lowest score.
        energy: The share of the leading directions' energy, ``Σ σ²``, that those have which score
            below ε.
        strongest: The strongest spike of the update over θ_c; None if the base has no bulk.
        effective_rank: The effective rank of the update's spikes.
        drift: ``tr(ΔW C ΔWᵀ)/tr(W0 C W0ᵀ)``; None without moments.
    """

    step: int
    intruders: int
    rotated: int
    undecided: int
    worst: float
    energy: float
    strongest: float | None
    effective_rank: float
    drift: float | None = None

    @property
    def new_directions(self) -> int:
        """The new directions: intruders and rotated ones."""
        return self.intruders + self.rotated


def read_figures(name: str, saved: object) -> LayerFigures:
    """The saved figures of a layer; InputError if they are none.

    Args:
        name: Of the layer.
        saved: As it was read.

    Returns:
        The figures.
    """
    counts = dict.fromkeys(("step", "intruders", "rotated", "undecided"), whole(0))
    numbers = dict.fromkeys(("worst", "effective_rank"), NOT_NEGATIVE)
    unknown = dict.fromkeys(("strongest", "drift"), optional(NOT_NEGATIVE))
    return LayerFigures(**entries(name, saved, energy=SHARE, **counts, **numbers, **unknown))


def energy_share(sigma: Tensor, verdicts: Sequence[Verdict]) -> float:
    """The share of ``Σ σ²`` that new directions have.

    Args:
        sigma: Singular values of the tuned matrix, descending.
        verdicts: Of as many of its leading directions as were judged; the others do not count.

    Returns:
        Between 0 and 1.
    """
    squares = exact(sigma[: len(verdicts)]).square().tolist()
    new = sum(x for x, verdict in zip(squares, verdicts, strict=True) if verdict in COUNTED)
    return new / sum(squares) if any(squares) else 0.0


def summary(seen: Sequence[LayerFigures]) -> dict[str, float]:
    """Means and extremes over layers.

    Args:
        seen: Their figures.

    Returns:
        Figures by name; nothing of no layers.
    """
    if not seen:
        return {}
    found = {
        "new_directions_per_layer": _mean([layer.new_directions for layer in seen]),
        "intruders_per_layer": _mean([layer.intruders for layer in seen]),
        "lowest_score": min(layer.worst for layer in seen),
        "energy_share": _mean([layer.energy for layer in seen]),
        "effective_rank": _mean([layer.effective_rank for layer in seen]),
    }
    if known := [layer.strongest for layer in seen if layer.strongest is not None]:
        found["strongest_spike"] = max(known)
    return found


def totals(seen: Sequence[LayerFigures]) -> dict[str, float]:
    """Counts in all layers together.

    Args:
        seen: The figures of all of them.

    Returns:
        Counts by name.
    """
    counts = "new_directions", "intruders", "rotated", "undecided"
    return {count: float(sum(getattr(layer, count) for layer in seen)) for count in counts}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
