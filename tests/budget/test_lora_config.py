"""A budget as settings of PEFT: every layer gets the α that is meant, as stock PEFT sees it."""

import json

import pytest
import torch
from torch import nn

import bulkedge
from bulkedge import InputError
from bulkedge.budgeting.patterns import exclusive
from bulkedge.checkpoint import open_adapter
from helpers import save, some, weights

peft = pytest.importorskip("peft")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(16, 20), nn.Linear(20, 16)


class Net(nn.Module):
    """Layers whose names are the ends of others: ``fc``, ``decoder.fc``, ``old.decoder.fc``."""

    def __init__(self):
        super().__init__()
        self.fc, self.decoder, self.old = nn.Linear(16, 24), Block(), nn.Module()
        self.old.decoder, self.olddecoder = Block(), Block()
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return x


@pytest.fixture
def base(tmp_path):
    model = Net()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(weights(*parameter.shape, seed=i) * (1 + i))
    return model, save(tmp_path / "base.safetensors", dict(model.state_dict()))


def alphas(model, prefix=""):
    """The α of each layer that PEFT has wrapped, by its path."""
    return {
        name.removeprefix(f"base_model.model.{prefix}"): layer.scaling["default"]
        * layer.r["default"]
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


def meant(record):
    return {row.module: row.allowed.alpha for row in some(record.matrices)}


@pytest.mark.parametrize("exclude", [(), ("fc", "decoder.out")])
def test_every_layer_gets_its_alpha(base, tmp_path, exclude):
    model, path = base
    record = bulkedge.budget(path, rank=4, alpha=8, exclude=exclude)
    settings = json.loads(json.dumps(bulkedge.lora_config(record)))
    tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
    assert alphas(tuned) == pytest.approx(meant(record), rel=1e-4)
    assert len(meant(record)) == 7 - len(exclude)
    # PEFT sorts the patterns when it saves: what is loaded is the same
    tuned.save_pretrained(tmp_path / "a")
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "a")
    assert alphas(again) == pytest.approx(meant(record), rel=1e-4)
    stored = open_adapter(tmp_path / "a").factors
    ours = {name.removesuffix(".weight"): found.scale * 4 for name, found in stored.items()}
    assert ours == pytest.approx(meant(record), rel=1e-4)


def test_a_model_with_a_prefix_in_front_gets_the_same(base):
    model, path = base
    record = bulkedge.budget(path, rank=4, alpha=8)
    outer = nn.Module()
    outer.bert, outer.forward = model, model.forward
    tuned = peft.get_peft_model(outer, peft.LoraConfig(**bulkedge.lora_config(record)))
    assert alphas(tuned, "bert.") == pytest.approx(meant(record), rel=1e-4)


def test_like_an_adapter_with_ranks_of_its_own(base, tmp_path):
    model, path = base
    config = peft.LoraConfig(
        r=2, lora_alpha=600, target_modules=["decoder.fc", "out"], rank_pattern={"out": 3},
        use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    record = bulkedge.budget(path, like=tmp_path / "a", level=0.8)
    assert record.above
    settings = bulkedge.lora_config(record)
    assert settings["r"] == 2
    assert set(settings["rank_pattern"].values()) == {3}
    stored = json.loads((tmp_path / "a/adapter_config.json").read_text())
    patterns = {name: settings[name] for name in ("rank_pattern", "alpha_pattern")}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(stored | patterns))
    after = bulkedge.budget(path, like=tmp_path / "a", level=0.8)
    assert not after.above
    for row in some(after.matrices):
        assert row.allowed.spectral_norm_update <= 0.8 * row.top_k_threshold
        assert row.allowed.alpha == pytest.approx(meant(record)[row.module], rel=1e-4)


def test_a_key_matches_its_own_layer_and_no_other():
    known = ["fc", "decoder.fc", "old.decoder.fc"]
    assert exclusive("old.decoder.fc", known) == r"old\.decoder\.fc"
    assert exclusive("decoder.fc", known) == r"(?<!^old\.)(?<!\.old\.)decoder\.fc"


def test_without_rank_or_without_limits_there_are_no_settings(base, tmp_path):
    with pytest.raises(InputError, match="expected rank and alpha, or like="):
        bulkedge.lora_config(bulkedge.budget(base[1]))
    small = save(tmp_path / "small.safetensors", {"fc.weight": weights(3, 3)})
    record = bulkedge.budget(small, rank=4, alpha=8, target="fc")
    with pytest.raises(InputError, match="expected layers with a limit"):
        bulkedge.lora_config(record)
