"""The adapted matrices of PEFT's layers: what they are views of, and what is refused."""

import pytest
import torch
from torch import nn

from bulkedge import InputError
from bulkedge.tune import EdgeClip, adapted_matrices

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of odd targets


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(30, 40)
        self.turned = transformers.pytorch_utils.Conv1D(40, 30)
        self.table = nn.Embedding(50, 30)
        self.kernel = nn.Conv2d(3, 20, 5)

    def forward(self, x):
        return self.linear(x)


def wrap(targets, **options):
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, **options)
    model = peft.get_peft_model(Model(), config)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("target", ["linear", "turned", "table", "kernel"])
def test_the_update_is_what_peft_adds(target):
    model = wrap([target], fan_in_fan_out=target == "turned")
    (matrix,) = adapted_matrices(model)
    layer = model.base_model.model.get_submodule(target)
    delta = layer.get_delta_weight("default").detach()
    stored = layer.get_base_layer().weight.detach()
    if target in ("turned", "table"):
        delta, stored = delta.T, stored.T
    torch.testing.assert_close(matrix.update_map().to_dense().detach(), delta.flatten(1))
    assert torch.equal(matrix.base, stored.flatten(1))
    assert matrix.scale == 3.0
    # a view: what is written into it is in the model
    EdgeClip([matrix], level=1.0, thresholds={matrix.name: 0.5}).step()
    held = layer.get_delta_weight("default").detach()
    held = held.T if target in ("turned", "table") else held
    assert float(torch.linalg.matrix_norm(held.flatten(1), 2)) == pytest.approx(0.5, rel=1e-4)


def test_patterns_and_adapters():
    model = wrap(["linear", "kernel"])
    assert len(adapted_matrices(model)) == 2
    assert [m.name for m in adapted_matrices(model, modules="*linear")] == [
        "base_model.model.linear"
    ]
    model.add_adapter("other", peft.LoraConfig(r=1, target_modules=["linear"]))
    assert adapted_matrices(model, adapter="other")[0].rank == 1
    with pytest.raises(InputError, match="found none that match \\*attention\\*"):
        adapted_matrices(model, modules="*attention*")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "got DoRA, whose rows are scaled as well"),
        ({"init_lora_weights": "pissa"}, "which moved the base"),
        ({"init_lora_weights": "olora"}, "which moved the base"),
    ],
)
def test_what_is_no_plain_update_is_refused(options, message):
    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["linear"], **options))
    with pytest.raises(InputError, match=message):
        adapted_matrices(model)


def test_a_merged_adapter_is_refused():
    model = wrap(["linear"])
    model.merge_adapter()
    with pytest.raises(InputError, match="merged adapter: unmerge it"):
        adapted_matrices(model)
