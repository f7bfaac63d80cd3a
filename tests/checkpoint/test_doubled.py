"""Sizes that a few bytes claim, of things that are never made: experts, blocks, dimensions."""

import json

import pytest
import torch

from bulkedge import AdapterError, NothingAuditedError, Recipe
from bulkedge.checkpoint import NameRule, open_adapter, open_checkpoint
from bulkedge.checkpoint.layout import MAX_EXPERTS, Layout, is_kernel, is_stack
from bulkedge.comparison import make_plan
from helpers import raw_safetensors, save, save_adapter, weights

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
    other = save(tmp_path / "y.safetensors", {name: many[name] + 1 for name in many})
    with pytest.raises(NothingAuditedError, match="neither a kernel nor a stack"):
        make_plan(path, other, Recipe())
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


# ---- work that grows with the square of what a file holds


@pytest.mark.timeout(20)
def test_names_made_to_be_compared_for_ever():
    """Ten thousand names, alike in all letters and unlike in order."""
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 500))) * 2
    base = frozenset(f"{letters[i % 500 :]}{letters[: i % 500]}.{i}"[:1024] for i in range(10_000))
    assert NameRule("", "", base).nearest(letters + ".x")


def test_the_nearest_is_found_among_many():
    base = frozenset(
        f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2000) for p in "qkvo"
    )
    near = NameRule("", "", base).nearest("layers.1234.self_attn.q_proj.weight")
    assert near.startswith("'model.layers.1234.self_attn.q_proj.weight'")


@pytest.mark.timeout(20)
def test_experts_stored_one_by_one_are_found_one_by_one(tmp_path):
    count = 2000
    tensors = {
        f"m.experts.{e}.{w}.weight": weights(2, 1) for e in range(count) for w in ("w1", "w3")
    }
    layout = Layout(open_checkpoint(save(tmp_path / "x.safetensors", tensors)), {}, {})
    stack = "m.experts.gate_up_proj"
    found = [layout.part(stack, e, rows) for e in range(count) for rows in ((0, 2), (2, 4))]
    assert [matrix.name for matrix in found] == list(tensors)
    assert layout.part(stack, count, (0, 2)) is None
    assert layout.part(stack, 0, (0, 4)) is None


@pytest.mark.timeout(20)
def test_parameters_without_end(tmp_path):
    factors = {
        f"m.{i}.experts.lora_{f}.weight": torch.zeros(shape)
        for i in range(2000)
        for f, shape in {"A": (2, 1), "B": (1, 2)}.items()
    }
    owned = [f"m.{i}.experts.p{j}" for i in range(2000) for j in range(50)]
    folder = save_adapter(tmp_path / "a", factors, target_parameters=owned)
    assert all(len(wrapped.parameters) == 50 for wrapped in open_adapter(folder).wrapped)
    bare = [f"p{j}" for j in range(100_000)]
    folder = save_adapter(tmp_path / "b", factors, target_parameters=bare)
    with pytest.raises(
        AdapterError, match=r"names 100000 parameters of 'm\.0\.experts', expected at"
    ):
        open_adapter(folder)
