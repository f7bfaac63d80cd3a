"""A dense and a low-rank update of the same norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from . import _draw
from ._experiment import Experiment, Row, Strengths
from ._model import (
    EPSILON,
    Base,
    dense_update,
    gaussian_factors,
    noise,
    noise_quantile,
    noise_with_signals,
    white_bulk,
)
from ._table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FullVsLora(Experiment):
    """A dense against a low-rank update of equal norm, on pure noise and on noise with signals."""

    name: ClassVar[str] = "full_vs_lora"
    keys: ClassVar = {
        "base": "noise, or signals: noise with strong directions of its own",
        "update": "dense (independent entries) or low rank (independent factors)",
        "norm": "‖ΔW‖_F/θ_c",
    }
    measured: ClassVar = {
        "update_norm": "‖ΔW‖₂/θ_c",
        "above": "singular values of a low-rank update above θ_c; 0 for a dense one",
        "outliers": "singular values beyond what noise reaches once in 20 times, less the base's",
        "counted": f"leading tuned directions with score < {EPSILON:g}",
        "score": "mean score of the leading tuned directions",
    }
    quick: ClassVar = {"size": 60, "repeats": 2, "norms": [2.0, 8.0], "top_k": 4, "signals": 4}

    size: int = Field(300, ge=20, le=2000, description="Side of the square matrix.")
    rank: int = Field(4, ge=1, description="Rank of the low-rank update.")
    signals: int = Field(10, ge=1, description="Signals of the base.")
    strongest: float = Field(8.0, ge=2, le=1e6, description="Strongest signal; the weakest is 2.")
    top_k: int = Field(10, ge=1, le=20, description="Leading directions that are judged.")
    norms: Strengths = Field(
        (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0), description="‖ΔW‖_F/θ_c, ascending."
    )
    repeats: int = Field(10, ge=1, le=100_000, description="How often everything is drawn.")

    def trial(self, generator: torch.Generator) -> Iterator[Row]:
        """See :meth:`Experiment.trial`."""
        shape = (self.size, self.size)
        bases = {
            "noise": noise(shape, generator),
            "signals": noise_with_signals(shape, self.signals, self.strongest, generator),
        }
        full = dense_update(shape, 1.0, generator)
        B, A = gaussian_factors(shape, self.rank, 1.0, generator)
        for name, matrix in bases.items():
            base = Base.of(matrix)
            for norm in self.norms:
                for update, change in (("dense", norm * full), ("low rank", norm * B @ A)):
                    row = self._measure(base, change, update == "dense")
                    yield {"base": name, "update": update, "norm": norm, **row}

    def _measure(self, base: Base, change: torch.Tensor, is_dense: bool) -> Row:
        """The measured columns for one change of the base."""
        judged = base.judge(base.matrix + change, self.top_k)
        gamma = torch.linalg.svdvals(change)
        shape, sigma = (self.size, self.size), white_bulk((self.size, self.size)).sigma
        # a dense update adds to the noise, which moves the edge
        noisier = (sigma**2 + float(change.square().mean())) ** 0.5 if is_dense else sigma
        own = base.S.gt(noise_quantile(shape, sigma)).sum()
        return {
            "update_norm": float(gamma[0]),
            "above": 0 if is_dense else int((gamma > 1).sum()),
            "outliers": int((judged.sigma > noise_quantile(shape, noisier)).sum() - own),
            "counted": judged.counted,
            "score": float(judged.scores.score.mean()),
        }

    def plot(self, table: Table) -> Figure:
        """See :meth:`Experiment.plot`."""
        note = (
            f"points: mean ± sd of {self.repeats} draws, {self.size}×{self.size}, rank {self.rank};"
            " lines: spikes of the update above the threshold"
        )
        figure, axes = _draw.panels(2, 4, note=note, size=(2.7, 2.5))
        measures = {
            "update_norm": r"$\|\Delta W\|_2/\theta_c$",
            "outliers": "new outliers",
            "counted": f"score < {EPSILON:g} among the top {self.top_k}",
            "score": f"mean score of the top {self.top_k}",
        }
        for row, base in enumerate(("noise", "signals")):
            for panel, (name, title) in zip(axes[4 * row :], measures.items(), strict=False):
                for series, update in enumerate(("dense", "low rank")):
                    found = table.where(base=base, update=update)
                    _draw.points(panel, found, "norm", name, series=series, label=update)
                    if name == "outliers":
                        _draw.line(panel, found, "norm", "above", series=series)
                panel.set_xscale("log")
                _draw.set_labels(panel, r"$\|\Delta W\|_F/\theta_c$", title, f"base: {base}")
        axes[0].legend()
        return figure
