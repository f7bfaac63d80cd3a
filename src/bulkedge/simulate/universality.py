"""Entries that are not Gaussian."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from bulkedge.rmt import SingularValueLaw, edge_test, fit_bulk

from . import _draw
from ._model import LEVEL, Base, gaussian, spikes, white
from ._table import Experiment, Row, Table
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
        sigma = white(shape).sigma
        law = SingularValueLaw.of(shape, sigma)
        draws = self._draws()
        for name in self.entries:
            W = sigma * draws[name](generator)
            values = torch.linalg.svdvals(W)
            fit = fit_bulk(values, shape, significance=LEVEL)
            B, A = spikes(shape, torch.tensor([self.theta]), generator)
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
        """How to draw a matrix of each kind, entries of variance 1."""
        n = self.size
        shape = (n, n)

        def uniform(generator: torch.Generator) -> Tensor:
            return 12**0.5 * (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5)

        def student(freedom: int) -> Callable[[torch.Generator], Tensor]:
            def draw(generator: torch.Generator) -> Tensor:
                below = gaussian((freedom, n * n), generator).square().sum(0).view(n, n)
                return gaussian(shape, generator) * ((freedom - 2) / below).sqrt()

            return draw

        def correlated(generator: torch.Generator) -> Tensor:
            apart = (torch.arange(n)[:, None] - torch.arange(n)).abs().double()
            return gaussian(shape, generator) @ torch.linalg.cholesky(self.correlation**apart).mT

        return {
            "gaussian": lambda generator: gaussian(shape, generator),
            "uniform": uniform,
            "rademacher": lambda generator: uniform(generator).sign(),
            "t10": student(10),
            "t5": student(5),
            "t3": student(3),
            "correlated": correlated,
        }

    def theory(self, key: Row) -> Row:
        """See :meth:`Experiment.theory`."""
        spike = white((self.size, self.size)).spike(self.theta)
        return {
            "theory_location": spike.location,
            "theory_sd": spike.sd,
            "theory_left_overlap": spike.left_overlap,
        }

    def paint(self, table: Table) -> Figure:
        """See :meth:`Experiment.paint`."""
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
        for panel, (name, (told, theory)) in zip(axes, measures.items(), strict=True):
            bars = name != "false_alarm"
            _draw.points(panel, table, "entries", name, look=0, bars=bars, label="a spike found")
            panel.axhline(theory, color=_draw.GREY, linewidth=1)
            _draw.labels(panel, "entries", told)
        _draw.points(
            axes[1], table, "entries", "white", look=1, bars=False, label="taken for white"
        )
        axes[1].legend()
        return figure
