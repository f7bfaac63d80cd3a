"""What it costs to protect one layer, by its number of inputs; layers of the size of Llama 7B's.

python benchmarks/protect_cost.py

Time of the processor on one thread for what is made of a pair of random moments once, and for one
update of rank 16 with it; and what all of it adds to the peak of the memory, the moments included.
Each case runs in a process of its own, and is stored once it is measured.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from common import Cells
from torch import Tensor

RANK = 16
KEPT = 1024
"""Eigenvectors of a sketch."""
CASES = (
    ("one", 384), ("one", 1_536), ("one", 4_096), ("sketches", 11_008), ("two", 384),
    ("two", 1_536), ("one", 11_008), ("two", 4_096),
)  # fmt: skip


def moment(n: int, seed: int) -> Tensor:
    """A random moment with a decaying diagonal, float64 as it is read from a file."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(n, 256, generator=generator) * torch.logspace(0, -1, n)[:, None]
    return (half @ half.mT / 256).add_(torch.diag(torch.logspace(0, -2, n))).double()


def sketch(n: int, seed: int) -> Any:
    """A random sketch."""
    from bulkedge.moments import Sketch

    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(n, KEPT, generator=generator)).Q.double()
    return Sketch(V, torch.logspace(0, -3, KEPT).double(), torch.full((n,), 1e-3).double(), 0.1)


def measured(sides: str, n: int) -> dict[str, Any]:
    """Seconds and bytes of one case, in this process."""
    from bulkedge._linmap import LowRank
    from bulkedge.repairing.curve import Basis
    from bulkedge.repairing.sides import Sides
    from bulkedge.repairing.solve import pair_of, solver

    torch.set_num_threads(1)
    A = torch.randn(RANK, n).double()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = [(sketch if sides == "sketches" else moment)(n, seed) for seed in (0, 1)]
    started = time.process_time()
    if sides == "two":
        basis = Basis.of(*pair_of(*made))
        once = time.process_time()
        Sides(basis, basis, 1.0).solved(LowRank(A.mT.clone(), A), 1.0)  # as many outputs as inputs
    else:
        solve = solver(*pair_of(*made), 1.0)
        once = time.process_time()
        solve(A)
    ended = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "once": round(once - started, 3),
        "update": round(ended - once, 3),
        "memory": (peak - before) * 1024,
    }


def in_a_process(sides: str, n: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, sides, str(n)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """All cases, or the one that is named."""
    if len(sys.argv) > 1:
        print(json.dumps(measured(sys.argv[1], int(sys.argv[2]))))
        return
    cells = Cells("protect_cost")
    for sides, n in CASES:
        of = {"sides": sides, "inputs": n}
        cells.measure(of, lambda sides=sides, n=n: in_a_process(sides, n))


if __name__ == "__main__":
    main()
