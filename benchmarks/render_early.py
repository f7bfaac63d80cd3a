"""The section of docs/fine-tuning.md on the early warning."""

from __future__ import annotations

import math
import statistics
from typing import Any

from bulkedge.tune._forecast import EXPONENTS, forecasts


def early_warning(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """A row for each run; the exponents of those that set them, and of those that judge them."""
    runs = [cell["of"] | cell["figures"] for cell in cells]
    lines = [
        "| schedule | rate | rank | beyond θ_k at step 20 | expected at the end, low to high | were "
        "| of these expected |",
        "|---|---|---|---|---|---|---|",
    ]
    right = []
    for run in runs:
        low, middle, high = (_beyond(run, p) for p in range(3))
        late = {i for i, x in enumerate(run["late"]) if x >= 1}
        early = sum(x >= 1 for x in run["early"])
        lines.append(
            f"| {run['schedule'].replace('_', ' ')} | {run['rate']:g} | {run['rank']} | {early} "
            f"| {len(middle)} ({len(low)} to {len(high)}) | {len(late)} | {len(late & middle)} |"
        )
        right.append(len(low) <= len(late) <= len(high))
    setting = [p for run in runs if run["schedule"] == "linear" for p in _exponents(run)]
    judging = [run for run in runs if run["schedule"] != "linear"]
    exponents = [p for run in judging for p in _exponents(run)]
    deciles = statistics.quantiles(setting, n=10)
    within = statistics.mean(EXPONENTS[0] <= p <= EXPONENTS[2] for p in exponents)
    return {
        "table": "\n".join(lines),
        "low": deciles[0],
        "middle": statistics.median(setting),
        "high": deciles[8],
        "within": 100 * within,
        "runs": len(runs),
        "in_range": sum(right),
        "others": _counts(judging),
        "after": _counts([run for run in runs if run["schedule"] == "cosine"]),
    }


def _counts(runs: list[dict[str, Any]]) -> dict[str, int]:
    """How many layers were expected at or beyond θ_k, how many were there, how many are both."""
    foreseen = [_beyond(run, 1) for run in runs]
    were = [{i for i, x in enumerate(run["late"]) if x >= 1} for run in runs]
    both = sum(len(a & b) for a, b in zip(foreseen, were, strict=True))
    return {
        "expected": sum(map(len, foreseen)), "crossed": sum(map(len, were)), "both": both
    }  # fmt: skip


def _beyond(run: dict[str, Any], which: int) -> set[int]:
    """The layers that a forecast has at or beyond θ_k at the end: low, expected or high."""
    before, all_ = run["sums"]
    strengths = {str(i): x for i, x in enumerate(run["early"])}
    found = forecasts(strengths, 1, [before, all_ - before])
    return {int(x.name) for x in found if x.at_end[which] >= 1}


def _exponents(run: dict[str, Any]) -> list[float]:
    """With which power of the sum of the learning rates each layer's strength has grown."""
    grown = math.log(run["sums"][1] / run["sums"][0])
    return [math.log(b / a) / grown for a, b in zip(run["early"], run["late"], strict=True)]
