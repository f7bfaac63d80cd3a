"""Bases whose singular values do not follow the Marchenko–Pastur law."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bulkedge.rmt import Bulk, EmpiricalBulk, WhiteBulk, fit_bulk

from . import _draw
from ._experiment import Experiment, Row, Strengths
from ._model import Base, gaussian, haar, spiked_update
from ._table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPECTRA = ("product", "rows", "power law")


class HeavyTailed(Experiment):
    """A spike on spectra that are not white: white fit, empirical bulk and exact equation."""

    name: ClassVar[str] = "heavy_tailed"
    keys: ClassVar = {
        "spectrum": "product of two Gaussian matrices; rows: Gaussian with log-normal row sizes; "
        "power law: singular values (i/p + 0.05)^(−a)",
        "strength": "θ/s_1(W0)",
    }
    measured: ClassVar = {
        "location": "largest singular value over s_1(W0), by an SVD",
        "exact": "the same by the secular equation",
        "white": "the same predicted by the white fit",
        "empirical": "the same predicted by the empirical bulk",
        "left_overlap": "|⟨u, û⟩|² of the spike's and the leading left vector",
        "white_overlap": "the same predicted by the white fit",
        "empirical_overlap": "the same predicted by the empirical bulk",
        "white_threshold": "θ_c/s_1(W0) of the white fit",
        "empirical_threshold": "θ_c/s_1(W0) of the empirical bulk; 0 for a hard edge",
    }
    quick: ClassVar = {"size": 60, "repeats": 2, "strengths": [0.3, 1.5]}

    size: int = Field(300, ge=40, le=2000, description="Side of the square matrix.")
    exponent: float = Field(0.5, gt=0, le=4, description="a of the power law.")
    spread: float = Field(0.4, ge=0, le=2, description="Standard deviation of log row sizes.")
    strengths: Strengths = Field(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0),
        description="θ/s_1(W0), ascending.",
    )

    def trial(self, generator: torch.Generator) -> Iterator[Row]:
        """See :meth:`Experiment.trial`."""
        shape = (self.size, self.size)
        for name in SPECTRA:
            base = Base.of(self._base(name, generator))
            fit = fit_bulk(base.S, shape)
            bulks = (
                WhiteBulk(shape, fit.sigma),
                EmpiricalBulk(base.S, shape, outliers=0 if fit.white else fit.spikes),
            )
            u, vt = spiked_update(shape, torch.ones(1), generator)
            for strength in self.strengths:
                row = _measure(base, u, vt, strength, *bulks)
                yield {"spectrum": name, "strength": strength, **row}

    def _base(self, name: str, generator: torch.Generator) -> Tensor:
        """A random base with the spectrum of this name."""
        n = self.size
        if name == "product":
            return gaussian((n, n), generator) @ gaussian((n, n), generator) / n
        if name == "rows":
            rows = (self.spread * gaussian((n, 1), generator)).exp()
            return rows * gaussian((n, n), generator) / math.sqrt(n)
        values = (torch.arange(n, dtype=torch.float64) / n + 0.05) ** -self.exponent
        return (haar(n, n, generator) * values) @ haar(n, n, generator).mT

    def plot(self, table: Table) -> Figure:
        """See :meth:`Experiment.plot`."""
        note = (
            f"points: mean ± sd of {self.repeats} draws, {self.size}×{self.size}; lines: predicted"
        )
        figure, axes = _draw.panels(2, len(SPECTRA), note=note)
        for column, name in enumerate(SPECTRA):
            found = table.where(spectrum=name)
            for panel, simulated, predicted, title in (
                (axes[column], "location", ("white", "empirical"), r"$s_1(W)/s_1(W_0)$"),
                (
                    axes[column + len(SPECTRA)], "left_overlap",
                    ("white_overlap", "empirical_overlap"), r"$|\langle u, û\rangle|^2$",
                ),
            ):  # fmt: skip
                _draw.points(panel, found, "strength", simulated, series=6, label="measured")
                for series, bulk in enumerate(predicted):
                    label, dash = bulk.removesuffix("_overlap"), ("--", "-")[series]
                    found_line = (found, "strength", bulk)
                    _draw.line(panel, *found_line, series=1 - series, label=label, dash=dash)
                _draw.set_labels(panel, r"strength $\theta/s_1(W_0)$", title, name)
        axes[0].legend()
        return figure


def _measure(
    base: Base, u: Tensor, vt: Tensor, strength: float, white: Bulk, empirical: Bulk
) -> Row:
    """The measured columns for one spike, in units of the largest singular value of the base."""
    size = float(base.S[0])
    update = (strength * size * u, vt)
    tuned = Base.of(base.matrix + update[0] @ vt)
    by_white, by_empirical = (bulk.spike(strength * size) for bulk in (white, empirical))
    return {
        "location": float(tuned.S[0]) / size,
        "exact": float(base.secular(update).singular_values(1)) / size,
        "white": by_white.location / size,
        "empirical": by_empirical.location / size,
        "left_overlap": float((tuned.U[:, 0] @ u[:, 0]).square()),
        "white_overlap": by_white.left_overlap,
        "empirical_overlap": by_empirical.left_overlap,
        "white_threshold": white.threshold / size,
        "empirical_threshold": empirical.threshold / size,
    }
