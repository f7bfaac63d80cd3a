"""LoHa, LoKr, AdaLoRA and VeRA: scores against the weights that stock PEFT merges."""

import copy
import json

import pytest
import torch

import bulkedge
from bulkedge.checkpoint import open_path
from bulkedge.checkpoint.peft_other import FIXED
from helpers import oracle_scores, save, some

RECIPE = {"top_k": 4, "method": "dense"}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(18, 30, bias=False)
        self.v = torch.nn.Linear(18, 24, bias=False)

    def forward(self, x):
        return self.q(x), self.v(x)


def configs():
    import peft

    both = {"target_modules": ["q", "v"]}
    return {
        "loha": peft.LoHaConfig(r=2, alpha=6, alpha_pattern={"v": 3}, **both),
        "loha ranks": peft.LoHaConfig(r=2, alpha=6, rank_pattern={"v": 3}, **both),
        "lokr": peft.LoKrConfig(r=2, alpha=5, **both),
        "lokr both": peft.LoKrConfig(r=1, alpha=5, decompose_both=True, decompose_factor=3, **both),
        "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=7, total_step=9, **both),
        "vera": peft.VeraConfig(r=4, **both),
    }


@pytest.fixture(params=["loha", "loha ranks", "lokr", "lokr both", "adalora", "vera"])
def trained(request, tmp_path):
    """A base, an adapter that stock PEFT has saved, and the weights that it merges."""
    import peft

    torch.manual_seed(1)
    base = Model()
    model = peft.get_peft_model(copy.deepcopy(base), configs()[request.param])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "ranknum" not in name:
            torch.nn.init.normal_(parameter, std=1.0)
    model.save_pretrained(tmp_path / "a")
    state = {name: W.detach() for name, W in base.state_dict().items()}
    save(tmp_path / "b.safetensors", state)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    merged = loaded.merge_and_unload().state_dict()
    return request.param, tmp_path / "b.safetensors", tmp_path / "a", state, merged


def test_scores_are_those_of_the_merged_weights(trained):
    method, base, adapter, before, after = trained
    record = bulkedge.audit(base, adapter, recipe=RECIPE)
    assert {row.name for row in record.matrices} == {"q.weight", "v.weight"}
    assert record.summary.lost == 0
    for row in some(record.matrices):
        W0, W = before[row.name].double(), after[row.name].double()
        assert torch.linalg.matrix_norm(W - W0, 2) > 0.1  # or nothing would be tried
        found = torch.tensor([d.score for d in row.directions], dtype=torch.float64)
        torch.testing.assert_close(found, oracle_scores(W0, W, 4), atol=1e-4, rtol=0)
        assert row.update == record.inputs.tuned.kind == method.split()[0]
        norm = float(torch.linalg.matrix_norm(W - W0, 2))
        assert row.spectral_norm_update == pytest.approx(norm, rel=1e-5)


def test_blocks_of_rows_and_what_a_repair_says(trained, tmp_path):
    _, base, adapter, before, after = trained
    record = bulkedge.audit(base, adapter, recipe=RECIPE | {"split": {"q.weight": [10, 20]}})
    row = next(m for m in record.matrices if m.name == "q.weight[10:30]")
    W0, W = (side["q.weight"][10:].double() for side in (before, after))
    found = torch.tensor([d.score for d in row.directions], dtype=torch.float64)
    torch.testing.assert_close(found, oracle_scores(W0, W, 4), atol=1e-4, rtol=0)
    repaired = bulkedge.repair(base, adapter, None, recipe=RECIPE)
    refused = {m.name: m.note for m in repaired.matrices if m.status == "refused"}
    new = {m.name: m.read_only for m in repaired.before.matrices if m.new_directions}
    assert refused == new
    assert set(some(new.values())) == {FIXED}


BAD = {
    "half": ("LOHA", {"q.hada_w1_a": torch.ones(3, 2)}, "do not fit together"),
    "kernel": ("LOKR", {"q.lokr_w1": torch.ones(2, 2), "q.lokr_w2": torch.ones(2, 2, 3)}, "not"),
    "tucker": ("LOHA", {"q.hada_t1": torch.ones(2, 2, 3, 3)}, "Tucker"),
    "no projection": (
        "VERA", {"q.vera_lambda_b": torch.ones(3), "q.vera_lambda_d": torch.ones(2)}, "do not fit"
    ),
    "integers": ("ADALORA", {"q.lora_A": torch.ones(2, 3).int()}, "not a floating-point weight"),
    "empty": ("LOKR", {"q.lokr_w1": torch.ones(0, 2), "q.lokr_w2": torch.ones(2, 2)}, "empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_parts_that_do_not_fit_are_told(case, tmp_path):
    method, parts, message = BAD[case]
    named = {f"base_model.model.{name}": tensor for name, tensor in parts.items()}
    save(tmp_path / "adapter_model.safetensors", named)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": method, "r": 2}))
    opened = open_path(tmp_path)
    assert not opened.factors
    assert {message in row.reason for row in some(opened.unhandled)} == {True}


@pytest.mark.parametrize("settings", [{"r": 0}, {"r": "x"}, {"alpha": 1e300}, {"alpha": None}])
def test_settings_that_are_no_numbers(settings, tmp_path):
    save(tmp_path / "adapter_model.safetensors", {"q.hada_w1_a": torch.ones(2, 2)})
    content = {"peft_type": "LOHA"} | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(bulkedge.AdapterError, match=r"r .*, alpha .*: expected numbers"):
        open_path(tmp_path)


@pytest.mark.parametrize("method", ["LN_TUNING", "VBLORA", "C3A", "ROAD"])
def test_others_are_refused_by_name(method, tmp_path):
    save(tmp_path / "adapter_model.safetensors", {"q.x": torch.ones(2, 2)})
    content = {"peft_type": method, "r": 0}  # the method is what is wrong, not its rank
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(bulkedge.AdapterError, match=f"a '{method}' adapter; it is not handled"):
        open_path(tmp_path)
