"""What the steps of the walk share: quotes, colours, how a figure is drawn and saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

HERE = Path(__file__).parent
# Okabe and Ito's colours, which the colour-blind tell apart
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"
STYLE = {"svg.hashsalt": "bulkedge", "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8}


class Quote(NamedTuple):
    """Numbers, and the words in which the page has them."""

    values: list[float]
    shown: str


class Step(NamedTuple):
    """One step of the walk: what its section quotes, and its figure of some panels."""

    quotes: dict[str, Quote]
    figure: str | None = None
    panels: int = 1
    draw: Callable[[list[Any]], None] | None = None


def quote(shown: str, *values: float) -> Quote:
    """``values`` to six digits, and put into ``shown``."""
    return Quote(
        [float(f"{value:.6g}") for value in values], shown.format(*values).replace("-", "−")
    )


def histogram(axis: Any, values: Tensor, law: Any, *, name: str = "law") -> None:
    """The counts of values under the density of a law."""
    counts, edges = np.histogram(values.numpy(), 40, density=True)
    axis.stairs(counts, edges, fill=True, color=GREY, label="counted")
    x = np.linspace(*law.support(), 100)
    axis.plot(x, law.pdf(x), color=BLUE, label=name)


def points(axis: Any, x: np.ndarray, rows: np.ndarray, colour: str, label: str | None) -> None:
    """Means and standard deviations over repeats, the rows."""
    axis.errorbar(x, rows.mean(0), rows.std(0), fmt="o", ms=4, color=colour, label=label)


def save(step: Step) -> None:
    """Draw the figure of a step beside this file, the same bytes each time."""
    if step.draw is None:
        return
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        width = 5.0 if step.panels == 1 else 3.4 * step.panels
        figure = Figure(figsize=(width, 2.8), layout="constrained")
        axes = list(figure.subplots(1, step.panels, squeeze=False)[0])
        step.draw(axes)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            if axis.get_legend():
                axis.get_legend().get_frame().set(edgecolor="none", alpha=0.9)
        figure.savefig(HERE / f"{step.figure}.svg", metadata={"Date": None})
