"""The Baik–Ben Arous–Péché transition of one spike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from bulkedge.update.predict import BaseSpectrum, predict_spikes

from . import _draw
from ._experiment import Experiment, Row, Strengths
from ._model import EPSILON, Base, Shape, noise, spiked_update, white_bulk
from ._table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Transition(Experiment):
    """A spike crosses the threshold: outlier, overlaps and intruder score against theory."""

    name: ClassVar[str] = "transition"
    keys: ClassVar = {
        "shape": "square, wide or tall",
        "strength": "θ/θ_c, strength of the spike over the threshold",
    }
    measured: ClassVar = {
        "location": "largest singular value, in units of θ_c",
        "left_overlap": "|⟨u, û⟩|² of the spike's and the leading left vector",
        "right_overlap": "|⟨v, v̂⟩|², likewise",
        "score": "intruder score of û",
        "new": f"whether it is below {EPSILON:g}",
        "predicted_score": "median score predicted from the base's singular values; none below θ_c",
        "predicted_new": f"predicted chance of a score below {EPSILON:g}; none below θ_c",
    }
    predicted: ClassVar = {
        "theory_location": "√((θ² + τ²m)(θ² + τ²n))/θ, the edge below θ_c",
        "theory_sd": "its standard deviation",
        "theory_left_overlap": "(θ⁴ − τ⁴mn)/(θ²(θ² + τ²m)), 0 below θ_c",
        "theory_right_overlap": "(θ⁴ − τ⁴mn)/(θ²(θ² + τ²n)), likewise",
    }
    quick: ClassVar = {"size": 60, "repeats": 2, "strengths": [0.5, 1.5, 2.5]}

    size: int = Field(200, ge=20, le=2000, description="Shorter side of a matrix.")
    aspect: int = Field(4, ge=2, le=16, description="Longer over shorter side of wide and tall.")
    strengths: Strengths = Field(
        (0.25, 0.5, 0.75, 0.9, 1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0),
        description="θ/θ_c, ascending.",
    )
    repeats: int = Field(40, ge=1, le=100_000, description="How often everything is drawn.")

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes by name."""
        n, long = self.size, self.size * self.aspect
        return {"square": (n, n), "wide": (n, long), "tall": (long, n)}

    def trial(self, generator: torch.Generator) -> Iterator[Row]:
        """See :meth:`Experiment.trial`."""
        for name, shape in self.shapes.items():
            base = Base.of(noise(shape, generator))
            spectrum = BaseSpectrum.from_values(base.S, shape)
            strengths = torch.tensor(self.strengths, dtype=torch.float64)
            predicted = predict_spikes(spectrum, strengths, epsilon=EPSILON, draws=0)
            for i, theta in enumerate(self.strengths):
                u, vt = spiked_update(shape, torch.ones(1), generator)
                top = base.secular((theta * u, vt)).triplets(1)
                score = float(base.scores(top.u).score)
                yield {
                    "shape": name,
                    "strength": theta,
                    "location": float(top.sigma),
                    "left_overlap": float((u.mT @ top.u).square()),
                    "right_overlap": float((vt @ top.v).square()),
                    "score": score,
                    "new": score < EPSILON,
                    "predicted_score": float(predicted.left_score[i]) if theta > 1 else math.nan,
                    "predicted_new": float(predicted.left_new[i]) if theta > 1 else math.nan,
                }

    def theory(self, key: Row) -> Row:
        """See :meth:`Experiment.theory`."""
        spike = white_bulk(self.shapes[key["shape"]]).spike(key["strength"])
        return {
            "theory_location": spike.location,
            "theory_sd": spike.sd,
            "theory_left_overlap": spike.left_overlap,
            "theory_right_overlap": spike.right_overlap,
        }

    def plot(self, table: Table) -> Figure:
        """See :meth:`Experiment.plot`."""
        note = f"points: mean ± sd of {self.repeats} draws, shorter side {self.size}; lines: theory"
        figure, axes = _draw.panels(2, 3, note=note)
        measures = [
            ("location", "theory_location", r"largest singular value $s_1/\theta_c$"),
            (
                "left_overlap",
                "theory_left_overlap",
                r"left overlap $\beta_u = |\langle u, û\rangle|^2$",
            ),
            ("right_overlap", "theory_right_overlap", r"right overlap $\beta_v$"),
            ("score", "predicted_score", r"score $\max_i|\langle u_i, û\rangle|$"),
            ("location_sd", "theory_sd", r"standard deviation of $s_1/\theta_c$"),
            ("new", "predicted_new", f"share with score < {EPSILON:g}"),
        ]
        for panel, (simulated, theory, title) in zip(axes, measures, strict=True):
            for series, name in enumerate(self.shapes):
                found, bars = table.where(shape=name), simulated != "new"
                _draw.points(
                    panel, found, "strength", simulated, series=series, label=name, bars=bars
                )
                _draw.line(panel, found, "strength", theory, series=series)
            _draw.mark(panel, x=1.0)
            _draw.set_labels(panel, r"strength $\theta/\theta_c$", title)
        axes[0].legend()
        return figure
