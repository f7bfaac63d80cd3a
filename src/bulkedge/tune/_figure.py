"""A watched run as a figure of matplotlib, which is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bulkedge._errors import InputError, MissingExtraError, install

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (
    ("new directions", ("new_directions", "intruders", "rotated")),
    ("per layer", ("new_directions_per_layer", "effective_rank")),
    ("lowest score", ("lowest_score",)),
    ("strongest spike / θ", ("strongest_spike",)),
    ("energy share", ("energy_share",)),
    ("drift", ("drift", "highest_drift")),
    ("expected at θ_k at the end", ("predicted_crossings",)),
)
"""The panels: what the axis says, and the figures that are drawn."""
LINES = {"strongest spike / θ": 1.0}
"""A value that a panel marks: from 1 on a generic spike makes an outlier."""
SIZE = 3.0, 2.2
"""Of a panel, in inches."""


def draw(history: Sequence[tuple[int, dict[str, float]]], epsilon: float) -> Figure:
    """A panel for each kind of figure, over the steps.

    Args:
        history: ``(step, metrics)`` of every check.
        epsilon: The bound on scores, which the panel of scores marks.

    Returns:
        The figure.

    Raises:
        InputError: If there is nothing to draw.
        MissingExtraError: Without matplotlib.
    """
    if not history:
        raise InputError("expected a run that was watched, got no check yet; call check() first")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            f"expected matplotlib for the figure, found none; {install('report')}"
        ) from None
    curves = {name: _curve(history, name) for _, names in PANELS for name in names}
    shown = [(label, [x for x in names if curves[x]]) for label, names in PANELS]
    shown = [(label, names) for label, names in shown if names]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * rows), layout="constrained")
    for place, (label, names) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, place + 1)
        for name in names:
            axes.plot(*zip(*curves[name], strict=True), marker=".", label=name.replace("_", " "))
        marked = epsilon if label == "lowest score" else LINES.get(label)
        if marked is not None:
            axes.axhline(marked, color="0.5", linestyle="--", linewidth=1)
        axes.set_ylabel(label)
        axes.set_xlabel("step")
        if len(names) > 1:
            axes.legend(fontsize="small", frameon=False)
    return figure


def _curve(history: Sequence[tuple[int, dict[str, float]]], name: str) -> list[tuple[int, float]]:
    """The steps at which a figure is known, and its values."""
    key = f"bulkedge/{name}"
    return [(step, figures[key]) for step, figures in history if key in figures]
