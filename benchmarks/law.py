"""Which strength of an update makes its first new direction: predictors beside the exact scale.

    python benchmarks/law_adapters.py        # first: the adapters
    python benchmarks/law.py                 # exact scales, and predictions; kept in build/law
    python benchmarks/law.py --final         # with the adapters that were set aside; stored
    python benchmarks/law.py --random 1000   # the predicted chance on random updates; stored

The plan, made before any of it was computed.  Adapters: those of ``law_adapters.py`` and the two
in examples/minilm_wordnet, all encoder matrices.  The third of the trained ones whose names have
the smallest SHA-256 digests is set aside; everything is chosen on the others, to which the two
shipped belong, as they had been looked at.  ``--final`` is run once.  Exact: the first scale of a
grid in steps by 1.05 at which one of the ten leading left directions scores below one half, by
float64 eigenproblems (``law_exact.py``).  Predictors: the lines θ_c, θ_k, θ_1, σ_k, σ_1 over
``‖ΔW‖₂``; ``‖ΔW‖_F``; random vectors of the same strengths (their median scale; the chance of the
layer); the law with the measured alignment (its scale; its lowest score at 1).  Figures: shares
within 2 and 1.25 and median ratio where the grid has a first scale, a predictor without one missing
it; AUC for telling matrices with a new direction at s = 1, with the 5 and 95 % points of 500
bootstraps over adapters; the chance against the share that came true, in ten bins.  Added after the
first look: the mean AUC within one adapter, since adapters of all sizes together are easy to order.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch
from common import store
from law_adapters import BASE, ROOT, adapters, set_aside
from law_exact import first_new, lowest_score
from safetensors import safe_open
from scipy.stats import rankdata

from bulkedge.comparison import load, make_plan
from bulkedge.records import Recipe
from bulkedge.triplet import thin_svd
from bulkedge.update import (
    BaseSpectrum,
    UpdateSVD,
    aligned_scale,
    budget,
    generic_scale,
    predict_spikes,
)
from bulkedge.update._reduced import measured

RECIPE = Recipe(exclude=("pooler.*",))
K, EPSILON = RECIPE.top_k, RECIPE.epsilon
SHIPPED = {name: ROOT / f"examples/minilm_wordnet/{name}" for name in ("lora-r1", "lora-r8")}
LINES = ("theta_c", "theta_k", "theta_1", "sigma_k", "sigma_1")
PREDICTORS = (*LINES, "frobenius", "generic", "aligned")
BOOTSTRAPS, BINS = 500, 10


class Base:
    """One base matrix, decomposed once for all adapters."""

    def __init__(self, W0: torch.Tensor) -> None:
        self.svd = thin_svd(W0.double())
        self.spectrum = BaseSpectrum.from_values(self.svd[1], (W0.shape[0], W0.shape[1]))

    @property
    def lines(self) -> dict[str, float]:
        """The strengths at which each line is crossed."""
        found = {k: budget(self.spectrum, 1, top_k=k).top_k_threshold for k in (K, 1)}
        last, first = (float(self.spectrum.values[k - 1]) for k in found)
        limits = (self.spectrum.fit.threshold, *found.values(), last, first)
        return dict(zip(LINES, limits, strict=True))


def exact(base: Base, update: UpdateSVD) -> dict[str, Any]:
    """The first scale with a new direction, and the lowest score at 1."""
    score = lowest_score(base.svd, update.P, update.Q, K)
    unit = float(base.svd[1][K - 1]) / update.norm
    return {"scale": first_new(score, unit, EPSILON), "score": score(1.0)}


def predicted(base: Base, update: UpdateSVD) -> dict[str, Any]:
    """The scale that each predictor expects, and what orders matrices at s = 1."""
    spectrum, gamma = base.spectrum, update.gamma
    scales = {name: line / update.norm for name, line in base.lines.items()}
    scales["generic"] = generic_scale(spectrum, gamma)
    scales["aligned"] = aligned_scale(spectrum, base.svd, update)
    # what orders: the larger, the likelier a new direction
    orders = {name: 1 / scales[name] for name in LINES} | {"frobenius": float(gamma.norm())}
    orders["generic"] = predict_spikes(spectrum, gamma).chance
    small = measured(base.svd, spectrum.values, spectrum.shape, update, K)
    at_one = gamma[0] / spectrum.values[0]
    orders["aligned"] = 1 - float(small.lowest_score(at_one, K))
    return {"expected": scales, "order": orders}


def rows(name: str, folder: Path, bases: dict[str, Base]) -> list[dict[str, Any]]:
    """Every matrix of an adapter, from its journal as far as that goes."""
    journal = ROOT / f"build/law/{name}.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    known = {row["matrix"]: row for row in map(json.loads, lines)}
    with journal.open("a") as file:
        for comparison in make_plan(BASE, folder, RECIPE).comparisons:
            matrix = comparison.base.name
            if matrix in known:
                continue
            pair = load(comparison, torch.device("cpu"))
            if matrix not in bases:
                bases[matrix] = Base(pair.base)
            if pair.spikes is None or not pair.spikes.rank:
                raise SystemExit(f"{name}: {matrix} has no update")
            found = {"adapter": name, "matrix": matrix, **exact(bases[matrix], pair.spikes)}
            known[matrix] = found | predicted(bases[matrix], pair.spikes)
            file.write(json.dumps(known[matrix]) + "\n")
            file.flush()
    return list(known.values())


def auc(order: Any, new: Any) -> float | None:
    """The chance that a matrix with a new direction is ordered higher; None without both kinds."""
    ones = int(new.sum())
    if ones in (0, len(new)):
        return None
    return float((rankdata(order)[new].sum() - ones * (ones + 1) / 2) / (ones * (len(new) - ones)))


def area(found: list[dict[str, Any]], name: str) -> dict[str, float | None]:
    """AUC at s = 1, its 5 and 95 % points over adapters, and its mean within one."""
    groups: dict[str, list[tuple[float, bool]]] = {}
    for row in found:
        pair = (row["order"][name], row["score"] < EPSILON)
        groups.setdefault(row["adapter"], []).append(pair)
    drawn, names = random.Random(0), sorted(groups)

    def of(chosen: list[str]) -> float | None:
        order, new = numpy.array([pair for one in chosen for pair in groups[one]]).T
        return auc(order, new.astype(bool))

    spread = [of(drawn.choices(names, k=len(names))) for _ in range(BOOTSTRAPS)]
    ends = numpy.quantile([x for x in spread if x is not None], (0.05, 0.95)).tolist()
    within = [x for name in names if (x := of([name])) is not None]
    mean = sum(within) / len(within)
    return {"auc": of(names), "low": ends[0], "high": ends[1], "auc_within": mean}


def summary(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """How good a predictor is."""
    if name == "frobenius":  # an order, no scale
        return {"predictor": name, **area(found, name)}
    closed = [row for row in found if row["scale"] is not None]
    ratios = [row["scale"] / s for row in closed if (s := row["expected"][name]) is not None]
    within = {
        f"within_{factor}": sum(1 / factor <= r <= factor for r in ratios) / len(closed)
        for factor in (2, 1.25)
    }
    return {"predictor": name, **within, "median": median(ratios), **area(found, name)}


def calibration(chances: list[float], new: list[bool]) -> dict[str, Any]:
    """Share that came true in bins of the chance, and the expected calibration error."""
    p, y = numpy.array(chances), numpy.array(new, dtype=float)
    bins = numpy.minimum((p * BINS).astype(int), BINS - 1)
    curve = [
        {"count": int(at.sum()), "chance": float(p[at].mean()), "new": float(y[at].mean())}
        for at in (bins == i for i in range(BINS))
        if at.any()
    ]
    error = sum(row["count"] * abs(row["chance"] - row["new"]) for row in curve) / len(p)
    return {"error": error, "curve": curve}


def judged(found: list[dict[str, Any]]) -> dict[str, Any]:
    """All predictors on some adapters."""
    new = [row["score"] < EPSILON for row in found]
    return {
        "adapters": len({row["adapter"] for row in found}),
        "matrices": len(found),
        "without_a_scale": sum(row["scale"] is None for row in found),
        "new": sum(new),
        "predictors": [summary(found, name) for name in PREDICTORS],
        "calibration": calibration([row["order"]["generic"] for row in found], new),
    }


def draws(count: int) -> Iterator[tuple[str, int, float, bool]]:
    """Random updates of all matrices in turn: matrix, rank, chance, whether one was new."""
    dice, generator = random.Random(0), torch.Generator().manual_seed(0)
    bases: dict[str, Base] = {}
    with safe_open(BASE / "model.safetensors", "pt") as file:
        names = [
            name
            for name in sorted(file.keys())
            if name.startswith(("encoder.", "pooler."))
            and len(file.get_slice(name).get_shape()) == 2
        ]
        for number in range(count):
            name = names[number % len(names)]
            if name not in bases:
                bases[name] = Base(file.get_tensor(name))
            base, rank = bases[name], dice.choice((1, 2, 4, 8, 16))
            spread = torch.linspace(1.0, dice.choice((0.2, 0.6, 1.0)), rank, dtype=torch.float64)
            gamma = spread * base.lines["theta_k"] * math.exp(dice.uniform(-0.6, 0.9))
            u, v = (
                torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q
                for size in base.spectrum.shape
            )
            new = lowest_score(base.svd, u * gamma, v, K)(1.0) < EPSILON
            yield name, rank, predict_spikes(base.spectrum, gamma).chance, new


def main() -> None:
    """Measure, print, and store what is asked for."""
    parser = argparse.ArgumentParser(description="Predicted against exact critical scales.")
    parser.add_argument("--final", action="store_true", help="use what was set aside; once")
    parser.add_argument("--only", nargs="+", default=[], help="compute these alone, and end")
    parser.add_argument("--random", type=int, help="so many random updates instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.random:
        _, _, chances, new = zip(*draws(options.random), strict=True)
        store("law_random", {"draws": len(new), "new": sum(new), **calibration(chances, new)})
        return
    bases: dict[str, Base] = {}
    trained = [one for one in adapters() if (one.folder / "training.json").exists()]
    folders = SHIPPED | {one.name: one.folder for one in trained}
    chosen = options.only or list(folders)
    found = [row for name in chosen for row in rows(name, folders[name], bases)]
    if options.only:
        return
    seen = [row for row in found if row["adapter"] not in set_aside()]
    results = {"seen": judged(seen)}
    if options.final:
        aside = [row for row in found if row["adapter"] in set_aside()]
        results["aside"] = judged(aside)
        store("law", {**results, "names": sorted(folders), "set_aside": sorted(set_aside())})
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
