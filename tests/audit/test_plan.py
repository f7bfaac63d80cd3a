import json

import pytest
import torch

from bulkedge import AdapterError, CheckpointError, NothingAuditedError, Recipe, RecipeError
from bulkedge.comparison import make_plan
from bulkedge.comparison.leftover import NOT_STORED, RENAMED
from helpers import save, save_adapter, weights

BASE = {
    "embeddings.weight": weights(9, 4),
    "encoder.0.weight": weights(4, 4, seed=1),
    "encoder.0.bias": weights(4),
    "encoder.1.weight": weights(4, 4, seed=2),
    "position_ids": torch.arange(9)[None],
}


@pytest.fixture
def base(tmp_path):
    return save(tmp_path / "base.safetensors", BASE)


def plan_of(base, tuned, **recipe):
    return make_plan(base, save(base.parent / "tuned.safetensors", tuned), Recipe(**recipe))


def names(plan):
    return [comparison.base.name for comparison in plan.comparisons]


def reasons(plan):
    return {row.name: row.reason for row in plan.skipped}


def test_every_tensor_is_compared_or_named(base):
    tuned = {f"bert.{name}": tensor for name, tensor in BASE.items() if name != "encoder.1.weight"}
    plan = plan_of(base, tuned | {"classifier.weight": weights(2, 4)})
    assert names(plan) == ["embeddings.weight", "encoder.0.weight"]
    assert plan.comparisons[0].tuned_name == "bert.embeddings.weight"
    assert reasons(plan) == {
        "classifier.weight": RENAMED,
        "bert.encoder.0.bias": "1-D tensor: not a matrix",
        "bert.position_ids": "I64 tensor: indices, not a weight",
        "encoder.1.weight": NOT_STORED,
    }
    assert [row.name for row in plan.skipped if row.lost] == [
        "classifier.weight",
        "encoder.1.weight",
    ]


def test_globs_choose_base_names(base):
    plan = plan_of(base, BASE, include=("encoder.*", "emb*"), exclude=("*.1.*",))
    assert names(plan) == ["embeddings.weight", "encoder.0.weight"]
    assert reasons(plan)["encoder.1.weight"] == "excluded by the recipe"
    assert reasons(plan)["position_ids"] == "not included by the recipe"


def test_globs_choose_tuned_names_too(base):
    tuned = {f"bert.{name}": tensor for name, tensor in BASE.items()}
    plan = plan_of(base, tuned, exclude=("bert.encoder.*",))
    assert names(plan) == ["embeddings.weight"]
    assert reasons(plan)["bert.encoder.0.weight"] == "excluded by the recipe"


def test_shape_mismatch_names_both_files_and_the_way_out(base):
    tuned = BASE | {"embeddings.weight": weights(11, 4)}
    message = (
        r"tuned\.safetensors: tensor 'embeddings\.weight' has shape \(11, 4\), expected \(9, 4\) "
        r"of 'embeddings\.weight' in .*base\.safetensors; .* --exclude 'embeddings\.weight'"
    )
    with pytest.raises(CheckpointError, match=message):
        plan_of(base, tuned)
    assert names(plan_of(base, tuned, exclude=("embeddings.*",))) == [
        "encoder.0.weight",
        "encoder.1.weight",
    ]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (weights(2, 4, 4), "3-D tensor: neither a kernel nor a stack of experts by name"),
        (torch.zeros(4, 4, dtype=torch.uint8), "U8 tensor: quantised, not handled yet"),
        (torch.zeros(4, 4, dtype=torch.int8), "I8 tensor: quantised, not handled yet"),
        (torch.zeros(0, 4), "empty tensor"),
        (torch.tensor(1.0), "0-D tensor: not a matrix"),
    ],
)
def test_kinds_that_are_not_handled_are_named(tensor, reason, base, tmp_path):
    both = {"odd": tensor, "encoder.0.weight": BASE["encoder.0.weight"]}
    save(base, both)
    plan = plan_of(base, both | {"odd": tensor + 1} if tensor.ndim == 3 else both)
    assert names(plan) == ["encoder.0.weight"]
    (row,) = plan.skipped
    assert (row.name, row.reason.startswith(reason)) == ("odd", True)
    assert row.lost == ("empty" not in reason and "0-D" not in reason)


def test_what_is_excluded_is_not_lost(base):
    both = {"odd": weights(2, 4, 4), "encoder.0.weight": BASE["encoder.0.weight"]}
    save(base, both)
    plan = plan_of(base, both, exclude=("odd",))
    assert [(row.reason, row.lost) for row in plan.skipped] == [("excluded by the recipe", False)]


def test_quantised_on_one_side_only(base):
    plan = plan_of(base, BASE | {"encoder.0.weight": torch.zeros(8, 1, dtype=torch.uint8)})
    assert reasons(plan)["encoder.0.weight"].startswith("U8 tensor")


def test_nothing_in_common(base):
    with pytest.raises(CheckpointError, match=r"the first is 'h\.0\.attn\.weight' \(nearest"):
        plan_of(base, {"h.0.attn.weight": weights(4, 4)})


def test_nothing_in_common_is_shown_by_a_weight(base):
    foreign = {"a.position_ids": torch.arange(9)[None], "h.0.attn.weight": weights(4, 4)}
    with pytest.raises(CheckpointError, match=r"the first is 'h\.0\.attn\.weight'"):
        plan_of(base, foreign)
    with pytest.raises(CheckpointError, match=r"the first is 'a\.position_ids'"):
        plan_of(base, {"a.position_ids": torch.arange(9)[None]})


def test_one_name_by_chance_makes_no_rule(base):
    save(base, BASE | {"dense.weight": weights(4, 4)})
    plan = plan_of(base, BASE | {"classifier.dense.weight": weights(4, 4)})
    assert reasons(plan)["classifier.dense.weight"] == RENAMED


CONV1D = {"h.0.attn.c_attn.weight": weights(4, 12), "h.0.attn.c_proj.weight": weights(4, 4)}


@pytest.mark.parametrize("config_beside", ["base", "tuned"])
@pytest.mark.parametrize("named", ["folder", "file"])
def test_the_model_type_is_found_beside_the_file(config_beside, named, tmp_path):
    for side in ("base", "tuned"):
        save(tmp_path / side / "model.safetensors", CONV1D)
    (tmp_path / config_beside / "config.json").write_text('{"model_type": "gpt2"}')
    paths = [tmp_path / side for side in ("base", "tuned")]
    if named == "file":
        paths = [path / "model.safetensors" for path in paths]
    plan = make_plan(*paths, Recipe())
    assert [comparison.transposed for comparison in plan.comparisons] == [True, True]


def test_nothing_left(base):
    with pytest.raises(NothingAuditedError, match=r"nothing to audit in .*: 1-D tensor: not a ma"):
        plan_of(base, {"encoder.0.bias": weights(4)})
    with pytest.raises(NothingAuditedError, match="not included by the recipe"):
        plan_of(base, BASE, include=("encoder.0.bias",))


def test_nothing_left_names_tensors_and_a_remedy(base, tmp_path):
    tensors = {
        f"base_model.model.encoder.{i}.lora_{factor}.weight": weights(*shape)
        for i in (0, 1)
        for factor, shape in {"A": (1, 4), "B": (4, 1)}.items()
    }
    message = (
        r"factors of rank 1 where adapter_config\.json says 4: .*; correct r there, or take the "
        r"configuration that was saved with these factors \(4 tensors, first 'base_model\.model\."
        r"encoder\.0\.lora_A\.weight'\)"
    )
    with pytest.raises(NothingAuditedError, match=message):
        make_plan(base, save_adapter(tmp_path / "a", tensors, r=4), Recipe())


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_a_glob_that_matches_nothing(field, base):
    message = (
        r"'bert\.\*' matches no tensor of either side; the nearest name is 'encoder\.0\.weight'"
    )
    with pytest.raises(RecipeError, match=message):
        plan_of(base, BASE, **{field: ("encoder.*", "bert.*")})


def test_an_adapter_is_no_base(base, tmp_path):
    adapter = save_adapter(tmp_path / "a", {"x.lora_A.weight": weights(2, 4)})
    with pytest.raises(CheckpointError, match="the base model comes first"):
        make_plan(adapter, base, Recipe())


def test_two_adapters_are_no_base_and_fine_tune(tmp_path):
    adapters = [save_adapter(tmp_path / name, {"x.lora_A.weight": weights(2, 4)}) for name in "ab"]
    message = r"a: is an adapter, and so is .*b; .* must be a full model: give the one that the ada"
    with pytest.raises(CheckpointError, match=message):
        make_plan(*adapters, Recipe())
    nothing = tmp_path / "nothing"
    with pytest.raises(CheckpointError, match="then the fine-tune"):
        make_plan(adapters[0], nothing, Recipe())


def test_adapters_listed_in_the_order_of_the_base(base, tmp_path):
    tensors = {
        f"base_model.model.encoder.{i}.lora_{factor}.weight": weights(*shape)
        for i in (1, 0)
        for factor, shape in {"A": (2, 4), "B": (4, 2)}.items()
    }
    plan = make_plan(base, save_adapter(tmp_path / "a", tensors), Recipe())
    assert names(plan) == ["encoder.0.weight", "encoder.1.weight"]


def test_an_adapter_with_a_trained_tensor_of_another_shape(base, tmp_path):
    tensors = {
        "base_model.model.encoder.0.lora_A.weight": weights(2, 4),
        "base_model.model.encoder.0.lora_B.weight": weights(4, 2),
        "base_model.model.embeddings.weight": weights(10, 4),
    }
    with pytest.raises(CheckpointError, match=r"has shape \(10, 4\), expected \(9, 4\)"):
        make_plan(base, save_adapter(tmp_path / "a", tensors), Recipe())
    assert issubclass(AdapterError, CheckpointError)


def test_two_tuned_tensors_for_one_base_tensor(base):
    tuned = {f"bert.{name}": tensor for name, tensor in BASE.items()}
    tuned["encoder.0.weight"] = weights(4, 4)
    with pytest.raises(CheckpointError, match="has two counterparts in the tuned checkpoint"):
        plan_of(base, tuned)


def test_weights_beside_an_adapter_or_a_model_are_told(tmp_path):
    base = {"a.weight": weights(4, 3)}
    factors = {"base_model.model.a.lora_A.weight": weights(2, 3)}
    factors["base_model.model.a.lora_B.weight"] = weights(4, 2)
    for name in ("base/model", "base/old", "tuned/model"):
        save(tmp_path / f"{name}.safetensors", base)
    save_adapter(tmp_path / "tuned", factors)
    plan = make_plan(tmp_path / "base", tmp_path / "tuned", Recipe())
    told = {row.name: row for row in plan.skipped}
    assert set(told) == {"old.safetensors", "model.safetensors"}
    assert not told["model.safetensors"].lost
    assert told["model.safetensors"].reason == (
        "not read: in the tuned folder adapter_model.safetensors is taken; "
        "name this file to audit it instead"
    )
    assert told["old.safetensors"].reason.startswith(
        "not read: in the base folder model.safetensors is taken"
    )


def shard(folder, tensors, name="model"):
    save(folder / f"{name}-0.safetensors", tensors)
    weight_map = dict.fromkeys(tensors, f"{name}-0.safetensors")
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_sharded_model_beside_an_adapter_is_told_and_its_own_index_is_not(tmp_path):
    base = {"a.weight": weights(4, 3)}
    factors = {"base_model.model.a.lora_A.weight": weights(2, 3)}
    factors["base_model.model.a.lora_B.weight"] = weights(4, 2)
    shard(tmp_path / "base", base)
    save_adapter(tmp_path / "tuned", factors)
    shard(tmp_path / "tuned", base)
    save(tmp_path / "base/old.safetensors", base)
    plan = make_plan(tmp_path / "base", tmp_path / "tuned", Recipe())
    names = {row.name: row.reason for row in plan.skipped}
    assert set(names) == {
        "model-0.safetensors",
        "model.safetensors.index.json",
        "old.safetensors",
    }
    assert "in the base folder the sharded checkpoint is taken" in names["old.safetensors"]
    reason = names["model.safetensors.index.json"]
    assert "in the tuned folder adapter_model.safetensors is taken" in reason


def test_weights_beside_a_lora_file_are_told(tmp_path):
    base = save(tmp_path / "base.safetensors", {"a.weight": weights(4, 3)})
    factors = {"lora_unet_a.lora_down.weight": weights(2, 3)}
    factors["lora_unet_a.lora_up.weight"] = weights(4, 2)
    save(tmp_path / "tuned/model.safetensors", factors)
    save(tmp_path / "tuned/older.safetensors", factors)
    plan = make_plan(base, tmp_path / "tuned", Recipe())
    (row,) = plan.skipped
    assert row.name == "older.safetensors"
    assert "in the tuned folder model.safetensors is taken" in row.reason
