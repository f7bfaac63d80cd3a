"""The tables of docs/fine-tuning.md, from their stored results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

HEAD = """| method | trained parameters | accuracy | new directions by seed | intruder, rotated | strongest update / θ_c | step |
|---|---|---|---|---|---|---|
"""


def finetune_table(rows: list[dict[str, Any]], times: dict[str, float]) -> str:
    """Every way to train: means over the seeds, and each seed's count."""
    methods = dict.fromkeys(r["method"] for r in rows)
    return HEAD + "\n".join(_row(method, rows, times[method]) for method in methods)


def _row(method: str, rows: list[dict[str, Any]], step: float) -> str:
    runs = sorted((r for r in rows if r["method"] == method), key=lambda r: r["seed"])

    def mean(value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.mean(value(run) for run in runs)

    accuracy = [100 * run["accuracy"] for run in runs]
    counts = ", ".join(str(run["intruder"] + run["rotated"]) for run in runs)
    cells = [
        method,
        f"{runs[0]['parameters']:,}",
        f"{statistics.mean(accuracy):.1f} % ({min(accuracy):.1f} to {max(accuracy):.1f})",
        counts,
        f"{mean(lambda r: r['intruder']):.1f}, {mean(lambda r: r['rotated']):.1f}",
        f"{mean(lambda r: r['strongest']):.2f}",
        f"{step:.0f} ms",
    ]
    return f"| {' | '.join(cells)} |"


def by_method(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each seed's count of new directions, and the mean accuracy in percent."""
    found = {}
    for method in dict.fromkeys(r["method"] for r in rows):
        runs = sorted((r for r in rows if r["method"] == method), key=lambda r: r["seed"])
        found[method] = {
            "counts": ", ".join(str(run["intruder"] + run["rotated"]) for run in runs),
            "accuracy": statistics.mean(100 * run["accuracy"] for run in runs),
        }
    return found


def rates_line(rows: list[dict[str, Any]]) -> str:
    """The learning rates that were chosen."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = best.get(row["method"])
        if known is None or row["accuracy"] > known["accuracy"]:
            best[row["method"]] = row
    return ", ".join(f"{method} {row['learning_rate']:g}" for method, row in best.items())
