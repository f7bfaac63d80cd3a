"""The tables of docs/protect.md on both sides, rounds, ridges and what a layer costs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from render_protect import ABILITIES, SHIPPED, Cell, Results, percent, table

SIDED = ("two-sided", "two-sided, A alone", "protect, 3 rounds")
BLOCK = {"pairs": 3, "wide": 1, "blocks": 32, "both": 6}
"""Llama 7B: distinct inputs of 4,096 and of 11,008 in each of 32 blocks; and pairs of matrices, of
inputs and outputs, of the four projections of an attention."""


def sides_table(results: Results) -> str:
    """Arms beside one round of one side, against that at equal retention."""
    rows = []
    for label, adapter in _adapters(results).items():
        for cell in _cells(results, adapter):
            rows.append(
                [label, cell["method"].removeprefix("protect, "), cell.get("losses", ""),
                 f"{cell['setting']:g}", percent(cell["task"]), percent(cell["recall"]),
                 f"{cell['structure']:.2f}", f"{cell['drift']:.4f}",
                 *(results.in_words(adapter, cell, a, "protect") for a in ABILITIES)]
            )  # fmt: skip
    return table(
        "| adapter | arm | losses: task, kept | λ | task | retrieval | likenesses | drift "
        "| against one-sided at that retrieval | at that rank | at those likenesses |",
        rows,
    )


def sides_figures(results: Results) -> dict[str, Any]:
    """What each arm keeps more than one-sided at equal retrieval, the least and the most."""
    found: dict[str, list[float]] = {}
    for adapter in _adapters(results).values():
        rank = adapter.split(",")[1].split()[-1]
        for cell in _cells(results, adapter):
            gain = results.gain(adapter, cell, "recall", "protect")
            if gain is not None:
                labelled = "" if cell.get("losses", "classes").startswith("classes") else " states"
                name = f"{cell['method'].removeprefix('protect, ')}{labelled} r{rank}"
                found.setdefault(name, []).append(gain)
    return {name: {"least": min(values), "most": max(values)} for name, values in found.items()}


def _adapters(results: Results) -> dict[str, str]:
    """Those with such arms, by what they are called in a table."""
    short = {adapter: label.replace("_", "-") for label, adapter in SHIPPED.items()}
    names = dict.fromkeys(c["adapter"] for c in results.cells if c["method"] in SIDED)
    return {short.get(name, name): name for name in sorted(names, key=list(names).index)}


def _cells(results: Results, adapter: str) -> list[Cell]:
    known = [c for c in results.cells if c["adapter"] == adapter and c["method"] in SIDED]
    return sorted(
        known, key=lambda c: (SIDED.index(c["method"]), c.get("losses", ""), c["setting"])
    )


def ridges_table(results: Results) -> str:
    """λ = 1 with other ridges, and how large the update is."""
    rows = []
    for label, adapter in SHIPPED.items():
        cells = [*results.of(adapter, "another ridge"), results.one(adapter, "protect", 1.0)]
        for cell in sorted(cells, key=lambda c: c["ridge"]):
            rows.append(
                [label.replace("_", "-"), f"{cell['ridge']:g}", percent(cell["task"]),
                 percent(cell["recall"]), f"{cell['structure']:.2f}", f"{cell['norm']:.1f}"]
            )  # fmt: skip
    return table("| adapter | ridge | task | retrieval | likenesses | ‖ΔW‖ |", rows)


def costs_table(cells: Iterable[Cell]) -> str:
    """What one layer costs."""
    names = {"one": "one side", "two": "both sides", "sketches": "one side, sketches of 1,024"}
    rows = []
    for cell in (c["of"] | c["figures"] for c in cells):
        rows.append(
            [f"{cell['inputs']:,}", names[cell["sides"]], _seconds(cell["once"]),
             _seconds(cell["update"]), f"{cell['memory'] / 1e6:,.0f} MB"]
        )  # fmt: skip
    return table("| inputs | how | once for a pair of moments | one update | memory |", rows)


def _seconds(value: float) -> str:
    return f"{1e3 * value:,.0f} ms" if value < 1 else f"{value:.1f} s"


def costs_figures(cells: Iterable[Cell]) -> dict[str, Any]:
    """Minutes that a model of the shape of Llama 7B takes on one core, by these layers."""
    once = {(c["of"]["sides"], c["of"]["inputs"]): c["figures"]["once"] for c in cells}
    blocks, attention = BLOCK["blocks"], BLOCK["pairs"] * once["one", 4_096]
    found = {"default": blocks * (attention + once["sketches", 11_008]) / 60}
    if ("one", 11_008) in once:
        found["exact"] = blocks * (attention + once["one", 11_008]) / 60
    if ("two", 4_096) in once:
        rest = once["one", 4_096] + once["sketches", 11_008]
        found["both"] = blocks * (BLOCK["both"] * once["two", 4_096] + rest) / 60
    return found
