"""Bases that bitsandbytes has packed: held and watched, and never unpacked as a whole."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bulkedge
from bulkedge import InputError
from bulkedge.tune import Monitor, SpikeClip, _strips, adapted_matrices
from libraries import library

peft = pytest.importorskip("peft")
bitsandbytes = library("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE = 96, 64
LAYERS = {
    "nf4": lambda: bitsandbytes.nn.Linear4bit(64, 96, False, quant_type="nf4"),
    "nf4 nested": lambda: bitsandbytes.nn.Linear4bit(
        64, 96, False, quant_type="nf4", compress_statistics=True
    ),
    "nf4 flat": lambda: bitsandbytes.nn.Linear4bit(
        64, 96, False, quant_type="nf4", compress_statistics=False
    ),
    "fp4": lambda: bitsandbytes.nn.Linear4bit(64, 96, False, quant_type="fp4"),
    "int8": lambda: bitsandbytes.nn.Linear8bitLt(64, 96, False, has_fp16_weights=False),
}


def packed_model(kind):
    """A model with one packed layer, a LoRA on it, and the weight that it was packed from."""
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    weight = torch.randn(SHAPE) / 8
    layer.load_state_dict({"weight": weight})
    model = nn.Sequential(layer.to("cpu"))
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=9, target_modules=["0"]))
    return model, layer


def unpacked(model):
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(model.base_model.model[0].get_base_layer()).float()


def train(model, clip=None, steps=6):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if clip is not None:
        clip.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(8, 64)) - 9).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", LAYERS)
def test_strips_are_the_rows_of_the_whole(kind, monkeypatch):
    model, _ = packed_model(kind)
    whole = unpacked(model)
    monkeypatch.setattr(_strips, "WHOLE_UP_TO", 0)
    monkeypatch.setattr(_strips, "ROWS", 64)
    (matrix,) = adapted_matrices(model)
    base = matrix.base_map()
    assert isinstance(base, _strips.StripMatrix)
    assert torch.equal(base.to_dense(), whole)
    X, Y = torch.randn(64, 3), torch.randn(96, 2)
    torch.testing.assert_close(base @ X, whole @ X)
    torch.testing.assert_close(base.T @ Y, whole.T @ Y)
    assert base.norm_bound() == pytest.approx(float(whole.norm()), rel=1e-6)
    assert base.to(torch.float64).to_dense().dtype == torch.float64


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_it_is_held_and_watched_as_the_audit_says(kind, monkeypatch, tmp_path):
    """The base of the audit is what was packed, as it is unpacked."""
    monkeypatch.setattr(_strips, "WHOLE_UP_TO", 0)
    model, _ = packed_model(kind)
    save_file({"0.weight": unpacked(model)}, tmp_path / "base.safetensors")
    monitor, clip = Monitor(model, top_k=4), SpikeClip(model, of="leading", level=0.5)
    train(model, clip)
    monitor.check()
    model.save_pretrained(tmp_path / "tuned")
    (row,) = bulkedge.audit(
        tmp_path / "base.safetensors", tmp_path / "tuned", recipe={"top_k": 10}
    ).matrices
    assert (
        0.4 * row.top_k_threshold
        <= row.spectral_norm_update
        <= 0.5 * row.top_k_threshold * (1 + 1e-5)
    )
    (figures,) = monitor.figures.values()
    assert figures.strongest * row.threshold == pytest.approx(row.spectral_norm_update, rel=1e-4)


def test_no_whole_copy_is_made(monkeypatch):
    model, _ = packed_model("nf4")
    monkeypatch.setattr(_strips, "WHOLE_UP_TO", 0)
    sizes = []
    unpack = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(_strips, "ROWS", 64)

    def counted(packed, state):
        sizes.append(state.shape[0])
        return unpack(packed, state)

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", counted)
    from bulkedge.tune import _thresholds

    monkeypatch.setattr(_thresholds, "EXACT_UP_TO", 16)
    clip = SpikeClip(model)
    assert max(sizes) == 64
    looks = len(sizes)
    train(model, clip, steps=1)
    assert set(sizes[looks:]) <= {96}  # the forward pass of the layer itself


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_thresholds_of_a_budget_are_not_measured_again(kind, tmp_path, monkeypatch):
    model, _ = packed_model(kind)
    save_file({"0.weight": unpacked(model)}, tmp_path / "base.safetensors")
    record = bulkedge.budget(tmp_path / "base.safetensors")
    file = tmp_path / "budget.json"
    file.write_text(record.to_json())
    measured = SpikeClip(model, of="leading").thresholds
    monkeypatch.setattr(_strips, "strips_of", lambda *_: pytest.fail("measured again"))
    (matrix,) = adapted_matrices(model)
    monkeypatch.setattr(type(matrix), "base_map", lambda *_: pytest.fail("measured again"))
    for of, field in (("leading", "top_k_threshold"), ("edge", "threshold")):
        clip = SpikeClip(model, of=of, thresholds=file)
        assert clip.thresholds == {matrix.name: getattr(record.matrices[0], field)}
    assert SpikeClip(model, of="leading", thresholds=file).thresholds[matrix.name] == pytest.approx(
        measured[matrix.name], rel=1e-6
    )


def test_a_budget_of_another_base_is_refused(tmp_path):
    model, _ = packed_model("nf4")
    save_file({"other.weight": torch.randn(40, 30)}, tmp_path / "base.safetensors")
    file = tmp_path / "budget.json"
    file.write_text(bulkedge.budget(tmp_path / "base.safetensors").to_json())
    with pytest.raises(InputError, match=r"budget.json: expected a budget of the base that is"):
        SpikeClip(model, thresholds=file)
    file.write_text(bulkedge.budget(tmp_path / "base.safetensors", top_k=4).to_json())
    with pytest.raises(InputError, match="the 10 leading directions, got one of 4; make it anew"):
        SpikeClip(model, of="leading", thresholds=file)
