"""A made-up checkpoint of the shape of a 7B model, and a LoRA with intruders in known places.

    python benchmarks/made_up_model.py FOLDER [--scale 16] [--seed 0]

32 layers of seven linear weights in bfloat16, all sides divided by the scale (1 makes 13 GB).  A
weight is noise whose rows and columns differ in variance, under twelve outliers, as trained weights
look.  The adapter, of rank 16, has in every layer weak generic spikes and one that strengthens the
base's leading direction; in every ninth weight two more, new and strong: those are the intruders.
Writes ``base/``, ``adapter/`` and ``planted.json``, the names of the weights that have intruders.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, WIDTH, INNER, RANK, OUTLIERS, EVERY = 32, 4096, 11008, 16, 12, 9
MODULES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Random orthonormal columns."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q


def trained_like(m: int, n: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """A weight whose noise has its edge near 1, and the vectors U, V of its outliers, 6 to 2."""
    rows = torch.exp(0.3 * torch.randn(m, 1, generator=generator))
    columns = torch.exp(0.3 * torch.randn(1, n, generator=generator))
    W = torch.randn(m, n, generator=generator).mul_(rows).mul_(columns)
    W /= m**0.5 + n**0.5
    U, V = orthonormal(m, OUTLIERS, generator), orthonormal(n, OUTLIERS, generator)
    W += (U * torch.linspace(6, 2, OUTLIERS)) @ V.mT
    return W, U, V


def base_and_factors(
    kind: str, m: int, n: int, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """A base, ``trained`` or noise, with B and A of which half of the spikes are strong."""
    if kind == "trained":
        W0, _, _ = trained_like(m, n, generator)
        theta = torch.linspace(8, 0.2, rank)
    else:
        W0 = torch.randn(m, n, generator=generator) / (m**0.5 + n**0.5)
        theta = torch.linspace(3, 0.2, rank)
    u, v = (orthonormal(size, rank, generator) for size in (m, n))
    return W0, (u * theta).double(), v.mT.double()


def factors(
    U: torch.Tensor, V: torch.Tensor, *, planted: bool, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A of the update of one weight."""
    u, v = (orthonormal(X.shape[0], RANK, generator) for X in (U, V))
    u[:, 0], v[:, 0] = U[:, 0], V[:, 0]
    theta = torch.linspace(0.3, 0.1, RANK)
    if planted:
        theta[1:3] = torch.tensor([9.0, 8.0])
    return u * theta, v.mT.contiguous()


def make(folder: Path, scale: int, seed: int = 0) -> None:
    """Write base, adapter and the list of planted places."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    weight_map, update, planted = {}, {}, []
    for layer in range(LAYERS):
        shard, tensors = f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors", {}
        for place, (module, shape) in enumerate(MODULES.items()):
            number = layer * len(MODULES) + place
            generator = torch.Generator().manual_seed(seed * 1000 + number)
            W, U, V = trained_like(shape[0] // scale, shape[1] // scale, generator)
            name = f"model.layers.{layer}.{module}"
            intruded = number % EVERY == 0
            B, A = factors(U, V, planted=intruded, generator=generator)
            planted += [f"{name}.weight"] * intruded
            tensors[f"{name}.weight"] = W.bfloat16()
            weight_map[f"{name}.weight"] = shard
            update[f"base_model.model.{name}.lora_A.weight"] = A
            update[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
        save_file(tensors, base / shard)
    index = {"weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(update, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (folder / "planted.json").write_text(json.dumps(planted))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.folder, arguments.scale, arguments.seed)
