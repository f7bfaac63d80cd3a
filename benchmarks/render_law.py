"""The table of docs/before-you-train.md, from its stored result and the published figures."""

from __future__ import annotations

from typing import Any

HEAD = """| predicted critical scale | within 2× | within 1.25× | measured over predicted, median | AUC at s = 1: r = 1, r = 8, both |
|---|---|---|---|---|
"""
NAMES = {
    "theta_c": "θ_c/‖ΔW‖₂: the outlier is born",
    "theta_k": "θ_k/‖ΔW‖₂: it enters the leading ten",
    "theta_1": "D(σ₁)^(−½)/‖ΔW‖₂: it overtakes σ₁",
    "sigma_k": "σ₁₀(W0)/‖ΔW‖₂: no theory",
    "sigma_1": "‖W0‖₂/‖ΔW‖₂",
    "frobenius": "1/‖ΔW‖_F: an order, no scale",
}
PUBLISHED = (
    ("*θ_c, published for other models (cited)*", "82 %", "", "", "0.89 (mean)"),
    ("*the same with a second edge, from σ₁ (cited)*", "98 %", "", "", ""),
)
"""arXiv:2607.23711: 18 adapters, 9,840 layer scans, an AUC that is the mean over models."""


def law_table(predictors: list[dict[str, Any]]) -> str:
    """Every predictor, then what was published."""
    rows = [_row(row) for row in predictors] + [_line(cells) for cells in PUBLISHED]
    return HEAD + "\n".join(rows)


def _row(row: dict[str, Any]) -> str:
    """One predictor."""
    shares = [row["within_2"], row["within_1.25"]]
    cells = [
        NAMES[row["predictor"]],
        *("" if share is None else f"{share:.0%}".replace("%", " %") for share in shares),
        "" if row["median"] is None else f"{row['median']:.2f}",
        ", ".join(f"{value:.2f}" for value in row["auc"].values()),
    ]
    return _line(cells)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
