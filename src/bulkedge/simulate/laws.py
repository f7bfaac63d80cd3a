"""Spectra of noise, and the laws that they follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from bulkedge.rmt import Law, MarchenkoPastur, QuarterCircle, Semicircle, SingularValueLaw

from . import _draw
from ._experiment import Experiment, Row
from ._model import gaussian
from ._table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Function = Callable[[Any], Any]


@dataclass(frozen=True)
class _Ensemble:
    """A random spectrum, the law that it follows, and another law that is cited for it."""

    values: Callable[[torch.Generator], torch.Tensor]
    right: Law
    wrong_cdf: Function
    wrong_pdf: Function
    axis: str
    names: tuple[str, str]


class Laws(Experiment):
    """Spectra of noise, each against the law that it follows and against one often cited for it."""

    name: ClassVar[str] = "laws"
    keys: ClassVar = {
        "ensemble": "symmetric: eigenvalues; square, wide: singular values; tall: eigenvalues of "
        "WWᵀ, most of them zero; entries of variance 1/columns",
        "x": "middle of a histogram bin",
    }
    measured: ClassVar = {
        "density": "share of the spectrum in the bin over its width, zeros not shown",
        "distance_right": "Kolmogorov–Smirnov distance of the whole spectrum to its law",
        "distance_wrong": "the same to the other law",
    }
    predicted: ClassVar = {
        "right": "density of the law: semicircle, quarter circle, singular-value law, "
        "Marchenko–Pastur with its atom",
        "wrong": "density of the other law: Marchenko–Pastur of values that were not squared; for "
        "tall the density without 1/c, of mass 1.75 at an aspect of 4",
    }
    quick: ClassVar = {"size": 60, "repeats": 2, "bins": 12}

    size: int = Field(500, ge=20, le=4000, description="Shorter side of a matrix.")
    aspect: int = Field(4, ge=2, le=16, description="Longer over shorter side of wide and tall.")
    bins: int = Field(40, ge=4, le=400, description="Bins of a histogram.")
    repeats: int = Field(4, ge=1, le=100_000, description="How often everything is drawn.")

    def trial(self, generator: torch.Generator) -> Iterator[Row]:
        """See :meth:`Experiment.trial`."""
        for name, ensemble in self._ensembles().items():
            values = ensemble.values(generator).numpy()
            distances = {
                "distance_right": distance(values, ensemble.right.cdf),
                "distance_wrong": distance(values, ensemble.wrong_cdf),
            }
            low, high = ensemble.right.bulk_support()
            edges = np.linspace(low - 0.05, high + 0.05, self.bins + 1)
            width = edges[1] - edges[0]
            # exact zeros are the atom, which no histogram can show
            counts, _ = np.histogram(values[np.abs(values) > 1e-9], edges)
            for x, count in zip((edges[1:] + edges[:-1]) / 2, counts, strict=True):
                density = count / (len(values) * width)
                yield {"ensemble": name, "x": float(x), "density": density, **distances}

    def theory(self, key: Row) -> Row:
        """See :meth:`Experiment.theory`."""
        ensemble = self._ensembles()[key["ensemble"]]
        return {"right": ensemble.right.pdf(key["x"]), "wrong": float(ensemble.wrong_pdf(key["x"]))}

    def _ensembles(self) -> dict[str, _Ensemble]:
        """The spectra by name."""
        n, aspect = self.size, self.aspect
        mp, tall = MarchenkoPastur(1.0), MarchenkoPastur(float(aspect))
        wide = MarchenkoPastur(1 / aspect)
        atom = 1 - 1 / aspect

        def without_factor(x: Any) -> Any:
            """The distribution function of the density without 1/c, as it is cited."""
            return np.where(np.asarray(x) < 0, 0.0, atom + aspect * (tall.cdf(x) - atom))

        return {
            "symmetric": _Ensemble(
                lambda g: _eigenvalues(n, g), Semicircle(), mp.cdf, mp.pdf, r"eigenvalue $\lambda$",
                ("semicircle", "Marchenko–Pastur"),
            ),
            "square": _Ensemble(
                lambda g: _singular_values(n, n, g), QuarterCircle(), mp.cdf, mp.pdf,
                r"singular value $s$", ("quarter circle", "Marchenko–Pastur"),
            ),
            "wide": _Ensemble(
                lambda g: _singular_values(n, aspect * n, g), SingularValueLaw(1 / aspect),
                wide.cdf, wide.pdf, r"singular value $s$",
                ("singular-value law", "Marchenko–Pastur"),
            ),
            "tall": _Ensemble(
                lambda g: _eigenvalues_of_gram(n, aspect, g), tall, without_factor,
                lambda x: aspect * tall.pdf(x),
                r"eigenvalue of $WW^\top$", (f"Marchenko–Pastur, atom {atom:.3g}", "without 1/c"),
            ),
        }  # fmt: skip

    def plot(self, table: Table) -> Figure:
        """See :meth:`Experiment.plot`."""
        note = f"bars: {self.repeats} draws, shorter side {self.size}; D: distance to each law"
        figure, all_axes = _draw.panels(2, 2, note=note, size=(3.7, 2.7))
        for axes, (name, ensemble) in zip(all_axes, self._ensembles().items(), strict=True):
            found = table.where(ensemble=name)
            x, height = found.numbers("x"), found.numbers("density")
            axes.bar(x, height, width=x[1] - x[0], color="#CCCCCC")
            grid = np.linspace(x[0], x[-1], 600)
            for side, title, density, colour in (
                ("wrong", ensemble.names[1], ensemble.wrong_pdf, _draw.VERMILION),
                ("right", ensemble.names[0], ensemble.right.pdf, _draw.BLUE),
            ):
                distance = found.numbers(f"distance_{side}")[0]
                dash = "-" if side == "right" else "--"
                label = f"{title}, D = {distance:.3f}"
                axes.plot(grid, density(grid), dash, color=colour, label=label)
            axes.set_ylim(0, 1.7 * height.max())
            axes.legend(loc="upper right")
            _draw.set_labels(axes, ensemble.axis, "density", name)
        return figure


def _eigenvalues(n: int, generator: torch.Generator) -> torch.Tensor:
    """Eigenvalues of a symmetric matrix of noise."""
    G = gaussian((n, n), generator)
    return torch.linalg.eigvalsh((G + G.mT) / (2 * n) ** 0.5)


def _singular_values(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Singular values of noise with entries of variance 1/columns."""
    return torch.linalg.svdvals(gaussian((rows, columns), generator) / columns**0.5)


def _eigenvalues_of_gram(n: int, aspect: int, generator: torch.Generator) -> torch.Tensor:
    """Eigenvalues of WWᵀ, for noise W with n columns and ``aspect`` times as many rows."""
    values = _singular_values(aspect * n, n, generator).square()
    return torch.cat([values, values.new_zeros((aspect - 1) * n)])


def distance(values: np.ndarray, cdf: Function) -> float:
    """``sup |F_n − F|``, taken from both sides of each value, so that both may have atoms."""
    at = np.unique(values)
    above = np.searchsorted(np.sort(values), at, side="right") / len(values)
    below = np.searchsorted(np.sort(values), at, side="left") / len(values)
    before = np.nextafter(at, -np.inf)
    return float(max(np.abs(cdf(at) - above).max(), np.abs(cdf(before) - below).max()))
