"""fp8 in blocks is read as transformers reads it; packed weights are refused by name."""

import json

import pytest
import torch

import bulkedge
from bulkedge import CheckpointError, Recipe
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from helpers import needs, save, save_adapter, some, weights

CPU = torch.device("cpu")
oracle = needs("transformers", "5.0", "the module of the oracle imports triton")


def fp8(*shape, block, seed=0, dtype=torch.float8_e4m3fn):
    """A weight in fp8, its scales, and the matrix that transformers takes the two for."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    W = weights(*shape, seed=seed)
    table = [-(-side // of) for side, of in zip(shape[-2:], block, strict=True)]
    scales = weights(*shape[:-2], *table, seed=seed + 1).abs() + 0.1
    packed = W.to(dtype)
    whole = _dequantize_fp8_weight(packed, scales, list(block), torch.float32)
    return packed, scales, whole


def folder(path, tensors, **config):
    save(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config))
    return path


def pairs(base, tuned, **recipe):
    plan = make_plan(base, tuned, Recipe(**recipe))
    return plan, {c.base.name: load(c, CPU) for c in plan.comparisons}


@oracle
def test_fp8_on_both_sides_and_on_one(tmp_path):
    block = (4, 3)
    W8, S, W0 = fp8(11, 10, block=block)
    V8, T, V0 = fp8(11, 10, block=block, seed=5)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    base = folder(tmp_path / "b", {"q.weight": W8, "q.weight_scale_inv": S}, **config)
    tuned = folder(tmp_path / "t", {"q.weight": V8, "q.weight_scale_inv": T}, **config)
    plain = folder(tmp_path / "p", {"q.weight": V0.bfloat16()})
    plan, found = pairs(base, tuned)
    assert torch.equal(found["q.weight"].base, W0)
    assert torch.equal(found["q.weight"].replaced, V0)
    assert [(r.name, r.lost) for r in plan.skipped] == [("q.weight_scale_inv", False)]
    for one, other in ((base, plain), (plain, base)):
        plan, found = pairs(one, other)
        assert not any(row.lost for row in plan.skipped)
        expected = (W0, V0.bfloat16()) if one is base else (V0.bfloat16(), W0)
        assert torch.equal(found["q.weight"].base, expected[0])
        assert torch.equal(found["q.weight"].replaced, expected[1])
    (row,) = bulkedge.audit(base, tuned, recipe={"top_k": 3}).matrices
    assert (row.status, row.dtype, row.shape) == ("audited", "F8_E4M3", (11, 10))
    norm = torch.linalg.matrix_norm((V0 - W0).double(), 2)
    assert row.spectral_norm_update == pytest.approx(float(norm), rel=1e-6)


@oracle
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_an_adapter_on_fp8_experts_in_the_default_blocks(dtype, tmp_path):
    W8, S, W0 = fp8(2, 150, 130, block=(128, 128), dtype=dtype)
    names = ("experts.down_proj", "experts.down_proj_scale_inv")
    base = folder(tmp_path / "b", dict(zip(names, (W8, S), strict=True)))
    A, B = weights(4, 130), weights(150, 4)
    tensors = {"experts.lora_A.weight": A, "experts.lora_B.weight": B}
    adapter = save_adapter(
        tmp_path / "a", tensors, target_parameters=["experts.down_proj"], peft_version="0.21.2"
    )
    _, found = pairs(base, adapter)
    assert list(found) == ["experts.down_proj[0]", "experts.down_proj[1]"]
    for e, pair in some(enumerate(found.values())):
        torch.testing.assert_close(pair.base, W0[e])
        update = 2 * B.reshape(150, 2, 2)[:, :, e] @ A[2 * e : 2 * e + 2]
        torch.testing.assert_close(pair.low_rank.to_dense().float(), update)


def test_one_scale_for_the_whole_weight(tmp_path):
    W8 = weights(6, 5).to(torch.float8_e4m3fn)
    base = folder(tmp_path / "b", {"q.weight": W8, "q.weight_scale_inv": torch.tensor(0.25)})
    _, found = pairs(base, folder(tmp_path / "t", {"q.weight": weights(6, 5)}))
    assert torch.equal(found["q.weight"].base, W8.float() / 4)


@pytest.mark.parametrize(
    "scales",
    [{}, {"q.weight_scale_inv": weights(3, 3)}, {"q.weight_scale_inv": torch.ones(1, 1).int()}],
    ids=["none", "other_blocks", "integers"],
)
def test_fp8_without_fitting_scales_is_lost(scales, tmp_path):
    W8 = weights(6, 5).to(torch.float8_e4m3fn)
    other = {"k.weight": weights(4, 4)}
    config = {"quantization_config": {"quant_method": "fp8"}}
    base = folder(tmp_path / "b", {"q.weight": W8} | scales | other, **config)
    plan, found = pairs(base, folder(tmp_path / "t", {"q.weight": weights(6, 5)} | other))
    assert list(found) == ["k.weight"]
    (lost,) = [row for row in plan.skipped if row.lost]
    assert lost.reason == (
        "F8_E4M3 tensor: no q.weight_scale_inv beside it that fits blocks of 128×128 "
        "(weight_block_size in config.json; default 128×128)"
    )


def integers(*shape, dtype=torch.int32):
    return torch.ones(*shape, dtype=dtype)


PACKED = {
    "GPTQ or AWQ": {"q.qweight": integers(2, 8), "q.qzeros": integers(1, 1)},
    "bitsandbytes (4 bits)": {
        "q.weight": integers(32, 1, dtype=torch.uint8),
        "q.weight.absmax": weights(1),
        "q.weight.quant_map": weights(16),
    },
    "bitsandbytes (8 bits)": {"q.weight": integers(8, 8), "q.SCB": weights(8)},
    "compressed-tensors": {"q.weight_packed": integers(8, 1), "q.weight_scale": weights(8, 1)},
    "GPTQ": {"q.qweight": integers(2, 8), "q.scales": weights(1, 8), "q.g_idx": integers(16)},
    "AWQ": {"q.qweight": integers(16, 1), "q.scales": weights(1, 8), "q.qzeros": integers(1, 1)},
    "HQQ": {"q.W_q": integers(8, 4, dtype=torch.uint8), "q.scale": weights(1, 8)},
    "torchao": {"q._weight_qdata": integers(8, 4, dtype=torch.int8), "q._weight_scale": weights(8)},
}  # fmt: skip


@pytest.mark.parametrize("method", PACKED)
def test_packed_weights_are_refused_by_name(method, tmp_path):
    packed = save(tmp_path / "packed.safetensors", PACKED[method] | {"k.weight": weights(4, 4)})
    plain = save(tmp_path / "plain.safetensors", {"k.weight": weights(4, 4)})
    keys = {"k.lora_A.weight": weights(2, 4), "k.lora_B.weight": weights(4, 2)}
    adapter = save_adapter(tmp_path / "a", keys)
    words = method.replace("(", r"\(").replace(")", r"\)")
    message = rf"packed\.safetensors: tensor .* weight quantised by {words}, whose .* dequantised"
    for base, tuned in ((packed, plain), (plain, packed), (packed, adapter)):
        with pytest.raises(CheckpointError, match=message):
            make_plan(base, tuned, Recipe())


def test_the_configuration_names_the_method(tmp_path):
    config = {"quantization_config": {"quant_method": "awq"}}
    packed = folder(tmp_path / "b", PACKED["GPTQ or AWQ"], **config)
    with pytest.raises(CheckpointError, match="a weight quantised by AWQ, whose"):
        make_plan(packed, save(tmp_path / "t.safetensors", {"q.weight": weights(4, 4)}), Recipe())


def test_weights_of_such_names_are_weights(tmp_path):
    both = {
        "up_blocks": weights(4, 4),
        "a.W_q": weights(4, 4),
        "q.weight_scale": weights(4, 4),
        "q.weight": weights(4, 4),
    }
    base = save(tmp_path / "base.safetensors", both)
    tuned = {name: W + 1 for name, W in both.items()}
    plan, found = pairs(base, save(tmp_path / "tuned.safetensors", tuned))
    assert set(found) == set(both)
    assert plan.skipped == ()
