"""MXFP4, NVFP4 and packed integers: against transformers and compressed-tensors."""

import json

import pytest
import torch

import bulkedge
from bulkedge import Recipe
from bulkedge.checkpoint import open_checkpoint
from bulkedge.checkpoint.codec import base as codec_base
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from helpers import oracle_scores, save, save_adapter, some, weights
from libraries import NEEDS_PYTHON_3_11
from packing import fp4, packed_int

M, N = 40, 64
RECIPE = {"top_k": 4, "method": "dense"}
NAME = "model.layers.0.mlp.experts.down_proj"


def opened(path, tensors, name="q.weight"):
    return open_checkpoint(save(path / "b.safetensors", tensors)).weights[name]


def check_scores(base, W0, tmp_path):
    """A LoRA on that base is judged against those numbers."""
    A, B = weights(2, W0.shape[1], seed=1), 3 * weights(W0.shape[0], 2, seed=2)
    adapter = save_adapter(tmp_path / "a", {"q.lora_A.weight": A, "q.lora_B.weight": B})
    (row,) = bulkedge.audit(base, adapter, recipe=RECIPE).matrices
    found = torch.tensor([d.score for d in row.directions], dtype=torch.float64)
    W = W0.double() + 2 * B.double() @ A.double()
    torch.testing.assert_close(found, oracle_scores(W0.double(), W, 4), atol=1e-4, rtol=0)


def gpt_oss(folder, experts=2, rows=M, seed=0):
    """A base as gpt-oss is stored, and what transformers takes it for: each expert (in, out)."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales, _ = fp4(weights(experts, rows, N, seed=seed))
    blocks = blocks.reshape(experts, rows, N // 32, 16)
    save(folder / "model.safetensors", {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales})
    settings = {"model_type": "gpt_oss", "hidden_size": rows,
                "quantization_config": {"quant_method": "mxfp4"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    return folder, convert_moe_packed_tensors(blocks, scales)


@pytest.mark.parametrize("rows", [M, N], ids=["", "square"])
def test_mxfp4_of_gpt_oss_against_transformers(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(codec_base, "STRIP", 7 * N)
    base, W0 = gpt_oss(tmp_path / "b", rows=rows)
    codec = open_checkpoint(base).weights[NAME]
    assert (codec.shape, codec.bits, codec.unreadable) == ((2, rows, N), 4, None)
    tuned = W0.float() + weights(*W0.shape, seed=5)
    save(tmp_path / "t" / "model.safetensors", {NAME: tuned})
    (tmp_path / "t" / "config.json").write_text((base / "config.json").read_text())
    plan = make_plan(base, tmp_path / "t", Recipe())
    assert [c.base.name for c in plan.comparisons] == [f"{NAME}[0]", f"{NAME}[1]"]
    assert not any(row.lost for row in plan.skipped)
    for e, comparison in some(enumerate(plan.comparisons)):
        pair = load(comparison, torch.device("cpu"))
        assert torch.equal(pair.base, W0[e].mT.float())
        assert torch.equal(pair.replaced, tuned[e].mT)
    assert codec.read(1, (5, 30)).tolist() == W0[1].mT[5:30].float().tolist()
    record = bulkedge.audit(base, tmp_path / "t", recipe=RECIPE)
    assert record.inputs.base.quantised == "MXFP4 (1 weight)"
    for e, row in some(enumerate(record.matrices)):
        found = torch.tensor([d.score for d in row.directions], dtype=torch.float64)
        exact = oracle_scores(W0[e].mT.double(), tuned[e].mT.double(), 4)
        torch.testing.assert_close(found, exact, atol=1e-4, rtol=0)


def test_a_lora_on_the_experts_of_gpt_oss(tmp_path):
    """PEFT trains it on the numbers that transformers unpacks, (in, out)."""
    base, W0 = gpt_oss(tmp_path / "b")
    A, B = weights(4, N), weights(M, 4, seed=1)
    stem = NAME.removesuffix(".down_proj")
    tensors = {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
    adapter = save_adapter(
        tmp_path / "a", tensors, target_parameters=["experts.down_proj"], peft_version="0.21.2"
    )
    comparisons = make_plan(base, adapter, Recipe()).comparisons
    plain = tmp_path / "p"
    save(plain / "model.safetensors", {NAME: W0})
    (plain / "config.json").write_text((base / "config.json").read_text())
    expected = make_plan(plain, adapter, Recipe()).comparisons
    assert len(comparisons) == len(expected) == 2
    for packed, unpacked in some(zip(comparisons, expected, strict=True)):
        sides = [load(c, torch.device("cpu")) for c in (packed, unpacked)]
        one, other = (pair.tuned_map().to_dense() for pair in sides)
        torch.testing.assert_close(one, other)


def fp4_tensors(method):
    blocks, scales, W = fp4(weights(M, N), 32 if method == "mxfp4" else 16)
    tensors = {"q.weight_packed": blocks, "q.weight_scale": scales}
    if method == "nvfp4":
        scales = (scales.float() - 127).exp2() * 8
        tensors["q.weight_scale"] = scales.to(torch.float8_e4m3fn)
        tensors["q.weight_global_scale"] = torch.tensor([8.0])
    return tensors, W


@pytest.mark.parametrize("method", ["mxfp4", "nvfp4"])
def test_fp4_of_compressed_tensors(method, tmp_path):
    tensors, W = fp4_tensors(method)
    codec = opened(tmp_path, tensors)
    assert (codec.shape, codec.quantised) == ((M, N), method.upper())
    assert torch.equal(codec.read(None, None), W)
    assert torch.equal(codec.read(None, (3, 9)), W[3:9])
    check_scores(tmp_path / "b.safetensors", W, tmp_path)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["", "zero points"])
def test_packed_integers(bits, symmetric, tmp_path, monkeypatch):
    monkeypatch.setattr(codec_base, "STRIP", 7 * N)
    tensors, W = packed_int(weights(M, N), bits, 16, symmetric=symmetric)
    codec = opened(tmp_path, tensors)
    assert (codec.shape, codec.bits) == ((M, N), bits)
    assert codec.quantised == f"compressed-tensors int{bits}"
    assert torch.equal(codec.read(None, None), W)
    assert torch.equal(codec.read(None, (3, 29)), W[3:29])
    check_scores(tmp_path / "b.safetensors", W, tmp_path)


def scheme(**given):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**given))


@NEEDS_PYTHON_3_11
@pytest.mark.parametrize("method", ["mxfp4", "nvfp4"])
def test_fp4_as_its_library_decompresses_it(method, tmp_path):
    from compressed_tensors.compressors import MXFP4PackedCompressor, NVFP4PackedCompressor

    given = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    if method == "nvfp4":
        given |= {"strategy": "tensor_group", "group_size": 16}
    tensors, _ = fp4_tensors(method)
    state = {name.removeprefix("q."): tensor for name, tensor in tensors.items()}
    judge = MXFP4PackedCompressor if method == "mxfp4" else NVFP4PackedCompressor
    expected = judge.decompress(state, scheme(**given))["weight"]
    found = opened(tmp_path, tensors).read(None, None)
    assert torch.equal(found.to(expected.dtype), expected)


@NEEDS_PYTHON_3_11
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [16, None], ids=["groups", "rows"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["", "zero points"])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_as_their_library_packs_and_decompresses_them(
    bits, symmetric, group, dtype, tmp_path
):
    from compressed_tensors.compressors import PackedQuantizationCompressor as Judge

    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    asked = scheme(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    W = weights(42, 80).to(dtype)
    scale = W.unflatten(1, (-1, group or 80)).abs().amax(dim=2) / (2 ** (bits - 1) - 0.5)
    state = {"weight": W, "weight_scale": scale}
    if not symmetric:
        state["weight_zero_point"] = torch.full(scale.shape, -3, dtype=torch.int8)
    packed = Judge.compress(state, asked)
    expected = Judge.decompress(packed, asked)["weight"]
    codec = opened(tmp_path, {f"q.{name}": part for name, part in packed.items()})
    for rows in (None, (5, 17)):
        found = codec.read(None, rows)
        assert found.dtype is dtype
        assert torch.equal(found, expected[slice(*rows) if rows else slice(None)])


BAD = {
    "other shape": ({"weight_shape": torch.tensor([M, 4 * N])}, "for a weight of shape"),
    "negative shape": ({"weight_shape": torch.tensor([M, -N])}, "for a weight of shape"),
    "huge shape": ({"weight_shape": torch.tensor([2**62, N])}, "for a weight of shape"),
    "no shape": ({"weight_shape": torch.ones(2)}, "a weight of shape unknown"),
    "order": ({"weight_g_idx": torch.zeros(N, dtype=torch.int32)}, "groups in the order of"),
    "scales": ({"weight_scale": torch.ones(M, 3)}, r"scales F32 \(40, 3\)"),
    "integers": ({"weight_scale": torch.ones(M, 4).int()}, "scales I32"),
    "zeros": ({"weight_zero_point": torch.ones(3, 4).int()}, r"expected \(5, 4\)"),
}
BAD_FP4 = {
    "scales": ({"weight_scale": torch.ones(M, 3).byte()}, "its scales are U8"),
    "dtype": ({"weight_scale": torch.ones(M, 2)}, "its scales are F32"),
    "both": ({"weight_global_scale": torch.ones(1)}, "NVFP4 has a weight_global_scale"),
    "divisor": ({"weight_global_scale": torch.ones(2)}, "expected one in F32"),
}


@pytest.mark.parametrize(
    "case", [*(("int", c) for c in BAD), *(("fp4", c) for c in BAD_FP4)], ids=str
)
def test_what_does_not_fit_is_lost_by_name(case, tmp_path):
    kind, which = case
    changed, message = (BAD if kind == "int" else BAD_FP4)[which]
    tensors = packed_int(weights(M, N), 4, 16)[0] if kind == "int" else fp4_tensors("mxfp4")[0]
    tensors |= {f"q.{name}": tensor for name, tensor in changed.items()}
    tensors["k.weight"] = weights(4, 4)
    with pytest.raises(bulkedge.CheckpointError, match=f"tensor 'q.weight_packed': .*{message}"):
        opened(tmp_path, tensors).read(None, None)
    tuned = {"q.weight": weights(M, N), "k.weight": weights(4, 4, seed=1)}
    plan = make_plan(tmp_path / "b.safetensors", save(tmp_path / "t.safetensors", tuned), Recipe())
    assert [c.base.name for c in plan.comparisons] == ["k.weight"]
    assert any(row.lost for row in plan.skipped)


@pytest.mark.parametrize(
    ("scheme", "problem"),
    [
        ({"strategy": "group", "group_size": 8}, "groups of 8, but there are scales for 4 groups"),
        ({"strategy": "channel", "group_size": None}, None),
        ({"strategy": "group", "group_size": 16}, None),
        ({}, None),
    ],
)
def test_groups_of_a_configuration_that_contradict_the_scales(scheme, problem, tmp_path):
    save(tmp_path / "model.safetensors", packed_int(weights(40, 64), 4, 16)[0])
    scheme = {"num_bits": 4} | scheme
    settings = {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": scheme}}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    found = open_checkpoint(tmp_path).weights["q.weight"].unreadable
    assert (found is None) if problem is None else (problem in found)


def test_a_scale_that_is_no_number_is_not_green(tmp_path):
    tensors, W = fp4_tensors("mxfp4")
    tensors["q.weight_scale"][0, 0] = 255
    save(tmp_path / "b.safetensors", tensors)
    tuned = save(tmp_path / "t.safetensors", {"q.weight": W + 1})
    record = bulkedge.audit(tmp_path / "b.safetensors", tuned)
    assert [row.status for row in record.matrices] == ["not_finite"]
