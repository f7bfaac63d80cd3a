"""PiSSA and OLoRA, unconverted: scores against what stock PEFT loads, and converts."""

import copy
import json
import re

import pytest
import torch
from click.testing import CliRunner

import bulkedge
from bulkedge import Recipe
from bulkedge.cli import cli
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from helpers import oracle_scores, save, save_adapter, some, weights

# what PEFT says of PiSSA beside other adapters, which a conversion needs
pytestmark = [
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern"),
]
CPU = torch.device("cpu")
RECIPE = {"top_k": 4, "method": "dense"}
CASES = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "OLoRA"},
    "pissa ranks": {"init_lora_weights": "pissa", "rank_pattern": {"v": 2}, "use_rslora": True},
    "pissa dora": {"init_lora_weights": "pissa", "use_dora": True},
}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(18, 30, bias=False)
        self.v = torch.nn.Linear(18, 24, bias=False)

    def forward(self, x):
        return self.q(x), self.v(x)


def train(tmp_path, name="pissa", *, convert=False):
    """A base, an unconverted adapter, a converted one, and the weights that stock PEFT merges."""
    import peft

    torch.manual_seed(1)
    base = Model()
    state = {name: W.detach().clone() for name, W in base.state_dict().items()}
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q", "v"]} | CASES[name]
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = settings["init_lora_weights"]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    save(tmp_path / "base.safetensors", state)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "tuned")
    merged = {k: W.detach() for k, W in loaded.merge_and_unload().state_dict().items()}
    if convert:
        model.save_pretrained(
            tmp_path / "converted",
            path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
        )
    return tmp_path / "base.safetensors", tmp_path / "tuned", state, merged


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_weights_that_peft_loads(case, tmp_path):
    base, adapter, before, after = train(tmp_path, case)
    record = bulkedge.audit(base, adapter, recipe=RECIPE | {"split": {"q.weight": [10, 20]}})
    names = ["q.weight[0:10]", "q.weight[10:30]", "v.weight"]
    assert [row.name for row in record.matrices] == names
    assert record.summary.lost == 0
    for row in some(record.matrices):
        name, _, part = row.name.partition("[")
        rows = slice(*map(int, part.rstrip("]").split(":"))) if part else slice(None)
        W0, W = (side[name][rows].double() for side in (before, after))
        assert torch.linalg.matrix_norm(W - W0, 2) > 0.1  # or nothing would be tried
        found = torch.tensor([d.score for d in row.directions], dtype=torch.float64)
        torch.testing.assert_close(found, oracle_scores(W0, W, 4), atol=1e-4, rtol=0)
        norm = float(torch.linalg.matrix_norm(W - W0, 2))
        assert row.spectral_norm_update == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_update_is_that_of_pefts_own_conversion(init, tmp_path):
    base, adapter, _, _ = train(tmp_path, init, convert=True)
    plans = [make_plan(base, tuned, Recipe()) for tuned in (adapter, tmp_path / "converted")]
    for ours, peft in some(zip(*(plan.comparisons for plan in plans), strict=True)):
        update, converted = (load(c, CPU).low_rank.to_dense() for c in (ours, peft))
        assert torch.linalg.matrix_norm(converted) > 0.1
        torch.testing.assert_close(update, converted, atol=1e-5, rtol=0)


def test_what_depends_on_the_base_is_computed_once_for_several(tmp_path, monkeypatch):
    from bulkedge.auditing import run_plans
    from bulkedge.comparison import initial

    base, adapter, _, _ = train(tmp_path)
    taken, count = initial._taken, []
    monkeypatch.setattr(initial, "_taken", lambda *given: count.append(given[0]) or taken(*given))
    recipe = Recipe(**RECIPE)
    records = run_plans([make_plan(base, adapter, recipe) for _ in range(3)], recipe)
    assert count == ["pissa", "pissa"]  # two matrices, three fine-tunes
    assert records[0].matrices == records[2].matrices


def test_repairs_and_budgets_say_how_to_convert(tmp_path):
    base, adapter, _, _ = train(tmp_path)
    for method in (None, bulkedge.repairing.Rescale(uniform=0.5)):
        done = bulkedge.repair(base, adapter, None, recipe=RECIPE, method=method)
        for row in some(done.matrices):
            assert row.status == "refused"
            assert "path_initial_model_for_weight_conversion=INITIAL" in row.note
    found = bulkedge.budget(base, like=adapter)
    assert {"PiSSA took from the base" in row.note for row in some(found.matrices)} == {True}


def test_what_cannot_be_computed_is_lost_by_name(tmp_path):
    base, adapter, _, _ = train(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for bad, message in (
        ({"target_parameters": ["q.weight"]}, "PiSSA of bare parameters"),
        ({"lora_alpha": 0}, "a scale of zero, which PiSSA divides by"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | bad))
        record = bulkedge.audit(base, adapter, recipe=RECIPE)
        told = [row.reason for row in record.skipped if row.lost]
        told += [row.note for row in record.matrices if row.status == "failed"]
        assert any(message in line for line in told)


def test_a_quantised_base_is_lost_by_name(tmp_path):
    W8 = weights(30, 18).to(torch.float8_e4m3fn)
    scale = torch.ones(1)
    base = save(tmp_path / "b.safetensors", {"q.weight": W8, "q.weight_scale": scale})
    factors = {"q.lora_A.weight": weights(2, 18), "q.lora_B.weight": weights(30, 2)}
    adapter = save_adapter(tmp_path / "a", factors, init_lora_weights="pissa")
    message = "PiSSA on a quantised base, where PEFT rounds the residual again; convert it"
    with pytest.raises(bulkedge.NothingAuditedError, match=message):
        bulkedge.audit(base, adapter)


REFUSED = {
    "pissa_niter_4": "by random projections; convert it where it was trained, with",
    "corda": "by the inputs of a calibration; convert it where it was trained, with",
    "lora_ga": "by gradients of a batch; convert it where it was trained, with",
    "loftq": "by a quantisation of its own; PEFT does not convert it: audit the merged",
}


@pytest.mark.parametrize("init", REFUSED)
def test_the_others_are_refused_with_the_remedy(init, tmp_path):
    base = save(tmp_path / "b.safetensors", {"q.weight": weights(30, 18)})
    factors = {"q.lora_A.weight": weights(2, 18), "q.lora_B.weight": weights(30, 2)}
    adapter = save_adapter(tmp_path / "a", factors, init_lora_weights=init)
    message = f"initialised by '{init}', which changes the base weights too, {REFUSED[init]}"
    with pytest.raises(bulkedge.AdapterError, match=re.escape(message)):
        make_plan(base, adapter, Recipe())


def test_inspect_names_the_initialisation(tmp_path):
    _, adapter, _, _ = train(tmp_path, "olora")
    done = CliRunner().invoke(cli, ["inspect", str(adapter)])
    line = done.stdout.splitlines()[-1]
    assert ", initialised by OLoRA: 2 layers updated by factors of rank" in line
