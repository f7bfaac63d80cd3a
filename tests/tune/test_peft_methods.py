"""Every method of PEFT of our own, from an update of zero to a LoRA that stock PEFT loads."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from bulkedge.tune._spectral import Basis

peft = pytest.importorskip("peft")

from bulkedge.tune.peft import (  # noqa: E402
    SpectralConfig,
    export_lora,
    lora_factors,
)
from bulkedge.tune.peft.config import METHODS  # noqa: E402

TARGETS = ["0", "2"]
CONFIGS = {
    "additive": SpectralConfig(r=2, target_modules=TARGETS),
    "rotational": SpectralConfig(r=3, variant="rotational", target_modules=TARGETS),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))


def adapted(name):
    return peft.get_peft_model(network(), deepcopy(CONFIGS[name]))


def train(model, x):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()


def test_every_method_is_tried():
    assert {config.method for config in CONFIGS.values()} == set(METHODS)


@pytest.mark.parametrize("name", CONFIGS)
def test_from_zero_to_a_lora(name, tmp_path):
    x, config, model = torch.eye(12), CONFIGS[name], adapted(name)
    torch.testing.assert_close(model(x), network()(x))
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(f".{config.method}_" in key for key in trained)
    train(model, x)
    after = model(x).detach()
    assert float((after - network()(x)).detach().norm()) > 0.1
    assert {B.shape[1] for B, _ in lora_factors(model).values()} == {config.columns}
    model.save_pretrained(tmp_path / "own")
    again = peft.PeftModel.from_pretrained(network(), tmp_path / "own")
    torch.testing.assert_close(again(x), after)
    lora = peft.PeftModel.from_pretrained(network(), export_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(lora(x), after, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(x), after, rtol=0, atol=1e-5)


def test_the_basis_of_a_spectral_adapter_is_checked_where_it_is_loaded(tmp_path, monkeypatch):
    adapted("additive").save_pretrained(tmp_path)
    calls = []
    found = Basis.relative_residual
    monkeypatch.setattr(
        Basis, "relative_residual", lambda self, W0: calls.append(1) or found(self, W0)
    )
    peft.PeftModel.from_pretrained(network(), tmp_path)
    assert len(calls) >= len(TARGETS)
