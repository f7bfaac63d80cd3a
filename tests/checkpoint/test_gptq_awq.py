"""GPTQ's and AWQ's words: against their published layouts, and against packages that read them.

The oracle of most tests is `packing.py`, which packs by the published layout one code at a time.
``make test-formats`` asks AutoRound and AutoAWQ.
"""

import json
import re

import pytest
import torch
from click.testing import CliRunner

import bulkedge
import packing
from bulkedge import CheckpointError, Recipe
from bulkedge.checkpoint import open_checkpoint
from bulkedge.cli import cli
from bulkedge.comparison import make_plan
from helpers import oracle_scores, save, save_adapter, weights
from libraries import library

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}
CASES = {
    "gptq": (lambda W: packing.gptq(W), GPTQ),
    "gptq 2": (lambda W: packing.gptq(W, 2), GPTQ | {"bits": 2}),
    "gptq 8": (lambda W: packing.gptq(W, 8), GPTQ | {"bits": 8}),
    "gptq order": (lambda W: packing.gptq(W, seed=3), GPTQ | {"desc_act": True}),
    "gptq v2": (lambda W: packing.gptq(W, v2=True), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "auto-round": (
        lambda W: packing.gptq(W),
        GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
    ),
    "awq": (lambda W: packing.awq(W), AWQ),
    "auto-round awq": (
        lambda W: packing.awq(W),
        AWQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
    ),
}
SHAPE = (32, 48)


def folder(path, tensors, settings):
    save(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return path


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_scores(case, tmp_path, monkeypatch):
    make, settings = CASES[case]
    tensors, W0 = make(weights(*SHAPE))
    base = folder(tmp_path / "b", tensors, settings)
    monkeypatch.setattr("bulkedge.checkpoint.codec.base.STRIP", 500)  # several strips
    found = open_checkpoint(base).weights["q.weight"]
    assert (found.shape, found.upright, found.unreadable) == (SHAPE, True, None)
    assert {info.name for info in found.infos} == set(tensors)
    for rows in (None, (0, 32), (3, 17)):
        numbers = found.read(None, rows)
        assert numbers.dtype == torch.float16
        expected = W0[slice(*rows) if rows else slice(None)]
        torch.testing.assert_close(numbers.float(), expected, rtol=1e-3, atol=0)  # half precision
    A, B = weights(2, 48), weights(32, 2)
    adapter = save_adapter(tmp_path / "a", {"q.lora_A.weight": A, "q.lora_B.weight": B})
    record = bulkedge.audit(base, adapter, recipe={"top_k": 4, "method": "dense"})
    assert record.summary.lost == 0
    assert record.inputs.base.quantised == f"{found.quantised} (1 weight)"
    (row,) = record.matrices
    Q = found.read(None, None).double()
    scores = torch.tensor([d.score for d in row.directions], dtype=torch.float64)
    torch.testing.assert_close(
        scores, oracle_scores(Q, Q + (2 * B @ A).double(), 4), atol=1e-4, rtol=0
    )
    done = CliRunner().invoke(cli, ["inspect", str(base)])
    assert done.stdout.splitlines()[-1].endswith(f"quantised: {found.quantised} (1 weight)")


@pytest.mark.parametrize("zeros", [7, None])
def test_against_auto_round(zeros, tmp_path):
    module = library("auto_round_extension.torch.qlinear_torch_zp")
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32, bias=False)
    scales = linear.weight.reshape(32, 4, 16).abs().amax(-1) / 7
    points = torch.full((32, 4), zeros) if zeros else torch.randint(5, 11, (32, 4))
    layer = module.QuantLinear(4, 16, 64, 32, False)
    layer.pack(linear, scales.detach(), points, device="cpu")
    layer.post_init()
    tensors = {f"q.{name}": W for name, W in layer.state_dict().items()}
    found = open_checkpoint(folder(tmp_path / "b", tensors, GPTQ)).weights["q.weight"]
    theirs = layer(torch.eye(64, dtype=torch.float16)).detach()
    torch.testing.assert_close(found.read(None, None), theirs.mT, rtol=1e-3, atol=0)


def test_against_auto_awq(tmp_path):
    utils = library("awq.utils.packing_utils")
    tensors, _ = packing.awq(weights(*SHAPE))
    found = open_checkpoint(folder(tmp_path / "b", tensors, AWQ)).weights["q.weight"]
    parts = (tensors[f"q.{name}"] for name in ("qweight", "qzeros", "scales"))
    theirs = utils.dequantize_gemm(*parts, 4, 8)
    assert torch.equal(found.read(None, None), theirs.mT)


def changed(tensors, **parts):
    return tensors | {f"q.{name}": tensor for name, tensor in parts.items()}


INT = torch.ones(6, 32, dtype=torch.int32)
BAD = {
    "3 bits": (GPTQ | {"bits": 3}, {}, "GPTQ in 3 bits, expected 2, 4 or 8"),
    "no bits": (GPTQ | {"bits": True}, {}, "GPTQ in True bits"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, {}, "GPTQ packed for 'marlin'"),
    "zeros": (GPTQ, {"qzeros": INT}, "do not fit; give the checkpoint from before"),
    "order": (GPTQ, {"g_idx": INT}, "do not fit"),
    "scales": (GPTQ, {"scales": INT}, "do not fit"),
    "empty": (GPTQ, {"scales": torch.ones(0, 32)}, "do not fit"),
    "awq 8": (AWQ | {"bits": 8}, {}, "AWQ in 8 bits"),
    "gemv": (AWQ | {"version": "gemv"}, {}, "AWQ of version 'gemv', expected gemm"),
    "awq words": (AWQ, {"qweight": INT}, "AWQ: words I32 .* do not fit"),
    "groups": (GPTQ | {"group_size": 16}, {}, "GPTQ: .* groups of 16, but .* 6 groups in 48 inp"),
    "all inputs": (GPTQ | {"group_size": -1}, {}, "GPTQ: .* groups of -1, but .* for 6 groups"),
    "awq groups": (AWQ | {"group_size": 128}, {}, "AWQ: .* groups of 128, but .* for 6 groups"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_lost_by_name(case, tmp_path):
    settings, parts, message = BAD[case]
    make = packing.awq if settings["quant_method"] == "awq" else packing.gptq
    tensors, W = make(weights(*SHAPE))
    base = folder(tmp_path / "b", changed(tensors, **parts) | {"k.weight": weights(4, 4)}, settings)
    tuned = save(tmp_path / "t.safetensors", {"q.weight": W, "k.weight": weights(4, 4) + 1})
    plan = make_plan(base, tuned, Recipe())
    assert [c.base.name for c in plan.comparisons] == ["k.weight"]
    reasons = [row.reason for row in plan.skipped if row.lost]
    assert any(re.search(message, reason) for reason in reasons)


@pytest.mark.parametrize("name", ["dynamic", "extra_config"])
def test_groups_that_differ_by_layer_are_those_of_the_scales(name, tmp_path):
    settings = GPTQ | {"group_size": 16, name: {"q": {"group_size": 8}}}
    base = folder(tmp_path, packing.gptq(weights(*SHAPE))[0], settings)
    assert open_checkpoint(base).weights["q.weight"].unreadable is None


def test_groups_that_have_no_scale(tmp_path):
    tensors, _ = packing.gptq(weights(*SHAPE))
    for wrong in (-1, 6):
        index = tensors["q.g_idx"].clone()
        index[5] = wrong
        found = open_checkpoint(folder(tmp_path / f"{wrong}", changed(tensors, g_idx=index), GPTQ))
        with pytest.raises(
            CheckpointError, match=r"'q\.g_idx' names groups beyond the 6 that have"
        ):
            found.weights["q.weight"].read(None, None)
