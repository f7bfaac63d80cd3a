"""Noise with entries that are not Gaussian."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from bulkedge.rmt import SingularValueLaw, edge_test, fit_bulk

from . import _draw
from ._experiment import Experiment, Row
from ._model import LEVEL, Base, gaussian, spiked_update, white_bulk
from ._table import Table
from .laws import distance

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Entries = Literal["gaussian", "uniform", "rademacher", "t10", "t5", "t3", "correlated"]


class Universality(Experiment):
    """Entries of other distributions: where the Gaussian theory holds and where it breaks."""

    name: ClassVar[str] = "universality"
    keys: ClassVar = {
        "entries": "distribution of an entry, of equal variance; t3: Student's t with 3 degrees of "
        "freedom; correlated: Gaussian rows with correlation ρ^|i−j|"
    }
    measured: ClassVar = {
        "distance": "Kolmogorov–Smirnov distance of the singular values to the law",
        "false_alarm": "whether fit_bulk found a spike in noise, at 5 %",
        "false_alarm_known": "whether the edge test with the true τ finds one, at 5 %",
        "white": "whether fit_bulk took noise for white",
        "false_spikes": "how many spikes fit_bulk found in noise",
        "location": "largest singular value with a spike, in units of θ_c",
        "left_overlap": "|⟨u, û⟩|² of the spike's and the leading left vector",
    }
    predicted: ClassVar = {
        "theory_location": "that of the spike for white noise",
        "theory_sd": "its standard deviation",
        "theory_left_overlap": "|⟨u, û⟩|² for white noise",
    }
    quick: ClassVar = {"size": 40, "repeats": 3}

    size: int = Field(120, ge=20, le=2000, description="Side of the square matrix.")
    theta: float = Field(2.0, gt=0, le=1e6, description="Strength of the spike, θ/θ_c.")
    entries: tuple[Entries, ...] = Field(
        get_args(Entries), min_length=1, description="Distributions of an entry."
    )
    correlation: float = Field(0.5, gt=-1, lt=1, description="ρ of the correlated rows.")
    repeats: int = Field(200, ge=1, le=100_000, description="How often everything is drawn.")

    def trial(self, generator: torch.Generator) -> Iterator[Row]:
        """See :meth:`Experiment.trial`."""
        shape = (self.size, self.size)
        sigma = white_bulk(shape).sigma
        law = SingularValueLaw.of(shape, sigma)
        draws = self._draws()
        for name in self.entries:
            W = sigma * draws[name](generator)
            values = torch.linalg.svdvals(W)
            fit = fit_bulk(values, shape, significance=LEVEL)
            B, A = spiked_update(shape, torch.tensor([self.theta]), generator)
            tuned = Base.of(W + B @ A)
            yield {
                "entries": name,
                "distance": distance(values.numpy(), law.cdf),
                "false_alarm": fit.spikes > 0,
                "false_alarm_known": edge_test(float(values[0]), shape, sigma=sigma) < LEVEL,
                "white": fit.white,
                "false_spikes": fit.spikes,
                "location": float(tuned.S[0]),
                "left_overlap": float((tuned.U[:, 0] @ B[:, 0] / self.theta).square()),
            }

    def _draws(self) -> dict[Entries, Callable[[torch.Generator], Tensor]]:
        """A function for each distribution that draws a matrix with entries of variance 1."""
        n = self.size
        return {
            "gaussian": lambda generator: gaussian((n, n), generator),
            "uniform": lambda generator: _uniform(n, generator),
            "rademacher": lambda generator: _uniform(n, generator).sign(),
            "t10": lambda generator: _student(n, 10, generator),
            "t5": lambda generator: _student(n, 5, generator),
            "t3": lambda generator: _student(n, 3, generator),
            "correlated": lambda generator: _correlated(n, self.correlation, generator),
        }

    def theory(self, key: Row) -> Row:
        """See :meth:`Experiment.theory`."""
        spike = white_bulk((self.size, self.size)).spike(self.theta)
        return {
            "theory_location": spike.location,
            "theory_sd": spike.sd,
            "theory_left_overlap": spike.left_overlap,
        }

    def plot(self, table: Table) -> Figure:
        """See :meth:`Experiment.plot`."""
        note = (
            f"{self.repeats} draws, {self.size}×{self.size}, ρ = {self.correlation:g}; "
            "grey: theory for white noise"
        )
        figure, axes = _draw.panels(2, 2, note=note, size=(3.8, 2.7))
        measures = {
            "distance": ("distance to the law", 0.0),
            "false_alarm": ("share of noise matrices", LEVEL),
            "location": (r"$s_1/\theta_c$ with a spike", table.numbers("theory_location")[0]),
            "left_overlap": (
                r"left overlap $|\langle u, û\rangle|^2$", table.numbers("theory_left_overlap")[0],
            ),
        }  # fmt: skip
        for panel, (name, (title, theory)) in zip(axes, measures.items(), strict=True):
            bars = name != "false_alarm"
            _draw.points(panel, table, "entries", name, series=0, bars=bars, label="a spike found")
            panel.axhline(theory, color=_draw.GREY, linewidth=1)
            _draw.set_labels(panel, "entries", title)
        _draw.points(
            axes[1], table, "entries", "white", series=1, bars=False, label="taken for white"
        )
        axes[1].legend()
        return figure


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    """Entries uniform on ±√3."""
    return 12**0.5 * (torch.rand((n, n), generator=generator, dtype=torch.float64) - 0.5)


def _student(n: int, freedom: int, generator: torch.Generator) -> Tensor:
    """Entries of Student's t distribution, scaled to variance 1."""
    chi_squared = gaussian((freedom, n * n), generator).square().sum(0).view(n, n)
    return gaussian((n, n), generator) * ((freedom - 2) / chi_squared).sqrt()


def _correlated(n: int, correlation: float, generator: torch.Generator) -> Tensor:
    """Gaussian rows with correlation ρ^|i−j| between columns i and j."""
    lags = (torch.arange(n)[:, None] - torch.arange(n)).abs().double()
    return gaussian((n, n), generator) @ torch.linalg.cholesky(correlation**lags).mT
