"""Estimates with intervals: ranks, scaling curves, and the bootstrap over clusters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def bootstrap(
    names: Sequence[str], statistic: Callable[[np.ndarray], float], rows: int | None = None
) -> Estimate:
    """A statistic of rows, whose clusters are drawn anew.

    Args:
        names: The cluster of each row.
        statistic: Called with the places of the rows, some of them several times.
        rows: How many values went in, if not one a row.

    Returns:
        The estimate.
    """
    known = sorted(set(names))
    places = [np.flatnonzero(np.asarray(names) == name) for name in known]
    count = len(names) if rows is None else rows
    if not known:
        return Estimate(float("nan"))
    value = statistic(np.arange(len(names)))
    if len(known) < LEAST_CLUSTERS:
        return Estimate(value, clusters=len(known), rows=count)
    draw = np.random.default_rng(0)
    drawn = draw.integers(len(known), size=(DRAWS, len(known)))
    found = [statistic(np.concatenate([places[i] for i in row])) for row in drawn]
    return _interval(value, np.array(found), len(known), count)


def mean(values: Sequence[float], names: Sequence[str]) -> Estimate:
    """The mean over rows, with clusters drawn anew."""
    x = np.asarray(values, dtype=float)
    kept = np.isfinite(x)
    x, names = x[kept], [name for name, keep in zip(names, kept, strict=True) if keep]
    known = sorted(set(names))
    if not known:
        return Estimate(float("nan"))
    of = np.array([known.index(name) for name in names])
    sums, counts = np.bincount(of, x), np.bincount(of)
    if len(known) < LEAST_CLUSTERS:
        return Estimate(float(x.mean()), clusters=len(known), rows=len(x))
    drawn = np.random.default_rng(0).integers(len(known), size=(DRAWS, len(known)))
    found = sums[drawn].sum(1) / counts[drawn].sum(1)
    return _interval(float(x.mean()), found, len(known), len(x))


def _interval(value: float, found: np.ndarray, clusters: int, rows: int) -> Estimate:
    found = found[np.isfinite(found)]
    if not len(found):
        return Estimate(value, clusters=clusters, rows=rows)
    tail = 100 * 0.05 / PRIMARY / 2
    low, high, far, beyond = np.percentile(found, [2.5, 97.5, tail, 100 - tail])
    clear = bool(far > 0 or beyond < 0)
    return Estimate(value, float(low), float(high), clear, clusters, rows)


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


def _crossing(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """y where x first reaches a value, coming from its start."""
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
