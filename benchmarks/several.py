"""Ten adapters of one base: in one call of ``bulkedge audit``, and in ten.

    python benchmarks/several.py BASE FOLDER

makes ten LoRA adapters of the base's projections under FOLDER, measures the processor time of the
commands, imports included, children and all threads counted, and stores it as results/several.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
from common import store
from safetensors.torch import load_file, save_file

ADAPTERS, RANK = 10, 4
PROJECTIONS = ("query", "key", "value", "dense")


def main() -> None:
    """Make the adapters, measure both ways, print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    adapters = [make(given.base, given.folder / f"adapter-{i}", i) for i in range(ADAPTERS)]
    apart = sum(seconds(given.base, adapter) for adapter in adapters)
    together = seconds(given.base, *adapters, "--output", given.folder / "records")
    cached = ("--cache", given.folder / "cache", "--force")
    seconds(given.base, *adapters, "--output", given.folder / "records", *cached)
    again = seconds(given.base, *adapters, "--output", given.folder / "records", *cached)
    store(
        "several",
        {
            "adapters": ADAPTERS,
            "ten_calls": apart,
            "one_call": together,
            "ratio": round(together / apart, 3),
            "one_call_with_a_cache": again,
        },
    )


def make(base: Path, folder: Path, seed: int) -> Path:
    """A LoRA adapter with random factors, the stronger the larger its seed."""
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, W in weights.items():
        if W.ndim == 2 and any(f".{part}." in name for part in PROJECTIONS):
            stem, (rows, columns) = f"base_model.model.{name.removesuffix('.weight')}", W.shape
            A = torch.randn(RANK, columns, generator=generator) / columns**0.5
            B = torch.randn(rows, RANK, generator=generator) / rows**0.5
            factors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": 0.2 * (seed + 1) * B}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def seconds(*arguments: object) -> float:
    """Processor time of one command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "bulkedge", "audit", *map(str, arguments), "-q"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    # an exception of Python's has the code of findings
    if done.returncode not in (0, 1) or b"Traceback" in done.stderr:
        raise SystemExit(done.stderr.decode())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)


if __name__ == "__main__":
    main()
