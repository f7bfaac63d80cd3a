"""The table of docs/protect.md: protecting a fine-tune against scaling it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any


def protect_table(measured: dict[str, Any]) -> str:
    """Both adapters, every arm."""
    lines = [
        "| adapter | arm | task | retrieval | scaled to that retrieval | drift | new directions |",
        "|---|---|---|---|---|---|---|",
        f"| none (the base) |  |  | {_percent(measured['base']['retrieval'])} |  |  |  |",
    ]
    for adapter in adapters(measured):
        arms = measured[adapter]
        lines.append(_line(adapter, "as trained", arms["trained"]))
        for row in arms["protected"]:
            beyond = row["retrieval"] > arms["scaled"][-1]["retrieval"]
            cells = ("≤ " if beyond else "") + _percent(at_retrieval(arms, row["retrieval"]))
            strength = f"protect, λ = {row['strength']:g}"
            lines.append(
                _line(adapter, strength, row, cells, f"{row['drift']:.4f}", str(row["intruders"]))
            )
        lines += [_line(adapter, f"scaled by {row['scale']:g}", row) for row in arms["scaled"]]
    return "\n".join(lines)


def gains(measured: dict[str, Any]) -> dict[str, float]:
    """Figures of λ = 1, and how much more of the task it keeps than scaling, in points."""
    found: dict[str, float] = {}
    for adapter in adapters(measured):
        arms = measured[adapter]
        (row,) = (r for r in arms["protected"] if r["strength"] == 1)
        lost = measured["base"]["retrieval"] - arms["trained"]["retrieval"]
        name = adapter.replace("-", "_")
        found[f"{name}_gain"] = 100 * (row["task"] - at_retrieval(arms, row["retrieval"]))
        found[f"{name}_back"] = 100 * (row["retrieval"] - arms["trained"]["retrieval"]) / lost
        found[f"{name}_cost"] = 100 * (arms["trained"]["task"] - row["task"])
    return found


def adapters(measured: dict[str, Any]) -> list[str]:
    """The adapters that were measured."""
    return [name for name in measured if name != "base"]


def at_retrieval(arms: dict[str, Any], retrieval: float) -> float:
    """The task's accuracy that scaling leaves at a retrieval, between two scales that were tried."""
    points = [(r["retrieval"], r["task"]) for r in (arms["trained"], *arms["scaled"])]
    for (low, before), (high, after) in pairwise(points):
        if low <= retrieval <= high:
            return before + (after - before) * (retrieval - low) / (high - low)
    return min(task for _, task in points)  # beyond the last scale: at most this


def _line(adapter: str, arm: str, row: dict[str, Any], *more: str) -> str:
    cells = [adapter, arm, _percent(row["task"]), _percent(row["retrieval"]), *more]
    return "| " + " | ".join(cells + [""] * (7 - len(cells))) + " |"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
