"""The adapted matrices of PEFT's layers: what they are views of, and what is refused."""

import gc
import weakref

import pytest
import torch
from torch import nn

from bulkedge import InputError, RecipeError
from bulkedge.tune import (
    AdaptedMatrix,
    Monitor,
    OrthonormalFactors,
    RankController,
    SpikeClip,
    adapted_matrices,
)

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
    SpikeClip([matrix], level=1.0, thresholds={matrix.name: 0.5}).step()
    held = layer.get_delta_weight("default").detach()
    held = held.T if target in ("turned", "table") else held
    assert float(torch.linalg.matrix_norm(held.flatten(1), 2)) == pytest.approx(0.5, rel=1e-4)


def test_patterns_and_adapters():
    model = wrap(["linear", "kernel"])
    assert len(adapted_matrices(model)) == 2
    assert [m.name for m in adapted_matrices(model, include="*linear")] == [
        "base_model.model.linear"
    ]
    model.add_adapter("other", peft.LoraConfig(r=1, target_modules=["linear"]))
    assert adapted_matrices(model, adapter="other")[0].rank == 1
    with pytest.raises(RecipeError, match=r"'\*attention\*' matches no layer .* nearest name is"):
        adapted_matrices(model, include="*attention*")
    with pytest.raises(RecipeError, match=r"'\*kernel' matches no layer"):  # not of this adapter
        adapted_matrices(model, include=["*linear", "*kernel"], adapter="other")
    with pytest.raises(InputError, match=r"found none that match \* with adapter 'third'"):
        adapted_matrices(model, adapter="third")


@pytest.mark.parametrize(
    ("options", "message"),
    [
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


class Outer(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return self.inner(x)


def place(model, where):
    """A model somewhere inside another, as training libraries have it."""
    if where == "outer":
        return Outer(Outer(model))
    if where == "parallel":
        return nn.DataParallel(model)
    if where == "compiled":
        return torch.compile(model)
    return {"bare": model, "tuner": model.base_model, "inside": model.base_model.model}[where]


@pytest.mark.parametrize("where", ["bare", "tuner", "inside", "outer", "parallel", "compiled"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "loftq", "corda"])
def test_a_base_that_was_moved_is_refused_wherever_the_model_is(init, where):
    """The configuration is what says so: how the factors are is another matter."""
    model = wrap(["linear"])
    model.peft_config["default"].init_lora_weights = init
    with pytest.raises(InputError, match=f"linear: .*init_lora_weights='{init}', which moved"):
        adapted_matrices(place(model, where))
    model.peft_config["default"].init_lora_weights = True
    (matrix,) = adapted_matrices(place(model, where))
    layer = model.base_model.model.linear
    assert matrix.B is layer.lora_B["default"].weight


def test_pissa_as_peft_makes_it_is_refused_in_another_module():
    config = peft.LoraConfig(r=2, target_modules=["linear"], init_lora_weights="pissa")
    model = Outer(peft.get_peft_model(Model(), config))
    weight = model.inner.base_model.model.linear.base_layer.weight
    before = weight.detach().clone()
    with pytest.raises(InputError, match="which moved the base"):
        SpikeClip(model)
    assert torch.equal(weight, before)


def test_a_part_without_its_configuration_is_refused():
    model = wrap(["linear"])
    with pytest.raises(InputError, match="expected the configuration of the adapter 'default'"):
        adapted_matrices(nn.Sequential(model.base_model.model.linear))


def test_grouped_convolutions_are_refused():
    plain = Model()
    plain.kernel = nn.Conv2d(4, 20, 5, groups=2)
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["kernel"]))
    with pytest.raises(InputError, match="kernel: expected a convolution without groups"):
        adapted_matrices(model)


def test_a_base_of_another_shape_is_refused():
    model = wrap(["linear"])
    (matrix,) = adapted_matrices(model)
    model.base_model.model.linear.base_layer.weight = nn.Parameter(torch.zeros(40, 29))
    with pytest.raises(InputError, match=r"linear: expected a base of shape \(40, 30\)"):
        matrix.base_map()


class Packed(nn.Linear):
    """A base that is stored in another form, behind the interface of HQQ that PEFT knows."""

    unpacked = ()

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        values = self.weight.detach().mul(500).round().clamp(-127, 127).add(128)
        self.W_q = values.to(torch.uint8)
        self.weight = nn.Parameter(self.W_q, requires_grad=False)

    def dequantize(self):
        copy = self.W_q.float().sub(128).div(500)
        self.unpacked = (*self.unpacked, weakref.ref(copy))
        return copy


def packed_model():
    plain = Model()
    plain.linear = nn.Linear(30, 40)
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["linear"]))
    layer = model.base_model.model.linear
    layer.base_layer = Packed(30, 40)
    nn.init.normal_(layer.lora_B["default"].weight)
    return model, layer.base_layer


@pytest.mark.parametrize("kind", [SpikeClip, RankController, OrthonormalFactors, Monitor])
def test_no_copy_of_a_packed_base_is_kept(kind):
    """Thresholds take one look at it."""
    model, base = packed_model()
    holder = kind(model)
    looks = 0 if kind is OrthonormalFactors else 1
    assert len(base.unpacked) == looks
    for _ in range(3):
        holder.step()
    gc.collect()
    assert len(base.unpacked) == looks
    assert not any(copy() is not None for copy in base.unpacked)
    assert (
        not looks
        or holder.thresholds
        == SpikeClip(
            [AdaptedMatrix("base_model.model.linear", base.dequantize(), *draws())]
        ).thresholds
    )


def draws():
    return torch.randn(2, 30), torch.randn(40, 2)


def test_a_packed_base_that_cannot_be_unpacked_names_its_layer(monkeypatch):
    model, base = packed_model()
    monkeypatch.setattr(base, "dequantize", lambda: 1 / 0)
    with pytest.raises(InputError, match=r"linear: the base weight cannot be dequantised \(div"):
        SpikeClip(model)


class Tied(transformers.PreTrainedModel):
    """An embedding and a head with one weight."""

    config_class = transformers.PretrainedConfig
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(50, 30)
        self.lm_head = nn.Linear(30, 50, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, x):
        return self.lm_head(self.embed_tokens(x))


def tied_model():
    torch.manual_seed(0)
    model = Tied(transformers.PretrainedConfig(tie_word_embeddings=True))
    config = peft.LoraConfig(
        r=4, lora_alpha=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    model = peft.get_peft_model(model, config)
    inner = model.base_model.model
    with torch.no_grad():
        inner.embed_tokens.lora_embedding_A["default"].normal_()
        inner.embed_tokens.lora_embedding_B["default"].normal_()
    head = inner.lm_head
    if not hasattr(head, "lora_A"):
        pytest.skip("this PEFT does not tie factors")
    return model, head


def test_tied_factors_are_held_once():
    model, head = tied_model()
    clip = SpikeClip(model, level=0.9)
    assert len(clip.matrices) == 2
    clip.step()
    norm = float(torch.linalg.matrix_norm(head.get_delta_weight("default").double(), 2))
    theta = min(clip.thresholds.values())
    assert 0.9 * theta * (1 - 1e-5) < norm <= 0.9 * theta * (1 + 1e-6)
    assert min(clip.strongest.values()) > 1  # both as they were before


def test_tied_factors_have_one_rank():
    model, head = tied_model()
    control = RankController(model, start=2, every=1, level=0.9)
    control.step()
    ranks = {state.rank for state in control.state.values()}
    assert len(ranks) == 1
    rank = int(torch.linalg.matrix_rank(head.get_delta_weight("default").detach()))
    assert 2 <= rank <= ranks.pop()


def test_factors_of_integers_are_refused():
    factors = torch.ones(1, 5, dtype=torch.long), torch.ones(6, 1)
    with pytest.raises(
        InputError, match=r"w: expected real floating-point tensors, got torch\.int"
    ):
        AdaptedMatrix("w", torch.zeros(6, 5), *factors)
