"""What judging one matrix costs, beside an older checkout, in turn in one run.

    python benchmarks/before_after.py BEFORE [--up-to N] [--quick]

BEFORE is another checkout of this repository, say a worktree of git.  Each of the two codes runs in
a process of its own, on one thread, and judges the same matrices in turn.  Seconds are those of the
processor, medians of five, which a busy machine disturbs less than those of the clock.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import made_up_model
import torch
from common import store
from torch.utils._python_dispatch import TorchDispatchMode

from bulkedge import Recipe
from bulkedge._linmap import LowRank
from bulkedge.comparison.pair import Pair, judge_pair
from bulkedge.update import measure_base, predict_spikes

CASES: list[dict[str, Any]] = [
    {"kind": "noise", "shape": [64, 64], "rank": 16},
    {"kind": "noise", "shape": [4, 4], "rank": 2},
    {"kind": "noise", "shape": [768, 768], "rank": 16},
    {"kind": "trained", "shape": [768, 768], "rank": 16},
    {"kind": "noise", "shape": [1024, 1024], "rank": 16},
    {"kind": "trained", "shape": [1024, 1024], "rank": 16},
    {"kind": "trained", "shape": [768, 2048], "rank": 8},
    {"kind": "noise", "shape": [768, 2048], "rank": 8},
    {"kind": "noise", "shape": [2048, 2048], "rank": 16},
    {"kind": "trained", "shape": [2048, 2048], "rank": 16},
    {"kind": "trained", "shape": [4096, 4096], "rank": 16},
    {"kind": "noise", "shape": [11008, 4096], "rank": 16},
    {"kind": "trained", "shape": [11008, 4096], "rank": 16},
]
"""Noise with fewer strong spikes than directions (rank 8) is where no certificate is cheap."""
REPEATS = 5
NO_DRAWS: dict[str, Any] = (
    {"draws": 0} if "draws" in inspect.signature(predict_spikes).parameters else {}
)
"""An audit asks for no draws; older checkouts have none."""


class Operations(TorchDispatchMode):
    """Counts tensor operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def made(kind: str, shape: list[int], rank: int) -> Pair:
    """A base of the kind, and a LoRA half of whose spikes are strong."""
    (m, n), generator = shape, torch.Generator().manual_seed(0)
    W0, B, A = made_up_model.base_and_factors(kind, m, n, rank, generator)
    return Pair(W0, None, LowRank(B, A))


def judged(pair: Pair) -> dict[str, Any]:
    """One matrix: verdicts, bulk and predictions, from fresh tensors."""
    pair = Pair(pair.base, pair.replaced, pair.factors)
    found = judge_pair(pair, Recipe())
    m, n = pair.base.shape
    base, _ = measure_base(found.spectrum, (m, n), found.computed_count)
    if base is not None and pair.spikes is not None:
        predict_spikes(base, pair.spikes.gamma[:10], **NO_DRAWS)
    verdicts = [direction.verdict.value for direction in found.directions]
    return {"passes": found.passes, "method": found.method, "verdicts": verdicts}


def product_seconds(pair: Pair, passes: int) -> float:
    """What that many products with a block of 18 vectors cost alone."""
    X, Y = (torch.randn(18, size) for size in (pair.base.shape[1], pair.base.shape[0]))
    spent = []
    for _ in range(REPEATS):
        begun = time.process_time()
        _ = X @ pair.base.mT, Y @ pair.base
        spent.append(time.process_time() - begun)
    return passes / 2 * statistics.median(spent)


def serve() -> None:
    """Answer cases on standard input with figures, a line of JSON each."""
    torch.set_num_threads(1)
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    pair, last = None, None
    for line in sys.stdin:
        case = json.loads(line)
        if pair is None or case != last:
            pair, last = made(**case), case
            with Operations() as counted:
                first = judged(pair)
            first["operations"] = counted.count
            first["products"] = product_seconds(pair, first["passes"])
        else:
            begun = time.process_time()
            judged(pair)
            first = {"seconds": time.process_time() - begun}
        answers.write(json.dumps(first) + "\n")
        answers.flush()


class Code:
    """A process with one of the two codes."""

    def __init__(self, root: Path) -> None:
        here = Path(__file__).resolve()
        paths = os.pathsep.join([str(root / "src"), str(here.parent)])
        self.process = subprocess.Popen(
            [sys.executable, str(here), "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ask(self, case: dict[str, Any]) -> dict[str, Any]:
        """The next figures of a case: counts first, then seconds."""
        if self.process.stdin is None or self.process.stdout is None:
            raise SystemExit("the process has no pipes")
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def compare(codes: dict[str, Code], case: dict[str, Any], repeats: int) -> dict[str, Any]:
    """One row: both codes in turn."""
    counts = {name: code.ask(case) for name, code in codes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(repeats):
        for name, code in codes.items():
            seconds[name].append(code.ask(case)["seconds"])
    same = counts["before"].pop("verdicts") == counts["after"].pop("verdicts")
    row = case | {"repeats": repeats, "same_verdicts": same}
    for name in codes:
        row[name] = counts[name] | {"seconds": round(statistics.median(seconds[name]), 5)}
    return row


def main() -> None:
    """Measure all cases, and store them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, nargs="?")
    parser.add_argument("--up-to", type=int, default=16384, help="the larger side of a matrix")
    parser.add_argument("--quick", action="store_true", help="small matrices, once, not stored")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        return serve()
    after = Path(__file__).resolve().parents[1]
    codes = {"before": Code(asked.before or after), "after": Code(after)}
    cases = [c for c in CASES if max(c["shape"]) <= (64 if asked.quick else asked.up_to)]
    rows = []
    for number, case in enumerate(cases, start=1):
        rows.append(compare(codes, case, 1 if asked.quick else REPEATS))
        print(f"{number} of {len(cases)}: {json.dumps(rows[-1])}", flush=True)
        if not asked.quick:  # a run that is ended has stored what it had
            store("before_after", {"rows": rows, "before": commit(asked.before or after)})
    return None


def commit(root: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "-C", str(root), "describe", "--always"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
