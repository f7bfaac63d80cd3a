"""Steps 1 to 4 of the walk: noise, its edge, and what a spike does to it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from steps import BLUE, GREEN, GREY, RED, Step, histogram, points, quote
from torch import Tensor

from bulkedge.rmt import (
    MarchenkoPastur,
    QuarterCircle,
    Semicircle,
    SingularValueLaw,
    TracyWidom,
    WhiteBulk,
    edge_test,
)
from bulkedge.triplet import thin_svd
from bulkedge.update import BaseSpectrum, Prediction, predict_spikes

# 1


def noise(generator: torch.Generator, size: int = 1000) -> Step:
    """Eigenvalues and singular values of noise of unit scale, and their laws."""
    square = _normal(size, size, generator=generator) / size**0.5
    wide = _normal(size // 2, 2 * size, generator=generator) / (2 * size) ** 0.5
    eigenvalues = torch.linalg.eigvalsh((square + square.mT) / 2**0.5)
    panels = [
        ("eigenvalue, symmetric", eigenvalues, Semicircle()),
        ("singular value, square", torch.linalg.svdvals(square), QuarterCircle()),
        ("singular value, 500×2000", torch.linalg.svdvals(wide), SingularValueLaw(0.25)),
    ]

    def draw(axes: list[Any]) -> None:
        for axis, (name, values, law) in zip(axes, panels, strict=True):
            histogram(axis, values, law)
            axis.set(xlabel=name, ylabel="density")
        axes[1].legend(loc="upper right")

    values = panels[1][1]
    wrong = MarchenkoPastur(1.0)
    quotes = {
        "distance": quote("{:.3f}", _distance(values, QuarterCircle())),
        "distance_of_the_unsquared": quote("{:.2f}", _distance(values, wrong)),
        "largest_wide": quote("{:.3f}", float(panels[2][1][0])),
    }
    return Step(quotes, "noise", 3, draw)


# 2


def beyond_the_edge(generator: torch.Generator, shape: tuple[int, int], draws: int) -> Step:
    """The largest singular value of noise, against the edge and the Tracy–Widom law."""
    m, n = shape
    edge, law = m**0.5 + n**0.5, TracyWidom()
    largest = torch.stack(
        [torch.linalg.matrix_norm(_normal(m, n, generator=generator), 2) for _ in range(draws)]
    )
    a, b = (m - 0.5) ** 0.5, (n - 0.5) ** 0.5
    centre, scale = (a + b) ** 2, (a + b) * (1 / a + 1 / b) ** (1 / 3)
    limit = (centre + scale * law.isf(0.05)) ** 0.5

    def draw(axes: list[Any]) -> None:
        (axis,) = axes
        counts, bins = np.histogram((largest / edge).numpy(), 40, density=True)
        axis.stairs(counts, bins, fill=True, color=GREY, label=f"{draws} noise matrices")
        x = np.linspace(bins[0], bins[-1], 200)
        s = x * edge
        density = law.pdf((s**2 - centre) / scale) * 2 * s * edge / scale
        axis.plot(x, density, color=BLUE, label="Tracy–Widom")
        axis.axvline(1, color=RED, ls="--", label="asymptotic edge")
        axis.axvline(limit / edge, color=GREEN, ls=":", lw=2, label="5 % of noise lies beyond")
        axis.set(xlabel="largest singular value / τ(√m + √n)", ylabel="density")
        axis.legend()

    large = 4096
    p = 2 * (large - 0.5) ** 0.5
    top = (p**2 + p * (2 / (large - 0.5) ** 0.5) ** (1 / 3) * law.isf(0.01)) ** 0.5
    quotes = {
        "beyond_edge": quote("{:.1f} %", 100 * float((largest > edge).double().mean())),
        "beyond_edge_law": quote("{:.1f} %", 100 * edge_test(edge, shape, sigma=1.0)),
        "limit_law": quote("{:.0f} %", 100 * law.sf(0.0)),
        "beyond_limit": quote("{:.1f} %", 100 * float((largest > limit).double().mean())),
        "limit_over_edge": quote("{:.1f} %", 100 * (limit / edge - 1)),
        "limit_over_edge_4096": quote("{:.2f} %", 100 * (top / (2 * large**0.5) - 1)),
    }
    return Step(quotes, "tracy_widom", 1, draw)


# 3 and 4


class Trials(NamedTuple):
    """A spike in noise: rows are repeats, columns strengths θ/θ_c; theory in ``expected``."""

    shape: tuple[int, int]
    ratios: np.ndarray
    location: np.ndarray
    left: np.ndarray
    right: np.ndarray
    score: np.ndarray
    expected: list[Prediction]


FINE = np.linspace(0.0, 3.0, 151)
RATIOS = np.array([0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0])


def transition(generator: torch.Generator, shape: tuple[int, int], repeats: int) -> Trials:
    """The leading triplet of ``W0 + θuvᵀ`` by full SVDs, τ = 1."""
    m, n = shape
    critical = (m * n) ** 0.25
    rows, expected = [], []
    for _ in range(repeats):
        W0 = _normal(m, n, generator=generator)
        u, v = (_normal(size, 1, generator=generator) for size in shape)
        u, v = u / u.norm(), v / v.norm()
        U0, S0, _ = thin_svd(W0)
        spectrum = BaseSpectrum.from_values(S0, shape)
        expected.append(predict_spikes(spectrum, torch.from_numpy(FINE[FINE > 0] * critical)))
        row = []
        for ratio in RATIOS:
            U, S, V = thin_svd(W0 + ratio * critical * u @ v.mT)
            overlaps = [(x.mT @ Y[:, :1]).item() ** 2 for x, Y in ((u, U), (v, V))]
            row.append([S[0].item(), *overlaps, (U0.mT @ U[:, 0]).abs().max().item()])
        rows.append(row)
    return Trials(shape, RATIOS, *np.moveaxis(np.array(rows), 2, 0), expected)


def outlier(trials: Trials) -> Step:
    """Where the outlier lies, and how much of its vectors is the spike's."""
    bulk = WhiteBulk(trials.shape)
    theory = bulk.spike(FINE * bulk.threshold)

    def draw(axes: list[Any]) -> None:
        place, overlap = axes
        points(place, trials.ratios, trials.location / bulk.edge, BLUE, "simulated, ±1 sd")
        place.plot(FINE, theory.location / bulk.edge, color=BLUE, label="theory")
        place.set(ylabel="largest singular value / edge")
        for name, found, line, colour in (
            (f"u, of {trials.shape[0]} entries", trials.left, theory.left_overlap, BLUE),
            (f"v, of {trials.shape[1]} entries", trials.right, theory.right_overlap, RED),
        ):
            points(overlap, trials.ratios, found, colour, None)
            overlap.plot(FINE, line, color=colour, label=name)
        overlap.set(ylabel="overlap² with the spike")
        for axis in axes:
            axis.axvline(1, color="black", ls=":", lw=1)
            axis.set(xlabel="strength of the spike θ/θ_c")
            axis.legend()

    at = int(np.flatnonzero(trials.ratios == 1.5)[0])
    below = int(np.flatnonzero(trials.ratios == 0.75)[0])
    exact = bulk.spike(1.5 * bulk.threshold)
    quotes = {
        "location": quote("{:.2f}", exact.location),
        "location_mean": quote("{:.2f}", trials.location[:, at].mean()),
        "left": quote("{:.2f}", exact.left_overlap),
        "left_mean": quote("{:.2f}", trials.left[:, at].mean()),
        "right": quote("{:.2f}", exact.right_overlap),
        "right_mean": quote("{:.2f}", trials.right[:, at].mean()),
        "below": quote("{:.2f}", trials.location[:, below].mean() / bulk.edge),
        "below_overlap": quote("{:.2f}", trials.left[:, below].mean()),
    }
    return Step(quotes, "transition", 2, draw)


def vector(trials: Trials) -> Step:
    """The intruder score of the leading vector, and the chance that it is below one half."""
    fine = FINE[FINE > 0]
    new = torch.stack([each.left_new for each in trials.expected]).numpy().mean(0)
    score = np.median(torch.stack([each.left_score for each in trials.expected]).numpy(), axis=0)
    measured = (trials.score < 0.5).mean(0)
    above = fine > 1.001

    def draw(axes: list[Any]) -> None:
        middle, share = axes
        low, half, high = np.quantile(trials.score, [0.25, 0.5, 0.75], axis=0)
        bars = np.stack([half - low, high - half])
        middle.errorbar(trials.ratios, half, bars, fmt="o", ms=4, color=BLUE, label="simulated")
        middle.set(ylabel="score (median and quartiles)", ylim=(0, 1.02))
        share.plot(trials.ratios, measured, "o", ms=4, color=BLUE, label="simulated")
        share.set(ylabel="share with score < 0.5", ylim=(-0.02, 1.02))
        for axis, line in ((middle, score), (share, new)):
            axis.plot(fine[above], line[above], color=BLUE, label="predicted")
            axis.axvline(1, color="black", ls=":", lw=1)
            axis.set(xlabel="strength of the spike θ/θ_c")
            axis.legend()

    at = {ratio: i for i, ratio in enumerate(trials.ratios)}
    here = int(np.flatnonzero(np.isclose(fine, 1.5))[0])
    quotes = {
        "even": quote("{:.1f}", float(np.interp(0.5, measured, trials.ratios))),
        "share_just_above": quote("{:.0f} %", 100 * measured[at[1.1]]),
        "share_above": quote("{:.0f} %", 100 * measured[at[1.5]]),
        "share_predicted": quote("{:.0f} %", 100 * new[here]),
        "share_two": quote("{:.0f} %", 100 * measured[at[2.0]]),
        "score_above": quote("{:.2f}", float(np.median(trials.score[:, at[1.5]]))),
        "score_predicted": quote("{:.2f}", float(score[here])),
    }
    return Step(quotes, "score", 2, draw)


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _distance(values: Tensor, law: Any) -> float:
    """Largest distance between the counts of values and of a law, over their number."""
    ordered = values.sort().values
    steps = torch.arange(len(values) + 1) / len(values)
    below = law.cdf(ordered)
    return float(torch.maximum(below - steps[:-1], steps[1:] - below).max())
