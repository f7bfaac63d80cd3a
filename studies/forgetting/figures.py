"""The study's figures, drawn from the stored lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from answers import Data, sequences, task_of
from claims import QUESTIONS, primary
from tables import LABELS

from bulkedge.simulate._draw import panels, style, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARMS = (
    ("protect", "protect", "o-"), ("λ", "new directions × λ", "v--"),
    ("budget", "scaled to θ_k", "s"), ("clip", "clipped at θ_c", "D"), ("project", "project", "x"),
)  # fmt: skip
SHOWN = ("lora-r1/A/0", "lora-r8/A/0", "lora-r64/A/0", "full/A/0")


def _label(cell: str) -> str:
    method, task, seed = cell.split("/")
    return f"{LABELS[method]}, task {task}, seed {seed}"


def frontier(data: Data) -> Figure:
    """Task against forgetting: scaling and what is done instead."""
    cells = [cell for cell in SHOWN if cell in data.by_cell] or list(data.by_cell)[:4]
    figure, axes = panels(1, max(1, len(cells)), note="right and down is better", size=(2.9, 2.8))
    for place, cell in zip(axes, cells, strict=False):
        curve = data.curve(cell)
        place.plot(100 * curve.task, curve.f, "-", color="0.6", label="scaled", marker=".")
        for what, label, mark in ARMS:
            rows = [row for row in data.by_cell[cell] if row["what"] == what]
            rows.sort(key=lambda row: row["setting"])
            x, y = [100 * task_of(row) for row in rows], [data.forgetting(row) for row in rows]
            if rows:
                place.plot(x, y, mark, label=label, markersize=4, linewidth=1)
        place.set_title(_label(cell), fontsize=8)
        place.set_xlabel("task accuracy, %")
        place.set_xlim(left=max(0, 100 * curve.task.max() - 35))
    axes[0].set_ylabel("forgetting of retrieval")
    axes[0].legend(fontsize=6)
    return figure


def predictors(data: Data) -> Figure:
    """Forgetting against three statistics, trained cells and interventions."""
    names = ("count", "frobenius", "drift")
    titles = ("new directions", "‖ΔW‖_F", "drift on kept texts")
    figure, axes = panels(1, 3, note="dark: trained cells; light: interventions on them")
    for place, name, title in zip(axes, names, titles, strict=True):
        for rows, colour, size in ((data.treated, "0.8", 4), (data.single, "C0", 14)):
            x = np.array([row["weights"][name] for row in rows])
            place.scatter(
                x,
                [data.forgetting(row) for row in rows],
                s=size,
                color=colour,
                linewidths=0,
                rasterized=len(rows) > 100,
            )
        place.set_xlabel(title)
        if name == "drift":
            place.set_xscale("symlog", linthresh=1e-3)
    axes[0].set_ylabel("forgetting of retrieval")
    return figure


def tasks(data: Data) -> Figure:
    """After A, B and C."""
    figure, axes = panels(1, 3, note="means over seeds")
    values: tuple[tuple[str, Callable], ...] = (
        ("new directions", lambda line: line["weights"]["count"]),
        ("forgetting of retrieval", data.forgetting),
        ("accuracy on A, %", lambda line: 100 * line["figures"]["task A"]),
    )
    for method in LABELS:
        its = [row for row in sequences(data) if row[0]["method"] == method]
        for place, (title, value) in zip(axes, values, strict=True):
            if its:
                means = [np.mean([value(row[i]) for row in its]) for i in range(3)]
                place.plot(
                    ["A", "A, B", "A, B, C"], means, "o-", label=LABELS[method], markersize=3
                )
            place.set_ylabel(title)
    axes[0].legend(fontsize=6)
    return figure


def effects(data: Data) -> Figure:
    """The primary comparisons with their intervals."""
    found = primary(data)
    figure, (place,) = panels(
        1, 1, note="95 % intervals; P5 and P6 as shares, not points", size=(6.4, 2.7)
    )
    for i, estimate in enumerate(reversed(found.values())):
        if estimate.low is not None and estimate.high is not None:
            place.plot([estimate.low, estimate.high], [i, i], "-", color="C0")
        place.plot([estimate.value], [i], "o", color="C0", markersize=4)
    _lines(place, [f"{name}: {QUESTIONS[name]}" for name in reversed(found)])
    return figure


def _lines(place: Axes, labels: list[str]) -> None:
    place.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    place.set_yticks(range(len(labels)), labels, fontsize=6)


FIGURES: dict[str, Callable[[Data], Figure]] = {
    "study_frontier": frontier, "study_predictors": predictors, "study_sequences": tasks,
    "study_effects": effects,
}  # fmt: skip


def draw(data: Data, folder: Path) -> None:
    """Every figure as SVG."""
    for name, make in FIGURES.items():
        with style():
            (folder / f"{name}.svg").write_text(to_svg(make(data)) + "\n", encoding="utf-8")
