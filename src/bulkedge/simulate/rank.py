"""Updates of one norm and growing rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from . import _draw
from ._experiment import Experiment, Ranks, Row
from ._model import (
    EPSILON,
    Base,
    Factors,
    gaussian_factors,
    noise,
    noise_quantile,
    spiked_update,
    white_bulk,
)
from ._table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("equal", "uneven")


class Rank(Experiment):
    """The rank grows at a fixed Frobenius norm F: equal spikes sink below θ_c at r = (F/θ_c)²."""

    name: ClassVar[str] = "rank"
    keys: ClassVar = {
        "spikes": "equal, or uneven: those of independent Gaussian factors",
        "rank": "rank r of the update",
    }
    measured: ClassVar = {
        "strongest": "‖ΔW‖₂/θ_c",
        "participation_ratio": "‖ΔW‖_F⁴/Σθ⁴, r for equal spikes",
        "above": "spikes above θ_c",
        "outliers": "singular values beyond what noise reaches once in 20 times",
        "intruders": f"of these, those with score < {EPSILON:g}",
    }
    predicted: ClassVar = {
        "theory_strongest": "F/√r for equal spikes",
        "theory_outliers": "r if r < (F/θ_c)², else 0, for equal spikes",
    }
    quick: ClassVar = {"size": 80, "repeats": 2, "norm": 3.0, "ranks": [1, 4, 16, 32]}

    size: int = Field(400, ge=20, le=2000, description="Side of the square matrix.")
    norm: float = Field(4.0, gt=0, le=1e6, description="‖ΔW‖_F/θ_c.")
    ranks: Ranks = Field((1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48), description="Ascending.")

    def trial(self, generator: torch.Generator) -> Iterator[Row]:
        """See :meth:`Experiment.trial`."""
        shape = (self.size, self.size)
        base = Base.of(noise(shape, generator))
        for rank in self.ranks:
            theta = torch.full((rank,), self.norm / math.sqrt(rank), dtype=torch.float64)
            updates = (
                spiked_update(shape, theta, generator),
                gaussian_factors(shape, rank, self.norm, generator),
            )
            for kind, update in zip(KINDS, updates, strict=True):
                yield {"spikes": kind, "rank": rank, **measure(base, update)}

    def theory(self, key: Row) -> Row:
        """See :meth:`Experiment.theory`."""
        if key["spikes"] == "uneven":
            return {}
        theta = self.norm / math.sqrt(key["rank"])
        return {"theory_strongest": theta, "theory_outliers": key["rank"] if theta > 1 else 0}

    def plot(self, table: Table) -> Figure:
        """See :meth:`Experiment.plot`."""
        note = (
            f"points: mean ± sd of {self.repeats} draws, {self.size}×{self.size}, "
            rf"$\|\Delta W\|_F = {self.norm:g}\,\theta_c$; lines: equal spikes, large matrices;"
            " dotted: the threshold"
        )
        figure, axes = _draw.panels(1, 3, note=note)
        measures = {
            "strongest": r"strongest spike $\|\Delta W\|_2/\theta_c$",
            "outliers": "outliers",
            "intruders": f"outliers with score < {EPSILON}",
        }
        for panel, (name, title) in zip(axes, measures.items(), strict=True):
            for series, kind in enumerate(KINDS):
                found = table.where(spikes=kind)
                _draw.points(panel, found, "rank", name, series=series, label=kind)
                if kind == "equal":
                    theory = "theory_strongest" if name == "strongest" else "theory_outliers"
                    _draw.curve(panel, *self._curve(theory), series=series)
            _draw.mark(panel, x=self.norm**2)
            _draw.set_labels(panel, "rank $r$", title)
            panel.set_xscale("log", base=2)
        _draw.mark(axes[0], y=1.0)
        axes[0].legend()
        return figure

    def _curve(self, column: str) -> tuple[list[int], list[float]]:
        """All ranks, and a predicted column of equal spikes at each of them."""
        ranks = list(range(self.ranks[0], self.ranks[-1] + 1))
        return ranks, [self.theory({"spikes": "equal", "rank": r})[column] for r in ranks]


def measure(base: Base, update: Factors) -> Row:
    """The measured columns for a low-rank update of noise, by the secular equation."""
    secular = base.secular(update)
    theta, shape = secular.spikes, secular.shape
    outliers = secular.outliers(noise_quantile(shape, white_bulk(shape).sigma))
    score = base.scores(outliers.u).score
    return {
        "strongest": float(theta[0]),
        "participation_ratio": float(theta.square().sum().square() / theta.pow(4).sum()),
        "above": int((theta > 1 + 1e-9).sum()),  # a spike at θ_c is not above it
        "outliers": len(outliers),
        "intruders": int((score < EPSILON).sum()),
    }
