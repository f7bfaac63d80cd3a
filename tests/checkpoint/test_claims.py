"""Sizes that a few bytes claim, of things that are never made: experts, blocks, dimensions."""

import json

import pytest
import torch

from bulkedge import NothingAuditedError, Recipe
from bulkedge._audit import make_plan
from bulkedge.checkpoint.layout import MAX_EXPERTS, is_kernel, is_stack
from helpers import raw_safetensors, save, weights

NAME = "m.experts.gate_up_proj"


def empty(shape):
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("shape", [[2**40, 0, 5], [2**40, 5, 0], [2**62, 0, 0]])
def test_experts_of_no_bytes(shape, tmp_path):
    path = raw_safetensors(tmp_path / "x.safetensors", {NAME: empty(shape)})
    with pytest.raises(NothingAuditedError, match="empty tensor"):
        make_plan(path, path, Recipe())


def test_more_experts_than_anyone_has_are_no_stack(tmp_path):
    many = {name: torch.zeros(MAX_EXPERTS + 1, 1, 1) for name in (NAME, "experts.weight")}
    path = save(tmp_path / "x.safetensors", many)
    with pytest.raises(NothingAuditedError, match="neither a kernel nor a stack"):
        make_plan(path, path, Recipe())
    assert is_stack(NAME, (MAX_EXPERTS, 1, 1))
    assert not is_kernel("experts.weight", (3, 2, 2))


def fp8(folder, tensors, block):
    save(folder / "model.safetensors", tensors)
    config = {"quantization_config": {"weight_block_size": block}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("block", [[10**12, 10**12], [2**62, 3], [4, 10**30]])
def test_blocks_larger_than_the_weight(block, tmp_path):
    """No factor is repeated more often than there are elements."""
    stored = weights(8, 6).to(torch.float8_e4m3fn)
    scales = torch.full((-(-8 // block[0]), -(-6 // block[1])), 2.0)
    tensors = {"a.weight": stored, "a.weight_scale_inv": scales}
    folder = fp8(tmp_path / "m", tensors, block)
    (comparison,) = make_plan(folder, folder, Recipe()).comparisons
    assert torch.equal(comparison.base.read(), 2 * stored.float())


@pytest.mark.parametrize(
    ("name", "shape", "scales"),
    [
        ("a.weight", (8,), (2,)),
        ("a.weight", (3, 2, 8, 8), (3, 2, 2, 2)),
        ("a", (3, 8, 8), (3, 2, 2)),
    ],
    ids=["vector", "kernel", "no stack"],
)
def test_blocks_of_what_is_no_matrix(name, shape, scales, tmp_path):
    tensors = {name: weights(*shape).to(torch.float8_e4m3fn)}
    tensors |= {f"{name}_scale_inv": weights(*scales), "b.weight": weights(3, 2)}
    folder = fp8(tmp_path / "m", tensors, [4, 4])
    plan = make_plan(folder, folder, Recipe())
    assert [comparison.base.name for comparison in plan.comparisons] == ["b.weight"]
    assert name in {row.name for row in plan.skipped}
