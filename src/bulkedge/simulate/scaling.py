"""The two scales of LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from . import _draw
from ._model import Base, Factors, gaussian, haar, noise
from ._table import Experiment, Ranks, Row, Table
from .rank import Rank, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = {"α/r": 1.0, "α/√r": 0.5}
FACTORS = ("orthonormal", "gaussian")


class Scaling(Experiment):
    """LoRA's scale α/r against rank-stabilised α/√r: its spikes exceed θ_c to larger ranks."""

    name: ClassVar[str] = "scaling"
    keys: ClassVar = {
        "factors": "orthonormal: BᵀB = AAᵀ = I; gaussian: independent entries",
        "scale": "the number in front of B·A",
        "rank": "rank r of the update",
    }
    measured: ClassVar = Rank.measured
    predicted: ClassVar = {
        "theory_strongest": "the scale itself, for orthonormal factors",
        "theory_outliers": "r if the scale exceeds θ_c, else 0, for orthonormal factors",
    }
    quick: ClassVar = {"size": 80, "repeats": 2, "alpha": 4.0, "ranks": [1, 2, 8, 32]}

    size: int = Field(400, ge=20, le=2000, description="Side of the square matrix.")
    alpha: float = Field(6.0, gt=0, le=1e6, description="LoRA's α, in units of θ_c.")
    column: float = Field(
        3**-0.5,
        gt=0,
        le=1e3,
        description="Norm of a column of gaussian factors; 1/√3 is that of LoRA's initial A.",
    )
    ranks: Ranks = Field((1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64), description="Ascending.")
    repeats: int = Field(5, ge=1, le=100_000, description="How often everything is drawn.")

    def trial(self, generator: torch.Generator) -> Iterator[Row]:
        """See :meth:`Experiment.trial`."""
        base = Base.of(noise((self.size, self.size), generator))
        for rank in self.ranks:
            for factors in FACTORS:
                B, A = self._factors(factors, rank, generator)
                for name, power in SCALES.items():
                    found = measure(base, (self.alpha / rank**power * B, A))
                    yield {"factors": factors, "scale": name, "rank": rank, **found}

    def _factors(self, kind: str, rank: int, generator: torch.Generator) -> Factors:
        n = self.size
        if kind == "orthonormal":
            return haar(n, rank, generator), haar(n, rank, generator).mT
        size = self.column / n**0.5
        return size * gaussian((n, rank), generator), size * gaussian((rank, n), generator)

    def theory(self, key: Row) -> Row:
        """See :meth:`Experiment.theory`."""
        if key["factors"] == "gaussian":
            return {}
        theta = self.alpha / key["rank"] ** SCALES[key["scale"]]
        return {"theory_strongest": theta, "theory_outliers": key["rank"] if theta > 1 else 0}

    def paint(self, table: Table) -> Figure:
        """See :meth:`Experiment.paint`."""
        note = (
            f"points: mean ± sd of {self.repeats} draws, {self.size}×{self.size}, "
            rf"$\alpha = {self.alpha:g}\,\theta_c$; lines: orthonormal factors, large matrices"
        )
        figure, axes = _draw.panels(2, 2, note=note)
        measures = {
            "strongest": r"strongest spike $\|\Delta W\|_2/\theta_c$",
            "outliers": "outliers",
        }
        every = range(self.ranks[0], self.ranks[-1] + 1)
        for row, factors in enumerate(FACTORS):
            for panel, (name, told) in zip(axes[2 * row :], measures.items(), strict=False):
                for look, scale in enumerate(SCALES):
                    found = table.where(factors=factors, scale=scale)
                    _draw.points(panel, found, "rank", name, look=look, label=scale)
                    if factors == "orthonormal":
                        key = {"factors": factors, "scale": scale}
                        theory = [self.theory(key | {"rank": r})[f"theory_{name}"] for r in every]
                        _draw.curve(panel, every, theory, look=look)
                panel.set_xscale("log", base=2)
                _draw.labels(panel, "rank $r$", told, f"{factors} factors")
            axes[2 * row].set_yscale("log", base=2)
            _draw.mark(axes[2 * row], y=1.0)
        axes[0].legend()
        return figure
