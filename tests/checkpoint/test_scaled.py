"""fp8 and int8 with scales for a weight or its rows, and fp8 without: against who writes them."""

import json

import pytest
import torch

import bulkedge
from bulkedge.checkpoint import open_checkpoint
from helpers import oracle_scores, save, save_adapter, some, weights
from libraries import NEEDS_PYTHON_3_11
from packing import scaled

RECIPE = {"top_k": 4, "method": "dense"}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
M, N = 24, 20


def model(folder, tensors, **config):
    save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def scores_of(base, tmp_path):
    """The scores of a LoRA on that base, and the update."""
    A, B = weights(2, N, seed=1), 3 * weights(M, 2, seed=2)
    adapter = save_adapter(tmp_path / "a", {"q.lora_A.weight": A, "q.lora_B.weight": B})
    (row,) = bulkedge.audit(base, adapter, recipe=RECIPE).matrices
    assert row.status == "audited"
    found = torch.tensor([d.score for d in row.directions], dtype=torch.float64)
    return found, 2 * B.double() @ A.double()


@NEEDS_PYTHON_3_11
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("kind", ["float", "int", "int with zero points"])
def test_against_compressed_tensors(kind, strategy, tmp_path):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    symmetric = "zero" not in kind
    given = QuantizationArgs(
        num_bits=8, type=kind.split()[0], strategy=strategy, symmetric=symmetric
    )
    W = weights(M, N)
    largest = W.abs().amax(dim=1, keepdim=True) if strategy == "channel" else W.abs().max()[None]
    for dtype in (torch.float32, torch.bfloat16):
        scale = (largest / 100).to(dtype)
        zero = None if symmetric else torch.full(scale.shape, 3, dtype=torch.int8)
        code = torch.float8_e4m3fn if kind == "float" else torch.int8
        packed = quantize(W.to(dtype), scale, zero, given, dtype=code)
        expected = dequantize(packed, scale, zero, given)
        tensors = {"q.weight": packed, "q.weight_scale": scale, "q.input_scale": torch.ones(1)}
        tensors |= {} if zero is None else {"q.weight_zero_point": zero}
        base = model(tmp_path / "b", tensors, quantization_config={"quant_method": "x"})
        codec = open_checkpoint(base).weights["q.weight"]
        assert torch.equal(codec.read(None, None), expected)
        assert torch.equal(codec.read(None, (3, 9)), expected[3:9])
        found, update = scores_of(base, tmp_path)
        W0 = expected.double()
        torch.testing.assert_close(found, oracle_scores(W0, W0 + update, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_scales_of_comfyui(dtype, name, tmp_path):
    tensors, W0 = scaled(weights(M, N), dtype, per_row=False, scales=name)
    tensors |= {"scaled_fp8": torch.empty(0, dtype=dtype), "q.scale_input": torch.ones(())}
    base = save(tmp_path / "b.safetensors", tensors)
    found, update = scores_of(base, tmp_path)
    expected = oracle_scores(W0.double(), W0.double() + update, 4)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    opened = open_checkpoint(base)
    assert opened.quantised == "fp8, a scale for each weight (1 weight)"


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_fp8_that_was_only_cast(dtype, tmp_path):
    W = weights(M, N).to(dtype)
    base = save(tmp_path / "b.safetensors", {"q.weight": W, "k.weight": W, "n.bias": W[0]})
    found, update = scores_of(base, tmp_path)
    expected = oracle_scores(W.double(), W.double() + update, 4)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert open_checkpoint(base).quantised == "fp8 without scales (2 weights)"


W8 = weights(M, N).to(torch.float8_e4m3fn)
BAD = {
    "no scales, but announced": (
        {"q.weight": W8}, {"quantization_config": {"quant_method": "fp8"}}, "no q.weight_scale_inv"
    ),
    "ComfyUI's mark alone": ({"q.weight": W8, "scaled_fp8": torch.empty(0)}, {}, "scale_inv"),
    "another has some": (
        {"q.weight": W8, "k.weight": W8, "k.weight_scale": torch.ones(1)}, {}, "scale_inv"
    ),
    "groups": (
        {"q.weight": W8, "q.weight_scale": torch.ones(M, 2)}, {}, "scales of groups are not handled"
    ),
    "columns": ({"q.weight": W8, "q.weight_scale": torch.ones(1, M)}, {}, "not those of its rows"),
    "integers": (
        {"q.weight": W8, "q.weight_scale": torch.ones(M).int()}, {}, "its scales are I32"
    ),
    "zero points": (
        {"q.weight": W8, "q.weight_scale": torch.ones(M), "q.weight_zero_point": torch.ones(2)},
        {}, "zero points F32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_lost_by_name(case, tmp_path):
    tensors, config, message = BAD[case]
    base = model(tmp_path / "b", tensors | {"o.weight": weights(4, 4)}, **config)
    tuned = save(tmp_path / "t.safetensors", {"q.weight": weights(M, N), "o.weight": weights(4, 4)})
    record = bulkedge.audit(base, tuned, recipe={"top_k": 2})
    lost = {row.name: row.reason for row in some(record.skipped) if row.lost}
    assert message in lost["q.weight"]
    with pytest.raises(bulkedge.CheckpointError, match=r"b/model\.safetensors: tensor 'q\.weight'"):
        open_checkpoint(base).weights["q.weight"].read(None, None)


def test_square_weights_of_rows_and_a_stack(tmp_path):
    stack = weights(3, 4, 4).to(torch.float8_e4m3fn)
    name = "m.experts.down_proj.weight"
    base = save(tmp_path / "b.safetensors", {name: stack, f"{name}_scale": torch.tensor(1.0)})
    codec = open_checkpoint(base).weights[name]
    assert torch.equal(codec.read(2, (1, 3)), stack[2, 1:3].float())
