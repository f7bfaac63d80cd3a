"""Updates for several tasks, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bulkedge.spectral import project_spectral_ball

from . import _draw
from ._experiment import Experiment, Row
from ._model import EPSILON, Base, dense_update, gaussian_factors, noise_with_signals
from ._table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("dense", "low rank", "low rank, clipped")


class Sequential(Experiment):
    """Updates of several tasks add up: dense, low rank, and low rank kept below the threshold."""

    name: ClassVar[str] = "sequential"
    keys: ClassVar = {
        "method": "dense and low rank of equal norm; clipped: spikes above the limit are cut to it",
        "task": "how many tasks were learnt, 0 for the base",
    }
    measured: ClassVar = {
        "norm": "‖W − W0‖_F/θ_c",
        "counted": f"leading tuned directions with score < {EPSILON:g}",
        "score": "mean score of the leading tuned directions",
        "subspace": "‖U_kᵀ Û_k‖_F²/k: share of the base's k leading left directions that stayed",
        "weakest": "least ‖Û_kᵀu_i‖² among them: the base direction that stayed least",
    }
    quick: ClassVar = {"size": 60, "repeats": 2, "tasks": 2, "signals": 4, "top_k": 4}

    size: int = Field(300, ge=20, le=2000, description="Side of the square matrix.")
    tasks: int = Field(8, ge=1, le=100, description="Updates one after the other.")
    rank: int = Field(2, ge=1, description="Rank of a low-rank update.")
    norm: float = Field(5.0, gt=0, le=1e6, description="‖ΔW‖_F/θ_c of each, before a clip.")
    limit: float = Field(0.9, gt=0, le=1e6, description="Largest spike of a clipped update.")
    signals: int = Field(10, ge=1, description="Signals of the base.")
    strongest: float = Field(6.0, ge=2, le=1e6, description="Strongest signal; the weakest is 2.")
    top_k: int = Field(10, ge=1, le=20, description="Leading directions that are judged.")

    def trial(self, generator: torch.Generator) -> Iterator[Row]:
        """See :meth:`Experiment.trial`."""
        shape = (self.size, self.size)
        base = Base.of(noise_with_signals(shape, self.signals, self.strongest, generator))
        tuned: dict[str, Tensor] = dict.fromkeys(METHODS, base.matrix)
        for task in range(self.tasks + 1):
            if task:
                tuned = {name: tuned[name] + change for name, change in self._task(generator)}
            for method, matrix in tuned.items():
                yield {"method": method, "task": task, **self._measure(base, matrix)}

    def _task(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """The update for one task by each method."""
        shape = (self.size, self.size)
        yield METHODS[0], dense_update(shape, self.norm, generator)
        B, A = gaussian_factors(shape, self.rank, self.norm, generator)
        yield METHODS[1], B @ A
        yield METHODS[2], project_spectral_ball(B @ A, self.limit)

    def _measure(self, base: Base, tuned: Tensor) -> Row:
        """The measured columns for one tuned matrix."""
        k = self.top_k
        judged = base.judge(tuned, k)
        stayed = (base.U[:, :k].mT @ judged.u).square().sum(1)
        return {
            "norm": float((tuned - base.matrix).norm()),
            "counted": judged.counted,
            "score": float(judged.scores.score.mean()),
            "subspace": float(stayed.mean()),
            "weakest": float(stayed.min()),
        }

    def plot(self, table: Table) -> Figure:
        """See :meth:`Experiment.plot`."""
        note = (
            f"points: mean ± sd of {self.repeats} draws, {self.size}×{self.size}, "
            rf"rank {self.rank}, $\|\Delta W\|_F = {self.norm:g}\,\theta_c$ a task, "
            f"clipped at {self.limit:g}"
        )
        figure, axes = _draw.panels(2, 2, note=note)
        measures = {
            "counted": f"score < {EPSILON:g} among the top {self.top_k}",
            "subspace": r"$\|U_k^\top Û_k\|_F^2/k$",
            "weakest": r"$\min_i\|Û_k^\top u_i\|^2$",
            "norm": r"$\|W - W_0\|_F/\theta_c$",
        }
        for panel, (name, title) in zip(axes, measures.items(), strict=True):
            for series, method in enumerate(METHODS):
                found = table.where(method=method)
                _draw.points(panel, found, "task", name, series=series, label=method, joined=True)
            _draw.set_labels(panel, "tasks learnt", title)
        axes[0].legend()
        return figure
