"""LoRA of image models in one file: what a layer with both factors computes is the judge."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import bulkedge
from bulkedge import AdapterError, CheckpointError, NothingAuditedError, Recipe
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from helpers import save, some, weights

CPU = torch.device("cpu")
LAYERS = {
    "down_blocks.0.attentions.1.attn1.to_q": (6, 4),
    "down_blocks.0.attentions.1.attn1.to_out.0": (4, 6),
    "down_blocks.0.attentions.1.proj_in": (4, 4, 1, 1),
    "down_blocks.0.resnets.0.conv1": (8, 4, 3, 3),
    "time_embedding.linear_1": (5, 4),
}


def base_tensors(prefix=""):
    return {f"{prefix}{n}.weight": weights(*s, seed=i) for i, (n, s) in enumerate(LAYERS.items())}


def factors_of(name, r=2):
    out, into, *kernel = LAYERS[name]
    up = (out, r) + (1,) * len(kernel)
    return weights(r, into, *kernel, seed=len(name)), weights(*up, seed=len(name) + 1)


def acts(W, x):
    """What a layer of the weight W, linear or a convolution, makes of x."""
    return F.conv2d(x, W) if W.ndim == 4 else F.linear(x, W)


def check(plan, scales):
    """The audited matrix acts as the base and, beside it, up after down times the scale."""
    assert len(plan.comparisons) == len(scales)
    for comparison in some(plan.comparisons):
        name = next(n for n in LAYERS if comparison.base.info.name.endswith(f"{n}.weight"))
        down, up = factors_of(name)
        W0 = load(comparison, CPU).base.double()
        shape = LAYERS[name]
        x = weights(2, shape[1], *((5, 5) if len(shape) == 4 else ())).double()
        W0 = W0.reshape(shape)
        expected = acts(W0, x) + scales[name] * acts(up.double(), acts(down.double(), x))
        W = load(comparison, CPU).tuned_map(torch.float64).to_dense().reshape(shape)
        torch.testing.assert_close(acts(W, x), expected)


def kohya(component="lora_unet_", alpha=3.0, layers=LAYERS):
    tensors = {}
    for name in layers:
        key = component + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = factors_of(name)
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.parametrize(
    ("alpha", "scale"), [(3.0, 1.5), (4, 2.0), (0.0, 1.0), (None, 1.0), ([5.0], 2.5)], ids=str
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_kohya(alpha, scale, prefix, tmp_path):
    base = save(tmp_path / "unet.safetensors", base_tensors(prefix))
    lora = save(tmp_path / "lora.safetensors", kohya(alpha=alpha))
    plan = make_plan(base, lora, Recipe())
    check(plan, dict.fromkeys(LAYERS, scale))
    assert plan.skipped == () or all(row.name.endswith("alpha") for row in plan.skipped)


def test_the_whole_audit_of_a_file(tmp_path):
    base = save(tmp_path / "unet.safetensors", base_tensors())
    lora = save(tmp_path / "lora.safetensors", kohya())
    record = bulkedge.audit(base, lora, recipe={"top_k": 2, "exclude": ["*time_embedding*"]})
    assert record.inputs.tuned.kind == "lora"
    assert len(record.matrices) == 4
    assert {(m.update, m.rank, m.scale) for m in record.matrices} == {("lora", 2, 1.5)}


def test_another_component_is_lost_unless_excluded(tmp_path):
    text = {"text_model.encoder.layers.0.self_attn.q_proj.weight": weights(6, 6)}
    base = save(tmp_path / "unet.safetensors", base_tensors())
    te = {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": weights(2, 6),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": weights(6, 2),
    }
    lora = save(tmp_path / "lora.safetensors", kohya() | te)
    plan = make_plan(base, lora, Recipe())
    assert [(row.name, row.lost) for row in plan.skipped] == [(name, True) for name in te]
    accepted = make_plan(base, lora, Recipe(exclude=("lora_te_*",)))
    assert not any(row.lost for row in accepted.skipped)
    other = make_plan(save(tmp_path / "te.safetensors", text), lora, Recipe())
    assert [c.base.name for c in other.comparisons] == list(text)
    with pytest.raises(AdapterError, match=r"none of its tensors has a counterpart"):
        make_plan(base, save(tmp_path / "te_alone.safetensors", te), Recipe())


def test_underscores_that_collide(tmp_path):
    clash = {"up.0.to_q.weight": weights(4, 4), "up.0.to.q.weight": weights(4, 4, seed=1)}
    base = save(tmp_path / "unet.safetensors", base_tensors() | clash)
    more = {"lora_unet_up_0_to_q.lora_down.weight": weights(2, 4)}
    more["lora_unet_up_0_to_q.lora_up.weight"] = weights(4, 2)
    message = r"'lora_unet_up_0_to_q' may belong to 'up\.0\.to.q\.weight' or to 'up\.0\.to.q\.weig"
    with pytest.raises(CheckpointError, match=message):
        make_plan(base, save(tmp_path / "lora.safetensors", kohya() | more), Recipe())
    left = Recipe(exclude=("lora_unet_up_0_to_q",))
    check(make_plan(base, save(tmp_path / "lora.safetensors", kohya() | more), left),
          dict.fromkeys(LAYERS, 1.5))  # fmt: skip
    # names that nobody asked for may collide as they like
    check(make_plan(base, save(tmp_path / "lora.safetensors", kohya()), Recipe()),
          dict.fromkeys(LAYERS, 1.5))  # fmt: skip


def test_two_prefixes_that_fit_alike(tmp_path):
    base = save(tmp_path / "both.safetensors", base_tensors("a.") | base_tensors("b."))
    lora = save(tmp_path / "lora.safetensors", kohya())
    with pytest.raises(CheckpointError, match=r"fit the base behind '[ab]' and behind '[ab]'"):
        make_plan(base, lora, Recipe())


OTHER_METHODS = {
    "hada_t1": "LoHa with a Tucker",
    "lokr_t2": "LoKr with a Tucker",
    "lora_mid.weight": "a Tucker decomposition",
    "dora_scale": "DoRA as kohya's scripts",
    "oft_blocks": "OFT, a rotation",
    "what": "not a known part of a LoRA",
}


@pytest.mark.parametrize("part", OTHER_METHODS)
def test_other_methods_are_refused_by_name(part, tmp_path):
    base = save(tmp_path / "unet.safetensors", base_tensors())
    key = "lora_unet_time_embedding_linear_1"
    lora = save(tmp_path / "lora.safetensors", kohya() | {f"{key}.{part}": weights(2, 2)})
    plan = make_plan(base, lora, Recipe())
    assert len(plan.comparisons) == 4
    reasons = {row.name.partition(".")[2]: row.reason for row in plan.skipped}
    assert reasons.pop(part).startswith(OTHER_METHODS[part])
    assert set(reasons.values()) == {"another tensor of this layer is not handled"}
    assert all(row.lost for row in plan.skipped)


@pytest.mark.parametrize(
    ("alpha", "reason"),
    [
        (torch.tensor(float("nan")), "alpha and rank: lora_alpha: Input should be a finite"),
        (weights(3), r"alpha of shape \(3,\) in F32: expected one number"),
        (torch.tensor(True), r"alpha of shape \(\) in BOOL: expected one number"),
    ],
)
def test_alphas_that_are_none(alpha, reason, tmp_path):
    base = save(tmp_path / "unet.safetensors", base_tensors())
    lora = {name: alpha if "alpha" in name else W for name, W in kohya().items()}
    with pytest.raises((NothingAuditedError, AdapterError), match=reason):
        make_plan(base, save(tmp_path / "lora.safetensors", lora), Recipe())


def test_a_lora_file_is_no_base(tmp_path):
    lora = save(tmp_path / "lora.safetensors", kohya())
    with pytest.raises(CheckpointError, match="the base model comes first"):
        make_plan(lora, lora, Recipe())


@pytest.mark.parametrize("stored", [(4, 4), (4, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("trained", [(4, 4), (4, 4, 1, 1)], ids=str)
def test_a_kernel_of_size_one_is_a_linear_layer(stored, trained, tmp_path):
    W0 = weights(*stored)
    down, up = weights(2, 4, *trained[2:]), weights(4, 2, *trained[2:])
    key = "lora_unet_mid_proj_in"
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    base = save(tmp_path / "unet.safetensors", {"mid.proj_in.weight": W0})
    lora = save(tmp_path / "lora.safetensors", tensors)
    (comparison,) = make_plan(base, lora, Recipe()).comparisons
    W = load(comparison, CPU).tuned_map(torch.float64).to_dense()
    torch.testing.assert_close(
        W, (W0.flatten(1) + up.flatten(1) @ down.flatten(1)).double(), rtol=1e-5, atol=1e-5
    )


# ---- diffusers

SPELLINGS = {
    "peft": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "diffusers": ("{}.lora.down.weight", "{}.lora.up.weight"),
    "linear": ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
    "infix": ("{}.processor.lora_A.weight", "{}.processor.lora_B.weight"),
}


def diffusers(spelling, layers=LAYERS, component="unet."):
    tensors = {}
    for name in layers:
        for key, W in zip(SPELLINGS[spelling], factors_of(name), strict=True):
            tensors[key.format(component + name)] = W
    return tensors


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("folder", [True, False])
def test_diffusers(spelling, folder, tmp_path):
    base = save(tmp_path / "unet/diffusion_pytorch_model.safetensors", base_tensors())
    lora = save(tmp_path / "lora/pytorch_lora_weights.safetensors", diffusers(spelling))
    plan = make_plan(base.parent, lora.parent if folder else lora, Recipe())
    check(plan, dict.fromkeys(LAYERS, 1.0))
    assert plan.skipped == ()


def test_projections_of_old_attention(tmp_path):
    name = "down_blocks.0.attentions.1.attn1"
    layers = {"to_q": f"{name}.to_q", "to_out": f"{name}.to_out.0"}
    tensors = {}
    for projection, layer in layers.items():
        down, up = factors_of(layer)
        key = f"{name}.processor.{projection}_lora"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    base = save(tmp_path / "unet.safetensors", base_tensors())
    plan = make_plan(base, save(tmp_path / "lora.safetensors", tensors), Recipe())
    check(plan, dict.fromkeys(layers.values(), 1.0))


def test_projections_of_an_old_text_encoder(tmp_path):
    base = save(tmp_path / "te.safetensors", {"layers.0.self_attn.q_proj.weight": weights(4, 4)})
    key = "text_encoder.layers.0.self_attn.to_q_lora"
    tensors = {f"{key}.down.weight": weights(2, 4), f"{key}.up.weight": weights(4, 2)}
    plan = make_plan(base, save(tmp_path / "lora.safetensors", tensors), Recipe())
    assert [c.tuned_name for c in plan.comparisons] == [
        "text_encoder.layers.0.self_attn.q_proj.weight"
    ]


def test_alphas_beside_the_factors(tmp_path):
    alphas = {f"unet.{name}.alpha": torch.tensor(5.0) for name in LAYERS}
    base = save(tmp_path / "unet.safetensors", base_tensors())
    lora = save(tmp_path / "lora.safetensors", diffusers("peft") | alphas)
    check(make_plan(base, lora, Recipe()), dict.fromkeys(LAYERS, 2.5))


def with_metadata(path, tensors, metadata):
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, path, {"lora_adapter_metadata": text}
    )
    return path


def test_alphas_in_the_metadata(tmp_path):
    metadata = {
        "unet.r": 2,
        "unet.lora_alpha": 8,
        "unet.alpha_pattern": {"attn1.to_q": 6},
        "text_encoder.r": 7,
    }
    base = save(tmp_path / "unet.safetensors", base_tensors())
    lora = with_metadata(tmp_path / "lora.safetensors", diffusers("peft"), metadata)
    scales = dict.fromkeys(LAYERS, 4.0) | {"down_blocks.0.attentions.1.attn1.to_q": 3.0}
    check(make_plan(base, lora, Recipe()), scales)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "lora_adapter_metadata': Expecting property name"),
        ("[]", "lora_adapter_metadata': expected an object"),
        ({"unet.r": "2"}, "r: Input should be a valid integer"),
        ({"unet.init_lora_weights": "pissa"}, "initialised by 'pissa'"),
        ({"unet.kasa_config": {"a": 1}}, "kasa_config is set"),
    ],
)
def test_metadata_that_says_nothing_good(metadata, message, tmp_path):
    base = save(tmp_path / "unet.safetensors", base_tensors())
    lora = with_metadata(tmp_path / "lora.safetensors", diffusers("peft"), metadata)
    with pytest.raises(AdapterError, match=message):
        make_plan(base, lora, Recipe())


def test_two_spellings_of_one_part(tmp_path):
    base = save(tmp_path / "unet.safetensors", base_tensors())
    lora = save(tmp_path / "l.safetensors", diffusers("peft") | diffusers("diffusers"))
    with pytest.raises(AdapterError, match=r"are the same part of one layer; keep one"):
        make_plan(base, lora, Recipe())


def test_dora_by_diffusers(tmp_path):
    name = "time_embedding.linear_1"
    W0 = base_tensors()[f"{name}.weight"]
    down, up = factors_of(name)
    layer = nn.Linear(4, 5, bias=False)
    layer.weight.data = W0
    import peft

    model = peft.get_peft_model(
        nn.Sequential(layer),
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"], use_dora=True),
    )
    wrapped = model.base_model.model[0]
    wrapped.lora_A["default"].weight.data, wrapped.lora_B["default"].weight.data = down, up
    magnitude = 1 + weights(5).abs()
    wrapped.lora_magnitude_vector["default"].weight.data = magnitude
    tensors = diffusers("peft", [name]) | {f"unet.{name}.lora_magnitude_vector.weight": magnitude}
    base = save(tmp_path / "unet.safetensors", base_tensors())
    (comparison,) = make_plan(
        base, save(tmp_path / "lora.safetensors", tensors), Recipe()
    ).comparisons
    expected = model.merge_and_unload()[0].weight
    W = load(comparison, CPU).tuned_map(torch.float64).to_dense()
    torch.testing.assert_close(W, expected.double(), rtol=1e-5, atol=1e-5)
