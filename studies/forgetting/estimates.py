"""Estimates with intervals: ranks, scaling curves, and the bootstrap over clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Line = dict[str, Any]
DRAWS = 4_000
LEAST_CLUSTERS = 5
"""With fewer no interval is given."""
PRIMARY = 8
"""Primary comparisons, among which the level of *clear* is divided."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval.

    Attributes:
        value: The estimate.
        low: Lower end of the 95 % interval; None with too few clusters.
        high: Upper end.
        clear: Whether the interval at 0.05/8 excludes zero.
        clusters: How many there were.
        rows: How many values went in.
    """

    value: float
    low: float | None = None
    high: float | None = None
    clear: bool = False
    clusters: int = 0
    rows: int = 0

    def text(self, digits: int = 2, factor: float = 1.0) -> str:
        """As in the tables."""
        if self.rows == 0 or not np.isfinite(self.value):
            return "–"
        text = f"{_signed(factor * self.value, digits)}"
        if self.low is None or self.high is None:
            return text
        ends = (_signed(factor * x, digits) for x in (self.low, self.high))
        return f"{text} ({' to '.join(ends)})"

    @property
    def sign(self) -> int:
        """1 or −1 where the interval excludes zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def _signed(x: float, digits: int) -> str:
    text = f"{x:+.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def cluster(line: Line) -> str:
    """A method with a seed."""
    return f"{line['method']}/{line['seed']}"


def ranks(x: Sequence[float]) -> np.ndarray:
    """From 1; ties have their mean."""
    values = np.asarray(x, dtype=float)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of ranks; NaN where one is constant."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else float("nan")


class Resampled:
    """Rows whose clusters are drawn anew, all draws at once; the first draw is what was measured.

    Args:
        names: The cluster of each row.
    """

    def __init__(self, names: Sequence[str]) -> None:
        known = sorted(set(names))
        self.of = np.array([known.index(name) for name in names], dtype=int)
        self.clusters, self.rows = len(known), len(names)
        draws = DRAWS if self.clusters >= LEAST_CLUSTERS else 0
        drawn = np.random.default_rng(0).multinomial(
            self.clusters, np.full(self.clusters, 1 / max(self.clusters, 1)), size=draws
        )
        self.times = np.vstack([np.ones((1, self.clusters)), drawn])

    def sums(self, x: np.ndarray) -> np.ndarray:
        """Sums over rows, one a draw."""
        return self.times @ np.bincount(self.of, x, minlength=self.clusters)

    def means(self, x: np.ndarray) -> np.ndarray:
        """Means over rows, one a draw."""
        return self.sums(x) / self.sums(np.ones(self.rows))

    def spearman(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Correlations of ranks, one a draw; a row that is drawn twice is tied with itself."""
        weights = self.times[:, self.of]
        a, b = (weights @ _below(v).T for v in (x, y))
        total = weights.sum(1, keepdims=True)
        a, b = (r - (weights * r).sum(1, keepdims=True) / total for r in (a, b))
        size = np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(size > 1e-9, (weights * a * b).sum(1) / size, np.nan)

    def estimate(self, found: np.ndarray) -> Estimate:
        """The figure of the first draw, with the interval of the others."""
        value, rest = float(found[0]), found[1:]
        rest = rest[np.isfinite(rest)]
        if not len(rest):
            return Estimate(value, clusters=self.clusters, rows=self.rows)
        tail = 100 * 0.05 / PRIMARY / 2
        low, high, far, beyond = np.percentile(rest, [2.5, 97.5, tail, 100 - tail])
        clear = bool(far > 0 or beyond < 0)
        return Estimate(value, float(low), float(high), clear, self.clusters, self.rows)


def _below(x: np.ndarray) -> np.ndarray:
    """Which rows are below each row, ties by half: ranks are a product with this."""
    return (x[None, :] < x[:, None]) + 0.5 * (x[None, :] == x[:, None])


def rho(names: Sequence[str], x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Spearman's ρ with clusters drawn anew."""
    if not names:
        return Estimate(float("nan"))
    drawn = Resampled(names)
    return drawn.estimate(drawn.spearman(np.asarray(x, float), np.asarray(y, float)))


def mean(values: Sequence[float], names: Sequence[str]) -> Estimate:
    """The mean over rows, with clusters drawn anew; what is not finite is left out."""
    x = np.asarray(values, dtype=float)
    kept = np.isfinite(x)
    names = [name for name, keep in zip(names, kept, strict=True) if keep]
    if not names:
        return Estimate(float("nan"))
    drawn = Resampled(names)
    return drawn.estimate(drawn.means(x[kept]))


@dataclass(frozen=True)
class Curve:
    """A cell scaled as a whole.

    Attributes:
        scale: Ascending from 0.
        f: Forgetting at each.
        task: Accuracy at each.
        norm: ``‖ΔW‖_F`` as trained.
    """

    scale: np.ndarray
    f: np.ndarray
    task: np.ndarray
    norm: float

    @property
    def branch(self) -> int:
        """The place of the first maximum of the task."""
        return int(self.task.argmax())

    def at_norm(self, norm: float) -> tuple[float, float]:
        """Forgetting and task at a norm; NaN outside."""
        s = norm / self.norm
        if not self.scale[0] <= s <= self.scale[-1]:
            return float("nan"), float("nan")
        return float(np.interp(s, self.scale, self.f)), float(np.interp(s, self.scale, self.task))

    def at_forgetting(self, f: float) -> float:
        """The task where the curve first forgets as much; NaN outside of its branch."""
        return _crossing(self.f[: self.branch + 1], self.task[: self.branch + 1], f)

    def at_task(self, task: float) -> float:
        """Forgetting where the curve first does the task as well; NaN if it never does."""
        return _crossing(self.task[: self.branch + 1], self.f[: self.branch + 1], task)


FINE = 601
"""Points of a smooth curve."""


def smooth(curve: Curve) -> Curve:
    """The same points joined by cubics that keep their order (Fritsch and Carlson) for lines."""
    at = np.linspace(curve.scale[0], curve.scale[-1], FINE)
    f, task = (_cubics(curve.scale, y, at) for y in (curve.f, curve.task))
    return Curve(at, f, task, curve.norm)


def _cubics(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Hermite cubics through points, nowhere beyond their neighbours."""
    h, slope = np.diff(x), np.diff(y) / np.diff(x)
    inner = np.zeros(len(x) - 2)
    same = slope[:-1] * slope[1:] > 0
    before, after = (2 * h[1:] + h[:-1])[same], (h[1:] + 2 * h[:-1])[same]
    inner[same] = (before + after) / (before / slope[:-1][same] + after / slope[1:][same])
    m = np.concatenate([slope[:1], inner, slope[-1:]])
    i = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(h) - 1)
    t = (at - x[i]) / h[i]
    return (
        (2 * t**3 - 3 * t**2 + 1) * y[i] + (t**3 - 2 * t**2 + t) * h[i] * m[i]
        + (3 * t**2 - 2 * t**3) * y[i + 1] + (t**3 - t**2) * h[i] * m[i + 1]
    )  # fmt: skip


def _crossing(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """Y where x first reaches a value, coming from its start."""
    for i in range(len(x) - 1):
        low, high = x[i], x[i + 1]
        if low <= at <= high and high > low:
            share = (at - low) / (high - low)
            return float(y[i] + share * (y[i + 1] - y[i]))
    return float("nan")


def inner_errors(curve: Curve) -> list[float]:
    """The task at inner points, less what the other points say of it at that forgetting."""
    found = []
    for i in range(1, curve.branch):
        keep = np.arange(len(curve.scale)) != i
        rest = Curve(curve.scale[keep], curve.f[keep], curve.task[keep], curve.norm)
        found.append(curve.task[i] - rest.at_forgetting(curve.f[i]))
    return [error for error in found if np.isfinite(error)]


def left_out_r2(names: Sequence[str], X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared errors of a linear model of ranks, each cluster predicted by the others.

    Args:
        names: The cluster of each row.
        X: Ranks of the statistics, shape ``(rows, statistics)``.
        y: Ranks of what is predicted.

    Returns:
        Two columns: the squared error, and that of the others' mean.
    """
    errors = np.zeros((len(y), 2))
    design = np.column_stack([np.ones(len(y)), X])
    for name in sorted(set(names)):
        out = np.asarray(names) == name
        weights, *_ = np.linalg.lstsq(design[~out], y[~out], rcond=None)
        errors[out, 0] = (y[out] - design[out] @ weights) ** 2
        errors[out, 1] = (y[out] - y[~out].mean()) ** 2
    return errors
