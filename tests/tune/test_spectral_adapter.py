"""Spectral adapters through stock PEFT: trained, saved, loaded, merged, exported; their algebra."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from bulkedge import InputError
from bulkedge.tune._spectral import Basis, additive, rotation_of, rotational

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from bulkedge.tune.peft import (  # noqa: E402
    SpectralConfig,
    SpectralLayer,
    export_lora,
    lora_factors,
)
from helpers import some  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT of transformers
WIDE = torch.float64
VARIANTS = ("additive", "rotational")
TARGETS = {"bert": ["query", "dense"], "gpt2": ["c_attn", "c_fc"], "llama": "all-linear"}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


# ---- algebra


def small_basis(m=14, n=11, r=4):
    return Basis.of(draw(m, n), r)


def test_the_basis_is_that_of_an_svd():
    W0 = draw(30, 20)
    basis = Basis.of(W0, 5)
    torch.testing.assert_close(basis.S, torch.linalg.svdvals(W0)[:5])
    assert basis.relative_residual(W0) < 1e-9
    assert basis.relative_residual(draw(30, 20, seed=1)) > 0.1
    # what differs on one side alone
    beyond = torch.linalg.svd(W0).Vh[-1:]
    assert basis.relative_residual(W0 + basis.U[:, :1] @ beyond) > 0.1
    assert basis.relative_residual(W0.bfloat16()) < 2e-3
    assert Basis.of(torch.zeros(5, 4), 2).relative_residual(torch.zeros(5, 4)) == 0


def test_additive_factors_are_the_formula():
    basis, A_U, A_V = small_basis(), draw(14, 4, seed=1), draw(11, 4, seed=2)
    X, Y = additive(basis, A_U, A_V)
    old = basis.U * basis.S @ basis.V.mT
    torch.testing.assert_close(X @ Y.mT, (basis.U + A_U) * basis.S @ (basis.V + A_V).mT - old)
    assert int(torch.linalg.matrix_rank(X @ Y.mT)) == 8


@pytest.mark.parametrize("rotation", ["cayley", "exp"])
def test_rotational_factors_keep_values_and_spaces(rotation):
    W0, basis = draw(14, 11), small_basis()
    K_U, K_V = draw(6, seed=1), draw(6, seed=2)
    X, Y = rotational(basis, K_U, K_V, rotation)
    W = W0 + X @ Y.mT
    torch.testing.assert_close(torch.linalg.svdvals(W), torch.linalg.svdvals(W0))
    U = torch.linalg.svd(W).U[:, :4]
    torch.testing.assert_close(U @ U.mT, basis.U @ basis.U.mT)
    assert float((X @ Y.mT).norm()) > 0.1 * float(W0.norm())


@pytest.mark.parametrize("rotation", ["cayley", "exp"])
def test_rotations(rotation):
    assert torch.equal(rotation_of(torch.zeros(6), 4, rotation), torch.eye(4))
    R = rotation_of(draw(6), 4, rotation)
    torch.testing.assert_close(R.mT @ R, torch.eye(4, dtype=WIDE))
    assert float(torch.linalg.det(R)) == pytest.approx(1.0)
    assert rotation_of(torch.zeros(0), 1, rotation).tolist() == [[1.0]]


def test_gradients_by_differences():
    basis = small_basis(6, 5, 3)

    def full(function, *parameters):
        X, Y = function(basis, *parameters)
        return X @ Y.mT

    A = [draw(6, 3, seed=1).requires_grad_(), draw(5, 3, seed=2).requires_grad_()]
    K = [draw(3, seed=s).requires_grad_() for s in (3, 4)]
    assert torch.autograd.gradcheck(lambda *p: full(additive, *p), A)
    assert torch.autograd.gradcheck(lambda *p: full(rotational, *p), K)


# ---- through PEFT


def make_base(kind="bert", dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=16, num_labels=3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=16,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ))  # fmt: skip
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=16,
        ))  # fmt: skip
    return model.to(dtype)


def configure(kind="bert", variant="additive", **options):
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    options = {"r": 4, "variant": variant, "target_modules": TARGETS[kind]} | options
    return SpectralConfig(task_type=task, **options)


def tokens():
    return torch.randint(0, 60, (8, 10), generator=torch.Generator().manual_seed(1))


def output(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens()).logits.float()


def train(model, kind="bert", steps=8):
    """A few steps; the first and the last loss."""
    labels = tokens()[:, 0] % 3 if kind == "bert" else tokens()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


def trained(kind="bert", variant="additive", dtype=torch.float32, **options):
    model = peft.get_peft_model(make_base(kind, dtype), configure(kind, variant, **options))
    train(model, kind)
    return model


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, SpectralLayer)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", TARGETS)
def test_from_the_identity_to_a_saved_adapter(tmp_path, kind, variant):
    plain = output(make_base(kind))
    model = peft.get_peft_model(make_base(kind), configure(kind, variant))
    torch.testing.assert_close(output(model), plain, rtol=0, atol=1e-6)
    first, last = train(model, kind)
    assert last < first
    after = output(model)
    assert float((after - plain).abs().max()) > 1e-3

    model.save_pretrained(tmp_path / "saved")
    for meta in (False, True):
        again = peft.PeftModel.from_pretrained(
            make_base(kind), tmp_path / "saved", low_cpu_mem_usage=meta
        )
        torch.testing.assert_close(output(again), after, rtol=0, atol=0)

    folder = export_lora(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(make_base(kind), folder)
    assert type(lora.peft_config["default"]) is peft.LoraConfig
    torch.testing.assert_close(output(lora), after, rtol=0, atol=1e-5)

    merged = model.merge_and_unload(safe_merge=True)
    assert not layers(merged)
    torch.testing.assert_close(output(merged), after, rtol=0, atol=1e-5)


def test_a_safe_merge_of_what_is_not_finite_is_refused():
    model = peft.get_peft_model(make_base("bert"), configure("bert", "additive"))
    with torch.no_grad():
        for parameter in some([p for p in model.parameters() if p.requires_grad]):
            parameter.fill_(torch.nan)
    with pytest.raises(InputError, match="the merged weight of adapter 'default' is not finite"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_what_it_does_to_weights(kind):
    base = dict(make_base(kind).named_parameters())
    for variant in VARIANTS:
        for name, layer in some(trained(kind, variant).named_modules()):
            if not isinstance(layer, SpectralLayer):
                continue
            W0 = base[f"{name.removeprefix('base_model.model.')}.weight"].detach().double()
            update = layer.get_delta_weight("default").detach().double()
            if variant == "additive":
                assert int(torch.linalg.matrix_rank(update, rtol=1e-5)) <= 8
            else:
                values = torch.linalg.svdvals(W0 + update)
                torch.testing.assert_close(values, torch.linalg.svdvals(W0), rtol=1e-5, atol=1e-6)
                assert int(torch.linalg.matrix_rank(update, rtol=1e-5)) <= 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_comes_undone_and_adapters_can_be_switched_off(variant):
    model = trained(variant=variant)
    plain, after = output(make_base()), output(model)
    model.merge_adapter()
    torch.testing.assert_close(output(model), after, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(output(model), after, rtol=0, atol=1e-5)
    with model.disable_adapter():
        encoder = model.base_model.model.bert
        off = encoder(input_ids=tokens()).pooler_output
    torch.testing.assert_close(off, make_base().eval().bert(input_ids=tokens()).pooler_output)
    assert float((after - plain).abs().max()) > 1e-3


def test_several_adapters(tmp_path):
    model = trained()
    first = output(model)
    model.add_adapter("other", configure(variant="rotational", r=6, rotation="exp"))
    model.set_adapter("other")
    train(model)
    second = output(model)
    model.set_adapter("default")
    torch.testing.assert_close(output(model), first, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_base(), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    torch.testing.assert_close(output(again), first, rtol=0, atol=0)
    again.set_adapter("other")
    torch.testing.assert_close(output(again), second, rtol=0, atol=0)
    again.delete_adapter("default")
    torch.testing.assert_close(output(again), second, rtol=0, atol=0)
    assert all(set(layer.spectral_U) == {"other"} for layer in layers(again))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_base_in_half_precision(tmp_path, variant):
    model = trained("llama", variant, torch.bfloat16)
    layer = layers(model)[0]
    assert layer.get_base_layer().weight.dtype is torch.bfloat16
    assert layer.spectral_U["default"].dtype is torch.float32
    assert layer.spectral_left["default"].dtype is torch.float32
    after = output(model)
    model.save_pretrained(tmp_path / "saved")
    for meta in (False, True):
        again = peft.PeftModel.from_pretrained(
            make_base("llama", torch.bfloat16), tmp_path / "saved", low_cpu_mem_usage=meta
        )
        assert layers(again)[0].spectral_left["default"].dtype is torch.float32
        torch.testing.assert_close(output(again), after, rtol=0, atol=0)
    export_lora(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(make_base("llama", torch.bfloat16), tmp_path / "lora")
    torch.testing.assert_close(output(lora), after, rtol=0.05, atol=0.02)  # bfloat16 has 3 digits


@pytest.mark.parametrize("meta", [False, True])
def test_another_base_is_refused_while_loading(tmp_path, meta):
    trained().save_pretrained(tmp_path)
    other = make_base()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    with pytest.raises(InputError, match=r"layer\.0.*query: .* is not that of this weight"):
        peft.PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=meta)


def test_the_base_in_another_precision_is_the_same(tmp_path):
    """Trained beside bfloat16, served beside the float32 that it was rounded from."""
    rounded = make_base("llama").to(torch.bfloat16)
    peft.get_peft_model(rounded, configure("llama", r=30)).save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_base("llama"), tmp_path)
    torch.testing.assert_close(output(again), output(make_base("llama")), rtol=0, atol=1e-5)


def test_loading_does_not_solve_for_what_the_file_brings(tmp_path, monkeypatch):
    model = trained()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(Basis, "of", lambda *_: pytest.fail("solved"))
    again = peft.PeftModel.from_pretrained(make_base(), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(output(again), output(model), rtol=0, atol=0)


def test_a_file_without_a_basis_is_completed_from_the_base(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    basis = ("spectral_U", "spectral_S", "spectral_V")
    tensors = {k: x for k, x in load_file(file).items() if not any(part in k for part in basis)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        again = peft.PeftModel.from_pretrained(make_base(), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(output(again), output(model), rtol=0, atol=1e-5)


def test_saved_is_trained_further_only_if_asked(tmp_path):
    trained().save_pretrained(tmp_path)
    for trainable in (False, True):
        again = peft.PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=trainable)
        grown = [p.requires_grad for n, p in again.named_parameters() if "spectral_" in n]
        assert grown
        assert set(grown) == {trainable}


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_does_not_reach_the_update(variant):
    layer = layers(trained(variant=variant))[0]
    expected = [*layer.factors("default"), layer.get_delta_weight("default")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [*layer.factors("default"), layer.get_delta_weight("default")]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if variant == "rotational" else 0, atol=1e-8)


def test_a_sum_is_rounded_once():
    model = trained("llama", "additive", torch.bfloat16)
    layer = layers(model)[0]
    weight = layer.get_base_layer().weight
    expected = (weight.float() + layer.get_delta_weight("default")).to(torch.bfloat16)
    twice = weight + layer.get_delta_weight("default").to(torch.bfloat16)
    assert not torch.equal(twice, expected)
    model.merge_adapter()
    assert torch.equal(layer.get_base_layer().weight, expected)


def test_no_adapter_is_added_to_a_merged_base():
    model = trained()
    after = output(model)
    model.merge_adapter()
    with pytest.raises(InputError, match="got one with default merged into it: unmerge_adapter"):
        model.add_adapter("other", configure())
    model.unmerge_adapter()
    model.add_adapter("other", configure())
    torch.testing.assert_close(output(model), after, rtol=0, atol=1e-5)


def test_a_copy_is_a_model_of_its_own():
    model = trained()
    copy, after = deepcopy(model), output(model)
    train(copy)
    torch.testing.assert_close(output(model), after, rtol=0, atol=0)
    assert not torch.equal(output(copy), after)


def test_a_base_in_double_precision():
    layer = layers(peft.get_peft_model(make_base(dtype=WIDE), configure(variant="rotational")))[0]
    assert {x.dtype for x in layer.factors("default")} == {WIDE}


@pytest.mark.parametrize("variant", VARIANTS)
def test_injected_without_a_wrapper(tmp_path, variant):
    model = peft.inject_adapter_in_model(configure(variant=variant), make_base())
    assert layers(model)
    torch.testing.assert_close(output(model), output(make_base()), rtol=0, atol=1e-6)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("spectral_" in name)  # else the head trains along
    train(model)
    lora = peft.PeftModel.from_pretrained(make_base(), export_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(output(lora), output(model), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to True",
    "ignore:Model (has|with) `tie_word",
    "ignore:Setting `save_embedding_layers`",
)
def test_layers_of_both_kinds_in_one_lora(tmp_path):
    config = {"target_modules": ["c_attn", "lm_head"]}
    model = trained("gpt2", **config)
    assert {layer._transposed for layer in layers(model)} == {True, False}
    after = output(model)
    lora = peft.PeftModel.from_pretrained(make_base("gpt2"), export_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(output(lora), after, rtol=0, atol=1e-5)


def test_factors_of_every_layer():
    model = trained()
    base = dict(make_base().named_parameters())
    factors = lora_factors(model)
    assert len(factors) == len(layers(model))
    assert {f"{name}.weight" for name in factors} <= set(base)
    for (B, A), layer in some(zip(factors.values(), layers(model), strict=True)):
        torch.testing.assert_close(B @ A, layer.get_delta_weight("default"))


@pytest.mark.skipif(not hasattr(peft, "convert_to_lora"), reason="PEFT before 0.19")
def test_pefts_own_conversion_takes_it():
    converted, _ = peft.convert_to_lora(trained(), rank=8)
    assert converted.r == 8


def test_a_new_process_loads_it_after_the_import(tmp_path):
    trained().save_pretrained(tmp_path)
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import bulkedge.tune.peft; "
        "from peft import PeftConfig; "
        "print(PeftConfig.from_pretrained(sys.argv[1]).variant)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "additive"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "expected r ≥ 1"),
        ({"r": True}, "expected r ≥ 1, got True"),
        ({"r": 1, "variant": "rotational"}, "expected r ≥ 2 for the rotational variant, got 1"),
        ({"spectral_dropout": float("nan")}, r"expected spectral_dropout in \[0, 1\), got nan"),
        ({"variant": "both"}, "expected variant"),
        ({"rotation": "givens"}, "expected rotation"),
        ({"bias": "all"}, "biases are not trained"),
        ({"spectral_dropout": 1.0}, r"expected spectral_dropout in \[0, 1\), got 1.0"),
        ({"r": 33}, r"expected r ≤ 32 for a weight of 32 × 32, got 33"),
        ({"target_modules": ["word_embeddings"]}, "expected a Linear or Conv1D layer"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        peft.get_peft_model(make_base(), configure(**options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_something_in_every_rank_that_is_allowed(variant):
    for r in (1, 2, 3):
        if (variant, r) == ("rotational", 1):
            continue
        model = peft.get_peft_model(make_base(), configure(variant=variant, r=r))
        assert all(layer.spectral_left["default"].numel() for layer in layers(model))


@pytest.mark.parametrize("kind", TARGETS)
def test_layers_tell_their_sizes_as_those_of_peft_do(kind):
    spectral = peft.get_peft_model(make_base(kind), configure(kind))
    lora = peft.get_peft_model(
        make_base(kind),
        peft.LoraConfig(target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2"),
    )
    known = [m for m in lora.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    sizes = [(layer.in_features, layer.out_features) for layer in layers(spectral)]
    assert sizes == [(layer.in_features, layer.out_features) for layer in known]
    assert sizes


def test_a_batch_of_several_adapters_is_refused():
    model = trained()
    model.add_adapter("other", configure(r=2))
    names = ["default", "other"] * 4
    one_adapter = r"expected one adapter for a whole batch, got adapter_names.*export_lora"
    with pytest.raises(InputError, match=one_adapter):
        model(input_ids=tokens(), adapter_names=names)
    with pytest.raises(InputError, match=one_adapter):
        layers(model)[0](torch.zeros(8, 32), adapter_names=names)
    causal = peft.get_peft_model(make_base("llama"), configure("llama"))
    with pytest.raises(InputError, match=one_adapter):
        causal.generate(input_ids=tokens(), adapter_names=["default"] * 8, max_new_tokens=1)
    torch.testing.assert_close(  # None is what PEFT passes on where nothing was asked
        model.eval()(input_ids=tokens(), adapter_names=None).logits, output(model)
    )


def test_weighted_sums_of_adapters_are_refused():
    model = trained()
    model.add_adapter("other", configure(r=2))
    with pytest.raises(InputError, match=r"adapters that can be added with weights.*export_lora"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")


def test_export_needs_such_an_adapter_and_a_new_folder(tmp_path):
    model = trained()
    with pytest.raises(InputError, match="expected a model with a spectral adapter 'other'"):
        export_lora(model, tmp_path / "lora", "other")
    export_lora(model, tmp_path / "lora")
    with pytest.raises(OSError, match=r"lora: cannot be written .Directory not empty"):
        export_lora(model, tmp_path / "lora")
