"""Certificates on bases that round worst, held against exact arithmetic.

python benchmarks/hard_certificates.py [--seeds 1000] [--processes 2]

Ten certificates a seed; resumable, from build/hard_certificates.jsonl.  What is stored is a
count a family: certificates, directions, those decided, the smallest singular value over the
largest, and those that contradict the oracle.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from common import store

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from intruder import hard  # noqa: E402 — the tests are no package of the library

JOURNAL = ROOT / "build/hard_certificates.jsonl"


def some(seeds: range, journal: Path) -> list[dict[str, Any]]:
    """The rows of some seeds, by one thread."""
    torch.set_num_threads(1)
    return hard.resumed(seeds, journal)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of some rows."""
    counts = {
        key: sum(row[key] for row in rows) for key in ("certificates", "directions", "decided")
    }
    shapes = [row["shape"] for row in rows]
    return counts | {
        "wrong": sum(len(row["wrong"]) for row in rows),
        # of those matrices whose smallest singular value is above rounding
        "smallest_over_largest": min(
            row["least"] for row in rows if row["least"] > max(row["shape"]) * hard.EPS
        ),
        "longest_side": max(max(shape) for shape in shapes),
        "shortest_side": min(min(shape) for shape in shapes),
    }


def main() -> None:
    """Run what is missing, and store the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    parts = [range(first, asked.seeds, 4 * asked.processes) for first in range(4 * asked.processes)]
    with ProcessPoolExecutor(asked.processes) as pool:
        rows = [row for part in pool.map(some, parts, repeat(JOURNAL)) for row in part]
    families = {
        family: summary([row for row in rows if row["family"] == family])
        for family in hard.FAMILIES
    }
    store("hard_certificates", {"seeds": asked.seeds, "all": summary(rows), "families": families})
    for row in rows:
        print(*row["wrong"], sep="\n", end="\n" if row["wrong"] else "")


if __name__ == "__main__":
    main()
