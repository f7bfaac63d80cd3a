"""Guards at their very limits: one step beyond is refused, one step within is not."""

import json
import struct

import pytest
import torch

from bulkedge import CheckpointError, Recipe
from bulkedge._audit import make_plan
from bulkedge._audit.load import load
from bulkedge.checkpoint.header import read_header
from helpers import save, weights

# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", range(1, 10))
def test_a_header_may_not_reach_past_the_end_of_the_file(more, tmp_path):
    """The eight bytes of its own length do not count."""
    text = b"{}" + b" " * 20
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text) + more) + text)
    with pytest.raises(CheckpointError, match=r"30 bytes, truncated or not safetensors"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("shape", [(6,), ()])
def test_fp8_vectors_have_no_blocks(shape, tmp_path):
    """Scales beside a vector, which has no rows and columns, are no reason to stumble."""
    tensors = {
        "norm.weight": torch.ones(shape).to(torch.float8_e4m3fn),
        "norm.weight_scale_inv": torch.ones(1),
        "q.weight": weights(6, 6),
    }
    base = save(tmp_path / "base.safetensors", tensors)
    tuned = save(tmp_path / "tuned.safetensors", tensors | {"q.weight": weights(6, 6, seed=1)})
    assert [c.base.name for c in make_plan(base, tuned, Recipe()).comparisons] == ["q.weight"]


@pytest.mark.parametrize("size", [[0, 3], [3, 0], [-1, 3], [True, 3], [3], [3, 3, 3], "3", None])
def test_a_block_size_that_is_none_is_the_default(size, tmp_path):
    def folder(name, seed, **config):
        packed = weights(6, 6, seed=seed).to(torch.float8_e4m3fn)
        tensors = {"q.weight": packed, "q.weight_scale_inv": torch.full((1, 1), 0.5)}
        save(tmp_path / name / "model.safetensors", tensors)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name, packed.float() / 2

    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": size}}
    (base, W0), (tuned, W) = folder("b", 0, **config), folder("t", 1, **config)
    (comparison,) = make_plan(base, tuned, Recipe()).comparisons
    pair = load(comparison, torch.device("cpu"))
    assert torch.equal(pair.base, W0)
    assert torch.equal(pair.replaced, W)
