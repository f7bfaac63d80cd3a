"""Peak memory of an audit against the size of the checkpoint and of its largest matrix.

    python benchmarks/audit_memory.py [--gigabytes 2]

Makes up a sharded float32 checkpoint (one embedding of 32768 × 1024, the rest 4096 × 1024) and a
LoRA adapter on all of it, audits them in a process of its own, and asks the kernel for the peak.
Beside it, a checkpoint of the embedding and one layer, and one of a single square matrix.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import peak_of, store
from made_up_model import trained_like
from safetensors.torch import save_file

EMBEDDING, LAYER, SQUARE, RANK = (32768, 1024), (4096, 1024), (2048, 2048), 8
SHARD_LAYERS = 30


def make_checkpoint(folder: Path, shapes: list[tuple[int, int]]) -> None:
    """A sharded base in ``folder/base`` and an adapter in ``folder/adapter``."""
    names = {f"layers.{i}.weight": shape for i, shape in enumerate(shapes)}
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    weight_map, factors = {}, {}
    items = list(names.items())
    for start in range(0, len(items), SHARD_LAYERS):
        shard = f"model-{start:05d}.safetensors"
        part = dict(items[start : start + SHARD_LAYERS])
        weights = {name: trained_like(*shape, torch.Generator())[0] for name, shape in part.items()}
        save_file(weights, base / shard)
        weight_map |= dict.fromkeys(part, shard)
    for name, (m, n) in names.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{module}.lora_A.weight"] = torch.randn(RANK, n) / n**0.5
        factors[f"{module}.lora_B.weight"] = torch.randn(m, RANK) / m**0.5
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def measure(shapes: list[tuple[int, int]]) -> dict[str, float]:
    """Audit a made-up checkpoint of matrices of these shapes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, shapes)
        size = sum(file.stat().st_size for file in (folder / "base").iterdir())
        bulkedge = [sys.executable, "-m", "bulkedge", "audit"]
        inputs = [str(folder / "base"), str(folder / "adapter")]
        options = ["--fail-on", "never", "--method", "certified", "-q"]
        started = time.perf_counter()
        peak = peak_of([*bulkedge, *inputs, *options])
        seconds = time.perf_counter() - started
    return {
        "checkpoint_MB": round(size / 1e6),
        "matrices": len(shapes),
        "peak_MB": round(peak / 1e6),
        "seconds": round(seconds),
    }


def main() -> None:
    """Measure a small and a large checkpoint with the same largest matrix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    arguments = parser.parse_args()
    embedding, square = (4 * m * n for m, n in (EMBEDDING, SQUARE))
    layers = round((arguments.gigabytes * 1e9 - embedding) / (4 * LAYER[0] * LAYER[1]))
    idle = peak_of([sys.executable, "-c", "import torch, bulkedge.auditing.matrix"])
    one_square = measure([SQUARE])
    small, large = measure([EMBEDDING, LAYER]), measure([EMBEDDING] + [LAYER] * layers)
    store(
        "audit_memory",
        {
            "largest_matrix_MB": round(embedding / 1e6),
            "imports_alone_MB": round(idle / 1e6),
            "small": small,
            "large": large,
            "square": one_square,
            "copies_of_largest": round((large["peak_MB"] * 1e6 - idle) / embedding, 1),
            "copies_of_square": round((one_square["peak_MB"] * 1e6 - idle) / square, 1),
        },
    )


if __name__ == "__main__":
    main()
