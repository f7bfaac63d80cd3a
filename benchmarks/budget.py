"""What a budget of a 7B-shaped base costs, and how far its limits are from those of an SVD.

    python benchmarks/budget.py [--scale 1] [--accuracy 2]

Time: one matrix of each of the three shapes of a made-up 7B model (32 layers of seven), measured on
one thread, by its clock and by the seconds that the processor worked for it; the whole model is
extrapolated from the latter, for two free cores, without reading its files.
Memory: the peak of a process that measures the largest of them.  Accuracy: the limits beside those
of a float64 SVD, on five matrices with their sides divided by --accuracy (1 takes half an hour).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import Any

import torch
from common import store
from made_up_model import LAYERS, MODULES, trained_like

from bulkedge.update import BaseSpectrum, budget, measure

SHAPES = {shape: sum(s == shape for s in MODULES.values()) for shape in MODULES.values()}


def timed(shape: tuple[int, int]) -> dict[str, Any]:
    """The cost of one matrix in bfloat16."""
    W0 = trained_like(*shape, torch.Generator().manual_seed(1))[0].bfloat16()
    start, used = time.perf_counter(), time.process_time()
    found = measure(W0)
    return {
        "shape": shape,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - used,
        "passes": found.passes,
        "exact": found.exact,
    }


def peak(shape: tuple[int, int]) -> int:
    """Peak memory of a process that measures one matrix, torch included, in bytes."""
    code = (
        "import resource, torch; from bulkedge.update import measure; torch.set_num_threads(1); "
        f"measure(torch.randn{shape}.bfloat16()); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(told.stdout)


def accuracy(divided: int) -> list[dict[str, Any]]:
    """Both limits against those of a float64 SVD, relatively."""
    rows = []
    for number, (m, n) in enumerate([*SHAPES, *list(SHAPES)[:2]]):
        generator = torch.Generator().manual_seed(10 + number)
        W0 = trained_like(m // divided, n // divided, generator)[0].bfloat16()
        measured = measure(W0, small=0)
        if measured.spectrum is None:
            raise SystemExit(measured.problem)
        found = budget(measured.spectrum, 1)
        exact = budget(BaseSpectrum.of(W0), 1)
        rows.append({"shape": tuple(W0.shape), "edge": found.threshold / exact.threshold - 1,
                     "leading": found.top_k_threshold / exact.top_k_threshold - 1})  # fmt: skip
    return rows


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description="The cost of a budget.")
    parser.add_argument("--scale", type=int, default=1, help="what all sides are divided by")
    parser.add_argument("--accuracy", type=int, default=2, help="the same where SVDs are taken")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scaled = {(m // options.scale, n // options.scale): c for (m, n), c in SHAPES.items()}
    rows = [timed(shape) for shape in scaled]
    layer = sum(row["cpu_seconds"] * scaled[row["shape"]] for row in rows)
    store("budget", {
        "scale": options.scale,
        "matrices": rows,
        "layers": LAYERS,
        "cpu_seconds_of_one_layer": layer,
        "extrapolated_seconds_on_two_cores": layer * LAYERS / 2,
        "peak_bytes": peak(max(scaled, key=lambda shape: shape[0] * shape[1])),
        "accuracy": accuracy(options.accuracy),
    })  # fmt: skip


if __name__ == "__main__":
    main()
