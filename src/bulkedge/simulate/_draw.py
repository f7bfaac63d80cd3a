"""Figures in one style, by the object interface of matplotlib, without global settings."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from bulkedge._errors import MissingExtraError, install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ._table import Table

# the palette of Okabe and Ito, which people with any colour vision can distinguish
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9",
)  # fmt: skip
BLACK, GREY = "#000000", "#767676"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MARKERS = "osD^vPX"

_STYLE = {
    "font.size": 9,
    "font.sans-serif": "DejaVu Sans",
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text, which takes less space than paths
    "svg.hashsalt": "bulkedge",
}


@contextmanager
def style() -> Iterator[None]:
    """Within this context figures have our style; the settings of the user stay as they are.

    Raises:
        MissingExtraError: Without matplotlib.
    """
    try:
        import matplotlib.style
    except ImportError:
        raise MissingExtraError(
            f"expected matplotlib for the figure, found none; {install('report')}"
        ) from None
    with matplotlib.style.context(["default", _STYLE]):
        yield


def to_svg(figure: Figure) -> str:
    """The figure as SVG text: the same bytes for the same figure.

    Args:
        figure: The result of ``Experiment.draw``.

    Returns:
        The text of an SVG file.

    Raises:
        MissingExtraError: Without matplotlib.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _shortened(buffer.getvalue())


def _shortened(svg: str) -> str:
    """The same SVG at half the length: two decimals, no indentation, classes for common styles."""
    svg = re.sub(r"'DejaVu Sans'(, sans-serif)?", "'DejaVu Sans', Verdana, sans-serif", svg)
    svg = re.sub(r"(\d\.\d\d)\d{2,}", r"\1", svg)
    svg = re.sub(r"<!--.*?-->|^\s+|\s+(?=\n)", "", svg, flags=re.MULTILINE | re.DOTALL)
    common = Counter(re.findall(r'(?<= style=")[^"]+', svg)).most_common(40)
    for i, (rule, _) in enumerate(common):
        svg = svg.replace(f'style="{rule}"', f'class="s{i}"')
    rules = "".join(f".s{i}{{{rule}}}\n" for i, (rule, _) in enumerate(common))
    return svg.replace("</style>", f"\n{rules}</style>", 1)


def panels(
    rows: int, columns: int, *, note: str = "", size: tuple[float, float] = (3.2, 2.7)
) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, row by row, with a note above that says how to read it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.3))
    axes = figure.subplots(rows, columns, squeeze=False)
    if note:
        figure.suptitle(note, x=0.01, ha="left", fontsize=8, color=GREY)
    return figure, list(axes.flat)


def points(
    axes: Axes,
    table: Table,
    x: str,
    y: str,
    *,
    series: int,
    label: str | None = None,
    bars: bool = True,
    joined: bool = False,
) -> None:
    """Simulated means and standard deviations; ``series`` selects colour and marker."""
    at, height = np.array(table.column(x)), table.numbers(y)
    colour, marker = COLOURS[series % len(COLOURS)], MARKERS[series % len(MARKERS)]
    if at.dtype.kind == "U":  # a column of text: its values side by side
        axes.set_xticks(range(len(at)), at.tolist(), rotation=40)
        at = np.arange(len(at), dtype=np.float64)
    axes.plot(
        at, height, marker + ("-" if joined else ""),
        color=colour, markersize=3.5, linewidth=0.9, label=label, zorder=2.5,
    )  # fmt: skip
    if bars and f"{y}_sd" in table.columns:
        spread, gap = np.nan_to_num(table.numbers(f"{y}_sd")), np.full_like(height, np.nan)
        ends = np.stack([height - spread, height + spread, gap], 1).ravel()  # one line with gaps
        axes.plot(np.repeat(at, 3), ends, "-", color=colour, linewidth=0.7, zorder=2)


def line(
    axes: Axes,
    table: Table,
    x: str,
    y: str,
    *,
    series: int,
    label: str | None = None,
    dash: str = "-",
) -> None:
    """A theoretical column as a line over the points."""
    curve(axes, table.numbers(x), table.numbers(y), series=series, label=label, dash=dash)


def curve(
    axes: Axes, x: object, y: object, *, series: int, label: str | None = None, dash: str = "-"
) -> None:
    """A line from any numbers."""
    colour = COLOURS[series % len(COLOURS)]
    axes.plot(np.asarray(x), np.asarray(y), dash, color=colour, label=label, alpha=0.8, zorder=3)


def integers(*all_axes: Axes) -> None:
    """Integer ticks, for ranks and counts, on both axes."""
    from matplotlib.ticker import MaxNLocator

    for axes in all_axes:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))


def mark(axes: Axes, *, x: float | None = None, y: float | None = None) -> None:
    """A thin line at a critical value."""
    line_style: dict[str, Any] = {"color": GREY, "linewidth": 0.7, "linestyle": ":", "zorder": 1}
    if x is not None:
        axes.axvline(x, **line_style)
    if y is not None:
        axes.axhline(y, **line_style)


def set_labels(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Name both axes, and the panel."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
