"""The table of docs/protect.md on curvatures of the outputs, and on rounds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any


def sides_table(rows: list[dict[str, Any]]) -> str:
    """Every arm that was measured."""
    lines = [
        "| arm | λ | drift | task | retrieval | one round, one-sided, at that retrieval |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_order):
        found = None if _plain(row) else at_retrieval(rows, row["retrieval"])
        lines.append(
            f"| {_arm(row)} | {row['strength']:.2g} | {row['drift']:.4f} | "
            f"{100 * row['task']:.1f} % | {100 * row['retrieval']:.1f} % | "
            f"{'' if found is None else f'{100 * found:.1f} %'} |"
        )
    return "\n".join(lines)


def gains(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The least and the most that each arm has of the task beyond one-sided, in points."""
    found: dict[str, list[float]] = {}
    for row in rows:
        known = None if _plain(row) else at_retrieval(rows, row["retrieval"])
        if known is not None:
            name = _arm(row).split(",")[0] + (" alone" if "alone" in row["arm"] else "")
            name = "rounds" if row.get("rounds", 1) > 1 else name
            found.setdefault(name, []).append(100 * (row["task"] - known))
    least = {f"{name} least": min(values) for name, values in found.items()}
    return least | {f"{name} most": max(values) for name, values in found.items()}


def at_retrieval(rows: list[dict[str, Any]], retrieval: float) -> float | None:
    """The task's accuracy of one-sided at a retrieval, between two strengths that were tried."""
    points = sorted((row["retrieval"], row["task"]) for row in rows if _plain(row))
    for (low, before), (high, after) in pairwise(points):
        if low <= retrieval <= high:
            return before + (after - before) * (retrieval - low) / (high - low)
    return None


def _plain(row: dict[str, Any]) -> bool:
    return row["arm"] == "one-sided" and row["rounds"] == 1


def _arm(row: dict[str, Any]) -> str:
    rounds = row.get("rounds", 1)
    return row["arm"] if rounds == 1 else f"{row['arm']}, {rounds} rounds"


def _order(row: dict[str, Any]) -> tuple[bool, str, float]:
    return not _plain(row), _arm(row), row["strength"]
