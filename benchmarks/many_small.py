"""What an audit of a thousand small matrices costs, beside an older checkout, in turn in one run.

    python benchmarks/many_small.py BEFORE [--quick]

BEFORE is another checkout of this repository, say a worktree of git.  Each audit is a process of
its own, on one thread.  Seconds are those of the processor beyond the import, medians of three.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from before_after import commit
from common import store
from safetensors.torch import save_file

MATRICES = 1000
CASES = ((4, 2), (64, 8))
"""Sides of square matrices of noise, and ranks of a LoRA on each."""
REPEATS = 3
AUDIT = """
import sys, time
from bulkedge import audit
begun = time.process_time()
record = audit(*sys.argv[1:])
seconds = time.process_time() - begun
print(seconds, sum(row.status == "audited" for row in record.matrices))
"""


def made(folder: Path, size: int, rank: int, matrices: int) -> tuple[Path, Path]:
    """A checkpoint and an adapter of it."""
    generator, base, factors = torch.Generator().manual_seed(0), {}, {}
    for i in range(matrices):
        name = f"model.layers.{i}.q_proj"
        base[f"{name}.weight"] = torch.randn(size, size, generator=generator)
        for factor, shape in (("A", (rank, size)), ("B", (size, rank))):
            key = f"base_model.model.{name}.lora_{factor}.weight"
            factors[key] = torch.randn(shape, generator=generator)
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(base, folder / "base.safetensors")
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return folder / "base.safetensors", adapter


def seconds_of(root: Path, base: Path, adapter: Path, matrices: int) -> float:
    """What the code of a checkout takes."""
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", AUDIT, str(base), str(adapter)],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    seconds, audited = found.stdout.split()
    if int(audited) != matrices:
        raise SystemExit(f"{root}: {audited} of {matrices} matrices were audited")
    return float(seconds)


def measured(codes: dict[str, Path], size: int, rank: int, quick: bool) -> dict[str, Any]:
    """One row: both codes in turn."""
    matrices, repeats = (10, 1) if quick else (MATRICES, REPEATS)
    spent: dict[str, list[float]] = {name: [] for name in codes}
    with tempfile.TemporaryDirectory() as name:
        paths = made(Path(name), size, rank, matrices)
        for _ in range(repeats):
            for code, root in codes.items():
                spent[code].append(seconds_of(root, *paths, matrices))
    medians = {code: round(statistics.median(found), 2) for code, found in spent.items()}
    return {"size": size, "rank": rank, "matrices": matrices, "repeats": repeats} | medians


def main() -> None:
    """Measure both sizes, and store them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("--quick", action="store_true", help="ten matrices, once, not stored")
    asked = parser.parse_args()
    codes = {"before": asked.before.resolve(), "after": Path(__file__).resolve().parents[1]}
    rows = []
    for size, rank in CASES:
        rows.append(measured(codes, size, rank, asked.quick))
        print(json.dumps(rows[-1]), flush=True)
    if not asked.quick:
        store("many_small", {"rows": rows, "before": commit(asked.before)})


if __name__ == "__main__":
    main()
