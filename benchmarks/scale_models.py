"""Large models by the shapes of their matrices, and what one matrix costs by what was measured.

Written to disk they are sparse files: headers that are real, weights that are not there.
"""

from __future__ import annotations

import json
import math
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Shape = tuple[int, int]
PREFIX = "base_model.model."
BYTES = {"BF16": 2, "F32": 4}


@dataclass(frozen=True)
class Model:
    """The linear layers of a model.

    Attributes:
        name: In the tables.
        rank: Of the LoRA on all of them.
        blocks: Of the same matrices: how many, and the shape of each by its name.
        inputs: Of each kind of block: the widths of the inputs that layers share, each once.
        experts: How many of each kind of expert a block has, by their place in ``blocks``.
    """

    name: str
    rank: int
    blocks: tuple[tuple[int, dict[str, Shape]], ...]
    inputs: tuple[tuple[int, ...], ...]
    experts: tuple[tuple[dict[str, Shape], int], ...] = ()

    def of_blocks(self, count: int) -> Model:
        """The same with so many blocks of the last kind."""
        return replace(self, blocks=(*self.blocks[:-1], (count, self.blocks[-1][1])))

    def layers(self) -> Iterator[tuple[int, dict[str, Shape]]]:
        """Every block by its number, with the matrices that it has."""
        number = 0
        for kind, (count, shapes) in enumerate(self.blocks):
            expert, copies = self.experts[kind] if self.experts else ({}, 0)
            more = {f"mlp.experts.{e}.{k}": s for e in range(copies) for k, s in expert.items()}
            for _ in range(count):
                yield number, shapes | more
                number += 1

    def shapes(self) -> dict[Shape, int]:
        """How many matrices of each shape."""
        found: dict[Shape, int] = {}
        for _, matrices in self.layers():
            for shape in matrices.values():
                found[shape] = found.get(shape, 0) + 1
        return found

    def widths(self) -> dict[int, int]:
        """How many inputs of each width have a moment of their own."""
        found: dict[int, int] = {}
        for kind, ((count, _), widths) in enumerate(zip(self.blocks, self.inputs, strict=True)):
            expert, copies = self.experts[kind] if self.experts else ({}, 0)
            own = sorted({n for _, n in expert.values()})  # gate and up have one in common
            for width in [*widths, *own * copies]:
                found[width] = found.get(width, 0) + count
        return found


def _llama(name: str, layers: int, width: int, inner: int, keys: int = 1_024) -> Model:
    """Grouped queries, and a gated MLP."""
    attention = {"q_proj": (width, width), "k_proj": (keys, width), "v_proj": (keys, width),
                 "o_proj": (width, width)}  # fmt: skip
    mlp = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    shapes = {f"self_attn.{k}": s for k, s in attention.items()}
    shapes |= {f"mlp.{k}": s for k, s in mlp.items()}
    return Model(name, 16, ((layers, shapes),), ((width, width, width, inner),))


def _mlp(prefix: str, inner: int, width: int) -> dict[str, Shape]:
    return {
        f"{prefix}gate_proj": (inner, width), f"{prefix}up_proj": (inner, width),
        f"{prefix}down_proj": (width, inner),
    }  # fmt: skip


def _trillion() -> Model:
    """The shapes of Kimi K2: latent attention, and 384 experts a block but for the first."""
    attention = {
        "self_attn.q_a_proj": (1_536, 7_168), "self_attn.q_b_proj": (12_288, 1_536),
        "self_attn.kv_a_proj_with_mqa": (576, 7_168), "self_attn.kv_b_proj": (16_384, 512),
        "self_attn.o_proj": (7_168, 8_192),
    }  # fmt: skip
    shared = attention | _mlp("mlp.shared_experts.", 2_048, 7_168)
    inputs = (7_168, 1_536, 512, 8_192)
    return Model(
        "mixture of experts, 1T", 8,
        ((1, attention | _mlp("mlp.", 18_432, 7_168)), (60, shared)),
        ((*inputs, 7_168, 18_432), (*inputs, 7_168, 2_048)),
        (({}, 0), (_mlp("", 2_048, 7_168), 384)),
    )  # fmt: skip


MODELS = (
    _llama("70B", 80, 8_192, 28_672),
    _llama("405B", 126, 16_384, 53_248),
    _trillion(),
)


def write_sparse(model: Model, folder: Path) -> tuple[Path, Path]:
    """A base of a shard a block, in bfloat16, and a LoRA of all of it, in sparse files."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    places, factors = {}, {}
    for number, matrices in model.layers():
        shard = f"model-{number:05d}.safetensors"
        weights = {}
        for module, (m, n) in matrices.items():
            name = f"model.layers.{number}.{module}"
            weights[f"{name}.weight"] = (m, n)
            factors[f"{PREFIX}{name}.lora_A.weight"] = (model.rank, n)
            factors[f"{PREFIX}{name}.lora_B.weight"] = (m, model.rank)
        _sparse(base / shard, weights, "BF16")
        places |= dict.fromkeys(weights, shard)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    _sparse(adapter / "adapter_model.safetensors", factors, "F32")
    config = {"peft_type": "LORA", "r": model.rank, "lora_alpha": model.rank}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def _sparse(file: Path, shapes: dict[str, Shape], dtype: str) -> None:
    """A safetensors file with its header alone on disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    with file.open("wb") as written:
        written.write(len(header).to_bytes(8, "little") + header)
        written.truncate(8 + len(header) + end)


class Costs:
    """Seconds of a processor by the size of a matrix, between those that were measured.

    Between two sizes a power law, by both; beyond the largest as the number of entries m·n, or as
    m·n·min(m, n) where factorisations decide: what is unknown lies between the two.
    """

    def __init__(self, seconds: dict[Shape, float]) -> None:
        most: dict[int, float] = {}
        for shape, value in seconds.items():
            most[math.prod(shape)] = max(value, most.get(math.prod(shape), 0.0))
        self.known = sorted(most.items())
        self.largest = max(seconds, key=math.prod)

    def of(self, shape: Shape, *, cubic: bool = False) -> float:
        """Seconds of one matrix."""
        entries = math.prod(shape)
        sizes = [size for size, _ in self.known]
        if entries >= sizes[-1]:
            grown = entries / sizes[-1]
            sides = min(shape) / min(self.largest) if cubic else 1.0
            return self.known[-1][1] * grown * max(1.0, sides)
        if entries <= sizes[0]:
            return self.known[0][1]
        (left, before), (right, after) = self.known[(at := bisect(sizes, entries)) - 1 : at + 1]
        part = math.log(entries / left) / math.log(right / left)
        return before * (after / before) ** part


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The lines of a stored result."""
    return [json.loads(line) for line in path.read_text().splitlines()]
