"""LoRA files of ComfyUI, ai-toolkit, SimpleTuner and LyCORIS, known by their tensors."""

import json

import pytest
import torch
from safetensors.torch import save_file

import bulkedge
from bulkedge import AdapterError, CheckpointError, Recipe
from bulkedge.checkpoint import Adapter, Checkpoint, open_path
from bulkedge.cli import cli
from bulkedge.comparison import make_plan
from bulkedge.comparison.pair import load
from helpers import oracle_scores, save, some, weights

CPU = torch.device("cpu")
LAYERS = {
    "double_blocks.0.img_attn.qkv": (12, 4),
    "double_blocks.0.img_mlp.0": (8, 4),
    "single_blocks.1.linear_1": (6, 4),
    "final_layer.conv": (5, 4, 3, 3),
}
SPELLINGS = {
    "ab": ("lora_A.weight", "lora_B.weight"),
    "down_up": ("lora_down.weight", "lora_up.weight"),
    "default": ("lora_A.default.weight", "lora_B.default.weight"),
}
BEFORE_BASE = ["", "model.diffusion_model."]
BEFORE_LORA = [
    "diffusion_model.", "transformer.", "unet.", "", "base_model.model.", "model.diffusion_model.",
]  # fmt: skip


def base_file(path, prefix=""):
    tensors = {
        f"{prefix}{n}.weight": weights(*s, seed=i) for i, (n, s) in enumerate(LAYERS.items())
    }
    return save(path / "model.safetensors", tensors)


def factors_of(name, r=2):
    out, into, *kernel = LAYERS[name]
    return weights(r, into, *kernel, seed=7), weights(out, r, *[1] * len(kernel), seed=8)


def lora(spelling="ab", prefix="", alpha=None, flat=False):
    tensors = {}
    for name in LAYERS:
        key = prefix + (name.replace(".", "_") if flat else name)
        for end, factor in zip(SPELLINGS[spelling], factors_of(name), strict=True):
            tensors[f"{key}.{end}"] = factor
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def check(plan, scale):
    """Every layer is there, with the sum of its weight and the scaled product of the factors."""
    assert not any(row.lost for row in plan.skipped)
    assert len(plan.comparisons) == len(LAYERS)
    for comparison in some(plan.comparisons):
        name = next(n for n in LAYERS if comparison.base.info.name.endswith(f"{n}.weight"))
        down, up = (factor.double().flatten(1) for factor in factors_of(name))
        pair = load(comparison, CPU)
        found = pair.tuned_map(torch.float64).to_dense()
        torch.testing.assert_close(found, pair.base.double() + scale * up @ down)


@pytest.mark.parametrize("before_base", BEFORE_BASE, ids=["bare", "ldm"])
@pytest.mark.parametrize("before", BEFORE_LORA, ids=lambda before: before or "nothing")
def test_what_stands_before_a_path_does_not_matter(before, before_base, tmp_path):
    base = base_file(tmp_path, before_base)
    for spelling in SPELLINGS:
        for alpha, scale in ((None, 1.0), (3.0, 1.5)):
            file = save(tmp_path / "lora.safetensors", lora(spelling, before, alpha))
            check(make_plan(base, file, Recipe()), scale)


@pytest.mark.parametrize("before_base", BEFORE_BASE, ids=["bare", "ldm"])
@pytest.mark.parametrize("before", ["lycoris_", "", "lora_unet_", "some_other_"])
def test_flattened_paths_behind_any_words(before, before_base, tmp_path):
    base = base_file(tmp_path, before_base)
    file = save(tmp_path / "lora.safetensors", lora("down_up", before, 3.0, flat=True))
    check(make_plan(base, file, Recipe()), 1.5)


def test_the_scores_of_a_file(tmp_path):
    base = base_file(tmp_path, "model.diffusion_model.")
    file = save(tmp_path / "lora.safetensors", lora("ab", "transformer.", 8.0))
    record = bulkedge.audit(base, file, recipe={"top_k": 2})
    assert record.inputs.tuned.kind == "lora"
    for row in some(record.matrices):
        name = row.name.removeprefix("model.diffusion_model.").removesuffix(".weight")
        down, up = (factor.double().flatten(1) for factor in factors_of(name))
        W0 = weights(*LAYERS[name], seed=list(LAYERS).index(name)).double().flatten(1)
        scores = torch.tensor([direction.score for direction in row.directions])
        torch.testing.assert_close(
            scores.double(), oracle_scores(W0, W0 + 4 * up @ down, 2), rtol=0, atol=1e-4
        )


def test_peft_names_without_alpha_are_judged_with_a_note(tmp_path):
    base = base_file(tmp_path)
    for before, alpha, noted in (
        ("base_model.model.", None, True), ("base_model.model.", 2.0, False),
        ("transformer.", None, False),
    ):  # fmt: skip
        plan = make_plan(
            base, save(tmp_path / "l.safetensors", lora("ab", before, alpha)), Recipe()
        )
        for comparison in some(plan.comparisons):
            assert ("no alpha is stored: s = 1" in (comparison.note or "")) == noted


def test_settings_of_the_whole_file_in_its_metadata(tmp_path):
    base, file = base_file(tmp_path), tmp_path / "lora.safetensors"
    text = json.dumps({"r": 2, "lora_alpha": 6, "alpha_pattern": {"linear_1": 6}})
    save_file(lora("ab", "base_model.model."), file, {"lora_adapter_metadata": text})
    check(make_plan(base, file, Recipe()), 3.0)


def test_another_methods_tensors_taint_their_layer_alone(tmp_path):
    first, *others = LAYERS
    more = {f"diffusion_model.{first}.dora_scale": weights(12, 1)}
    more |= {f"diffusion_model.{others[0]}.lora_mid.weight": weights(2, 2)}
    file = save(tmp_path / "lora.safetensors", lora("down_up", "diffusion_model.") | more)
    plan = make_plan(base_file(tmp_path), file, Recipe())
    assert {c.base.name for c in plan.comparisons} == {f"{name}.weight" for name in others[1:]}
    reasons = {row.name: row.reason for row in plan.skipped if row.lost}
    assert "DoRA as kohya's scripts" in reasons[f"diffusion_model.{first}.dora_scale"]
    assert "Tucker" in reasons[f"diffusion_model.{others[0]}.lora_mid.weight"]
    assert len(reasons) == 6


def test_what_is_no_part_of_a_lora_is_lost(tmp_path):
    tensors = lora("ab", "transformer.") | {"transformer.head.weight": weights(4, 4)}
    plan = make_plan(base_file(tmp_path), save(tmp_path / "l.safetensors", tensors), Recipe())
    assert [row.name for row in plan.skipped if row.lost] == ["transformer.head.weight"]


def test_a_model_with_factors_beside_its_weights_is_no_adapter(tmp_path):
    (name, *_) = LAYERS
    for leaf in ("weight", "base_layer.weight"):
        tensors = lora("ab", "base_model.model.")
        tensors[f"base_model.model.{name}.{leaf}"] = weights(12, 4)
        file = save(tmp_path / "model_with.safetensors", tensors)
        assert isinstance(open_path(file), Checkpoint)
        with pytest.raises(AdapterError, match="holds LoRA factors but no adapter_config"):
            make_plan(base_file(tmp_path), file, Recipe())


def test_pefts_own_file_wants_its_configuration(tmp_path):
    file = save(tmp_path / "a" / "adapter_model.safetensors", lora("ab", "base_model.model."))
    with pytest.raises(AdapterError, match=r"no adapter_config\.json beside them"):
        make_plan(base_file(tmp_path), file, Recipe())


def test_flattened_paths_that_could_be_two_layers(tmp_path):
    clash = {"up.0.to_q.weight": weights(4, 4), "up.0.to.q.weight": weights(4, 4, seed=1)}
    base = save(tmp_path / "b.safetensors", clash)
    tensors = {"lycoris_up_0_to_q.lora_down.weight": weights(2, 4)}
    tensors["lycoris_up_0_to_q.lora_up.weight"] = weights(4, 2)
    file = save(tmp_path / "l.safetensors", tensors)
    with pytest.raises(CheckpointError, match="are the same with underscores for dots"):
        make_plan(base, file, Recipe())


def test_inspect_says_what_it_is(tmp_path, capsys):
    file = save(tmp_path / "l.safetensors", lora("down_up", "diffusion_model.", 3.0))
    assert isinstance(open_path(file), Adapter)
    cli(["inspect", str(file)], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "LoRA adapter in ComfyUI's names: 4 layers updated by factors of rank 2"
    assert (
        lines[0]
        == "diffusion_model.double_blocks.0.img_attn.qkv.weight  F32  12×4  lora r=2 scale=1.5"
    )
