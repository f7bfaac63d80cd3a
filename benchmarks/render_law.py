"""The tables of docs/before-you-train.md, from stored results and the published figures."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from bulkedge.auditing.rows import rank_fields
from bulkedge.checkpoint import open_adapter
from bulkedge.triplet import LowRank

HEAD = """| predicted critical scale | within 2× | within 1.25× | exact over predicted, median | AUC at s = 1 (5 to 95 %) | within one adapter, mean |
|---|---|---|---|---|---|
"""
NAMES = {
    "aligned": "**the law, with the measured alignment** (`aligned_scale`; AUC: its score at 1)",
    "generic": "random vectors of the same strengths (`generic_scale`; AUC: the chance by `predict`)",
    "theta_k": "θ_k/‖ΔW‖₂: it enters the leading ten",
    "theta_c": "θ_c/‖ΔW‖₂: the outlier is born",
    "theta_1": "D(σ₁)^(−½)/‖ΔW‖₂: it overtakes σ₁",
    "sigma_k": "σ₁₀(W0)/‖ΔW‖₂: no theory",
    "sigma_1": "‖W0‖₂/‖ΔW‖₂",
    "frobenius": "‖ΔW‖_F: an order, no scale",
}
PUBLISHED = (
    ("*θ_c, published for other models (cited)*", "82 %", "", "", "", "0.89 (mean over models)"),
    ("*the same with a second edge, from σ₁ (cited)*", "98 %", "", "", "", ""),
)
"""arXiv:2607.23711: 18 adapters, 9,840 layer scans, an AUC that is the mean over models."""
RANKS = """| rank | study: task, % | what the base could do, % kept | new directions | ‖ΔW‖_F | second experiment: task, % | new directions, by seed |
|---|---|---|---|---|---|---|
"""
CURVE = """| predicted chance | updates | mean chance | share with a new direction |
|---|---|---|---|
"""


def law_table(predictors: list[dict[str, Any]], *, published: bool = False) -> str:
    """Every predictor, then what was published."""
    found = {row["predictor"]: row for row in predictors}
    rows = [_row(found[name]) for name in NAMES]
    return HEAD + "\n".join(rows + [_line(cells) for cells in PUBLISHED if published])


def curve(bins: list[dict[str, Any]]) -> str:
    """The chance against what came true."""
    rows = []
    for row in bins:
        low = min(int(10 * row["chance"]), 9) / 10
        rows.append(_line([f"{low:.1f} to {low + 0.1:.1f}", str(row["count"]),
                           f"{row['chance']:.2f}", f"{row['new']:.2f}"]))  # fmt: skip
    return CURVE + "\n".join(rows)


def shares(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per cent within 2 and 1.25, and the AUC, of each predictor that has a scale."""
    return {
        row["predictor"]: {
            "twice": 100 * row["within_2"],
            "quarter": 100 * row["within_1.25"],
            "median": row["median"],
            "auc": row["auc"],
            "within": row["auc_within"],
        }
        for row in found["predictors"]
        if "median" in row
    }


def followed(cells: list[dict[str, Any]]) -> dict[str, float]:
    """What was left of new directions at the scale that was expected, and at the measured one.

    Args:
        cells: Of ``weaker.jsonl``.

    Returns:
        Counts of adapters, and of the matrices that were compared with a grid.
    """
    rows = [cell["figures"] for cell in cells]
    known = [row for row in rows if "expected" in row and "measured" in row]
    grids = [row["grid"] for row in rows if "grid" in row]
    missed = [score for grid in grids for scores in grid["missed"].values() for score in scores]
    tried = [count for row in rows for count in row["tried"]]
    return {
        "adapters": len(known),
        "too_high": sum(row["expected"] > row["measured"] for row in known),
        "expected_leaves": sum(row["expected_left"] > 0 for row in known),
        "measured_leaves": sum(row["measured_left"] > 0 for row in known),
        "tried": sum(tried) / len(tried),
        "matrices": sum(grid["matrices"] for grid in grids),
        "missed": sum(len(grid["missed"]) for grid in grids),
        "lowest": min(missed, default=1.0),
        "times": max(grid["times"] for grid in grids),
    }


def ranks_table(study: dict[str, dict[str, str]], finetune: dict[str, dict[str, Any]]) -> str:
    """LoRAs of three ranks in the study, and in the experiment of docs/fine-tuning.md."""
    rows = []
    for rank in (1, 8, 64):
        name = f"lora-r{rank}"
        long, short = study[name], finetune[name]
        rows.append(_line([str(rank), long["task"], long["kept"], long["count"], long["norm"],
                           f"{short['accuracy']:.1f}", short["counts"]]))  # fmt: skip
    return RANKS + "\n".join(rows)


def ranks_in_use(adapter: Path) -> dict[str, Any]:
    """How many spikes of a layer carry 99 % of its update's energy: median and ends."""
    factors = open_adapter(adapter).factors.values()
    spikes = [LowRank(*update.read()).singular_values() for update in factors]
    used = [int(rank_fields(gamma)["in_use"]) for gamma in spikes]
    return {"layers": len(used), "low": min(used), "median": round(median(used)), "high": max(used)}


def _row(row: dict[str, Any]) -> str:
    """One predictor."""
    parts = [row.get("within_2"), row.get("within_1.25")]
    cells = [
        NAMES[row["predictor"]],
        *("" if share is None else f"{100 * share:.1f} %" for share in parts),
        f"{row['median']:.2f}" if "median" in row else "",
        f"{row['auc']:.3f} ({row['low']:.2f} to {row['high']:.2f})",
        f"{row['auc_within']:.2f}",
    ]
    return _line(cells)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
