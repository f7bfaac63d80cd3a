"""What `bulkedge audit --dry-run` expects of a job, beside what the audit then uses.

    python benchmarks/dry_run.py

Made-up checkpoints of a few matrices of one shape, audited by one job on one thread: the memory of
the job at its peak, and the seconds of a core beyond the start of the program.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from audit_memory import make_checkpoint
from common import peak_of, store

from bulkedge import audit
from bulkedge.auditing.estimate import reference_seconds

SHAPES = {
    (384, 384): 12,
    (1536, 384): 12,
    (768, 2048): 6,
    (1024, 1024): 6,
    (2048, 2048): 3,
    (4096, 1024): 3,
    (4096, 4096): 1,
}
"""Shapes, and how many matrices of each."""


def core_seconds(base: Path, adapter: Path) -> float:
    """What an audit takes of this processor, what is made once left out."""
    audit(base, adapter)
    begun = time.process_time()
    audit(base, adapter)
    return time.process_time() - begun


def measured(shape: tuple[int, int], count: int) -> dict[str, Any]:
    """Figures of the dry run, and of the audit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, [shape] * count)
        command = [sys.executable, "-m", "bulkedge", "audit", str(folder / "base")]
        command += [str(folder / "adapter"), "--fail-on", "never"]
        plan = subprocess.run([*command, "--dry-run", "--json"], capture_output=True, check=True)
        peak = peak_of([*command, "-q"])
        seconds = core_seconds(folder / "base", folder / "adapter")
    expected = json.loads(plan.stdout)
    return {
        "shape": shape,
        "matrices": count,
        "expected_gigabytes": expected["gigabytes_of_memory"],
        "gigabytes": round(peak / 1e9, 3),
        "expected_seconds": expected["core_seconds"],
        "seconds": round(seconds, 2),
    }


def main() -> None:
    """Measure all shapes, and store them."""
    torch.set_num_threads(1)
    rows = []
    for shape, count in SHAPES.items():
        rows.append(measured(shape, count))
        print(json.dumps(rows[-1]), flush=True)
    store("dry_run", {"rows": rows, "reference_seconds": round(reference_seconds(), 4)})


if __name__ == "__main__":
    main()
