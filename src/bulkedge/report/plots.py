"""The charts of a report for papers: a record in, axes of matplotlib out.

    figure, axes = matplotlib.pyplot.subplots()
    scores(record, "encoder.layer.0.attention.self.value.weight", ax=axes)
    figure.savefig("scores.pdf")

Colours are distinguishable without colour vision (Okabe and Ito); everything is drawn as vectors.
Needs the extra ``[report]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bulkedge._errors import InputError, MissingExtraError, install
from bulkedge.intruder import Verdict
from bulkedge.records import Matrix, Record

from .verdicts import APPEARANCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def scores(record: Record, name: str, *, side: str = "left", ax: Axes | None = None) -> Axes:
    """The score of each leading direction, its interval, and ε.

    Args:
        record: The record.
        name: Of the matrix.
        side: ``"left"`` or ``"right"``.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        InputError: If the record has no such matrix, or nothing of that side.
        MissingExtraError: Without matplotlib.
    """
    matrix, ax = _matrix(record, name), _axes(ax)
    found = [direction for direction in matrix.directions if direction.side == side]
    if not found:
        raise InputError(f"{name}: no directions of the {side} side in this record")
    for verdict, look in APPEARANCE.items():
        mine = [direction for direction in found if direction.verdict is verdict]
        if mine:
            y = np.array([direction.score for direction in mine])
            low = np.array([direction.score_lower for direction in mine])
            high = np.array([direction.score_upper for direction in mine])
            ax.errorbar(
                [direction.index for direction in mine],
                y,
                yerr=np.clip([y - low, high - y], 0, None),
                fmt=look.mark,
                color=look.ink,
                label=verdict.value,
            )
    ax.axhline(record.recipe.epsilon, color="0.4", linestyle="--", linewidth=1)
    ax.set(xlabel="direction", ylabel="score", ylim=(0, 1.05))
    ax.legend(frameon=False)
    return ax


def scree(record: Record, name: str, *, ax: Axes | None = None) -> Axes:
    """Singular values of the base, those of the leading tuned directions, and the bulk's edge.

    Args:
        record: The record.
        name: Of the matrix.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        InputError: If the record has no such matrix, or no spectrum of it.
        MissingExtraError: Without matplotlib.
    """
    matrix, ax = _matrix(record, name), _axes(ax)
    ranks, values = _spectrum(matrix)
    ax.plot(ranks + 1, values, color="0.3", label="base")
    sides = [angles.side for angles in matrix.angles][:1]
    for verdict, look in APPEARANCE.items():
        mine = [d for d in matrix.directions if d.verdict is verdict and d.side in sides]
        if mine:
            ax.plot(
                [d.index + 1 for d in mine],
                [d.sigma for d in mine],
                look.mark,
                color=look.ink,
                label=f"tuned, {verdict.value}",
            )
    if matrix.bulk is not None:
        ax.axhline(matrix.bulk.edge, color="0.4", linestyle="--", linewidth=1)
    ax.set(xscale="log", xlabel="rank", ylabel="singular value")
    ax.legend(frameon=False)
    return ax


def density(record: Record, name: str, *, bins: int = 60, ax: Axes | None = None) -> Axes:
    """The histogram of the base's singular values, and the bulk's edge.

    Args:
        record: The record.
        name: Of the matrix.
        bins: Of the histogram.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        InputError: If the record has no such matrix, or no spectrum of it.
        MissingExtraError: Without matplotlib.
    """
    matrix, ax = _matrix(record, name), _axes(ax)
    ranks, values = _spectrum(matrix)
    everything = np.interp(np.arange(ranks[-1] + 1), ranks, values)
    ax.hist(everything, bins=bins, density=True, color=APPEARANCE[Verdict.ALIGNED].ink)
    if matrix.bulk is not None:
        ax.axvline(matrix.bulk.edge, color="0.4", linestyle="--", linewidth=1)
    ax.set(xlabel="singular value", ylabel="density")
    return ax


def spikes(record: Record, name: str, *, ax: Axes | None = None) -> Axes:
    """The strongest spikes of a low-rank update over the limit θ_k of its matrix.

    A dotted line marks the threshold θ_c, where an outlier is born.

    Args:
        record: The record.
        name: Of the matrix.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        InputError: If the record has no such matrix, or no spikes of it.
        MissingExtraError: Without matplotlib.
    """
    matrix, ax = _matrix(record, name), _axes(ax)
    if not matrix.predicted or not matrix.top_k_threshold:
        raise InputError(f"{name}: no spikes of a low-rank update in this record")
    heights = [row.theta / matrix.top_k_threshold for row in matrix.predicted]
    colours = [
        APPEARANCE[Verdict.INTRUDER if height > 1 else Verdict.ALIGNED].ink for height in heights
    ]
    ax.bar(range(len(heights)), heights, color=colours)
    ax.axhline(1, color="0.4", linestyle="--", linewidth=1)
    ax.axhline(
        (matrix.threshold or 0.0) / matrix.top_k_threshold, color="0.4", linestyle=":", linewidth=1
    )
    ax.set(xlabel="spike", ylabel="θ / θ_k")
    return ax


def similarity(record: Record, name: str, *, side: str = "left", ax: Axes | None = None) -> Axes:
    """The |cosines| of tuned directions (rows) with the base's leading vectors (columns).

    Args:
        record: The record.
        name: Of the matrix.
        side: ``"left"`` or ``"right"``.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        InputError: If the record has no such matrix, or nothing of that side.
        MissingExtraError: Without matplotlib.
    """
    matrix, ax = _matrix(record, name), _axes(ax)
    rows = [angles.similarity for angles in matrix.angles if angles.side == side]
    if not rows or not rows[0]:
        raise InputError(f"{name}: no similarities of the {side} side in this record")
    cells = np.asarray(rows[0])
    edges = (np.arange(size + 1) - 0.5 for size in cells.shape)
    y, x = edges
    mesh = ax.pcolormesh(x, y, cells, cmap="cividis", vmin=0, vmax=1)  # vectors, no image
    ax.invert_yaxis()
    ax.set(xlabel="base vector", ylabel="tuned direction")
    ax.figure.colorbar(mesh, ax=ax, label="|cosine|")
    return ax


def _matrix(record: Record, name: str) -> Matrix:
    """The row of a matrix."""
    for matrix in record.matrices:
        if matrix.name == name:
            return matrix
    known = [matrix.name for matrix in record.matrices]
    raise InputError(f"expected a matrix of the record such as {known[:1]}, got {name!r}")


def _spectrum(matrix: Matrix) -> tuple[Any, Any]:
    """Ranks and values of the outline."""
    if matrix.spectrum is None:
        raise InputError(f"{matrix.name}: no spectrum in this record")
    return np.array(matrix.spectrum.ranks), np.array(matrix.spectrum.values)


def _axes(ax: Axes | None) -> Axes:
    """The axes given, or those of a new figure."""
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            f"expected matplotlib for a plot, found none; {install('report')}"
        ) from None
    return Figure(layout="constrained").subplots()
