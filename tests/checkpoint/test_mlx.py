"""Adapters and quantised bases of MLX-LM: by their published layout, and against MLX itself."""

import json

import pytest
import torch

import bulkedge
from bulkedge import AdapterError
from bulkedge.checkpoint import open_checkpoint, open_path
from helpers import oracle_scores, save, some, weights
from libraries import library
from packing import affine

RECIPE = {"top_k": 4, "method": "dense"}
M, N, R, SCALE = 24, 64, 3, 1.5
A, B = weights(N, R, seed=1), 2 * weights(R, M, seed=2)
LAYER = "model.layers.0.q_proj"


def adapter(folder, tensors, kind="lora", **settings):
    save(folder / "adapters.safetensors", tensors)
    given = {"fine_tune_type": kind, "model": "org/base", "lora_parameters": {"scale": SCALE}}
    (folder / "adapter_config.json").write_text(json.dumps(given | settings))
    return folder


def base_in(folder, W, bits=4, group=32, **config):
    tensors, numbers = affine(W, bits, group, name=LAYER)
    save(folder / "model.safetensors", tensors | {"k.weight": weights(4, 4)})
    settings = {"quantization": {"group_size": group, "bits": bits}} | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder, numbers


def scores(record):
    (row,) = (m for m in record.matrices if m.name == f"{LAYER}.weight")
    assert row.status == "audited"
    return torch.tensor([d.score for d in row.directions], dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_lora_on_a_quantised_base(bits, tmp_path):
    base, W0 = base_in(tmp_path / "b", weights(M, N), bits)
    codec = open_checkpoint(base).weights[f"{LAYER}.weight"]
    assert (codec.shape, codec.bits) == ((M, N), bits)
    torch.testing.assert_close(codec.read(None, None).double(), W0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(codec.read(None, (5, 9)).double(), W0[5:9], rtol=1e-6, atol=1e-6)
    tuned = adapter(tmp_path / "a", {f"{LAYER}.lora_a": A, f"{LAYER}.lora_b": B})
    record = bulkedge.audit(base, tuned, recipe=RECIPE)
    # what the layer adds to its output is scale · (x A) B
    W = W0 + SCALE * (A.double() @ B.double()).mT
    torch.testing.assert_close(scores(record), oracle_scores(W0, W, 4), atol=1e-4, rtol=0)
    assert record.inputs.base.quantised == f"MLX {bits} bits (1 weight)"
    assert (record.inputs.tuned.trained_on, record.inputs.tuned.kind) == ("org/base", "lora")


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_and_scores_are_those_of_what_mlx_dequantises(bits, group, tmp_path):
    mx = library("mlx.core")
    W = mx.array(weights(M, 2 * N).numpy())
    parts = mx.quantize(W, group_size=group, bits=bits)
    file = tmp_path / "b" / "model.safetensors"
    file.parent.mkdir()
    stored = dict(zip(("weight", "scales", "biases"), parts, strict=True))
    mx.save_safetensors(str(file), {f"{LAYER}.{name}": part for name, part in stored.items()})
    settings = {"quantization": {"group_size": group, "bits": bits}}
    (file.parent / "config.json").write_text(json.dumps(settings))
    W0 = torch.tensor(mx.dequantize(*parts, group, bits).tolist())
    found = open_checkpoint(file.parent).weights[f"{LAYER}.weight"].read(None, None)
    torch.testing.assert_close(found, W0, rtol=1e-6, atol=1e-6)
    wide = weights(2 * N, R, seed=1)
    tuned = adapter(tmp_path / "a", {f"{LAYER}.lora_a": wide, f"{LAYER}.lora_b": B})
    exact = W0.double() + SCALE * (wide.double() @ B.double()).mT
    expected = oracle_scores(W0.double(), exact, 4)
    found = scores(bulkedge.audit(file.parent, tuned, recipe=RECIPE))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_dora_and_an_embedding(tmp_path):
    base = save(tmp_path / "b.safetensors", {
        f"{LAYER}.weight": weights(M, N), "model.embed_tokens.weight": weights(30, M)
    })  # fmt: skip
    m = 1 + weights(M, seed=4).abs()
    tuned = adapter(
        tmp_path / "a", {f"{LAYER}.lora_a": A, f"{LAYER}.lora_b": B, f"{LAYER}.m": m}, "dora"
    )
    W0 = weights(M, N).double()
    W = W0 + SCALE * (A.double() @ B.double()).mT
    W = m.double()[:, None] * W / W.norm(dim=1, keepdim=True)
    found = scores(bulkedge.audit(base, tuned, recipe=RECIPE))
    torch.testing.assert_close(found, oracle_scores(W0, W, 4), atol=1e-4, rtol=0)
    name = "model.embed_tokens"
    C, D = weights(30, 2, seed=5), weights(2, M, seed=6)
    tuned = adapter(tmp_path / "e", {f"{name}.lora_a": C, f"{name}.lora_b": D})
    (update,) = open_path(tuned).factors.values()
    left, right, scale = update.read()
    torch.testing.assert_close(scale * left @ right, SCALE * C.double() @ D.double())


def test_weights_trained_in_full(tmp_path):
    base = save(tmp_path / "b.safetensors", {f"{LAYER}.weight": weights(M, N)})
    tuned = adapter(tmp_path / "a", {f"{LAYER}.weight": weights(M, N, seed=9)}, "full")
    found = scores(bulkedge.audit(base, tuned, recipe=RECIPE))
    expected = oracle_scores(weights(M, N), weights(M, N, seed=9), 4)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


BAD = {
    "half": ({"lora_a": A}, "lora", "expected one pair of factors"),
    "shapes": ({"lora_a": A, "lora_b": weights(R + 1, M)}, "lora", "do not fit together"),
    "experts": ({"lora_a": weights(2, R, N), "lora_b": weights(2, M, R)}, "lora", "experts of MLX"),
    "integers": ({"lora_a": A.int(), "lora_b": B}, "lora", "not a floating-point weight"),
    "dora": ({"lora_a": A, "lora_b": B}, "dora", "DoRA or not is in doubt"),
    "magnitude": ({"lora_a": A, "lora_b": B, "m": weights(3)}, "dora", "a magnitude of shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_told(case, tmp_path):
    parts, kind, message = BAD[case]
    named = {f"{LAYER}.{part}": tensor for part, tensor in parts.items()}
    opened = open_path(adapter(tmp_path / "a", named, kind))
    assert not opened.factors
    assert {message in row.reason for row in some(opened.unhandled)} == {True}


@pytest.mark.parametrize("scale", [None, "2", True, 1e300])
def test_a_scale_that_is_no_number(scale, tmp_path):
    folder = adapter(tmp_path / "a", {f"{LAYER}.lora_a": A}, lora_parameters={"scale": scale})
    with pytest.raises(AdapterError, match=r"lora_parameters\.scale is .*expected a number"):
        open_path(folder)


@pytest.mark.parametrize(
    "config",
    [{"quantization": {"bits": 3, "group_size": 32}}, {"quantization": None},
     {"quantization": {"bits": 4, "group_size": 64}},
     {"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}},
     {"quantization": {"bits": 4, "group_size": 32, LAYER: {"bits": 8}}}],
)  # fmt: skip
def test_settings_that_do_not_fit_are_lost_by_name(config, tmp_path):
    base, _ = base_in(tmp_path / "b", weights(M, 32), **config)
    codec = open_checkpoint(base).weights[f"{LAYER}.weight"]
    assert codec.unreadable.startswith("MLX: ")


def test_a_layer_of_its_own_bits(tmp_path):
    given = {"quantization": {"bits": 4, "group_size": 64, LAYER: {"bits": 8, "group_size": 32}}}
    base, W0 = base_in(tmp_path / "b", weights(M, N), 8, **given)
    read = open_checkpoint(base).weights[f"{LAYER}.weight"].read(None, None)
    torch.testing.assert_close(read.double(), W0, rtol=1e-6, atol=1e-6)
