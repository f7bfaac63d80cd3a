"""Moments of a fine-tune that one's own loop has measured, whatever the form of the model."""

import copy

import pytest
import torch
from torch import nn

import bulkedge
from bulkedge.moments import Moments
from bulkedge.repairing.inputs import NEITHER
from bulkedge.repairing.measured_on import ANOTHER
from helpers import save, some, weights

peft = pytest.importorskip("peft")

RECIPE = {"top_k": 1}
NAMES = ["0.weight", "2.weight"]


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20))


def measured(model, marked):
    """In the loop of a user, who may say that it is a fine-tune, before or after."""
    moments = Moments(model)
    if marked == "before":
        moments.mark_tuned()
    with moments, torch.no_grad():
        model(weights(300, 16, seed=3))
    if marked == "after":
        moments.mark_tuned()
    return moments


def near(base):
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for number, weight in enumerate(tuned.parameters()):
            weight += 0.02 * weights(*weight.shape, seed=number)
    return tuned


def lora(base, strength=1.0, **settings):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"], **settings)
    tuned = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for number, (name, weight) in enumerate(tuned.named_parameters()):
            if "lora_" in name:
                weight.copy_(strength * weights(*weight.shape, seed=7 + number))
    return tuned


def protected(folder, base, tuned, task):
    files = [save(folder / "base.safetensors", dict(base.state_dict())), folder / "tuned"]
    if isinstance(tuned, peft.PeftModel):
        tuned.save_pretrained(files[1])
    else:
        files[1] = save(folder / "tuned.safetensors", dict(tuned.state_dict()))
    with Moments(base) as kept, torch.no_grad():
        base(weights(300, 16, seed=4))
    method = bulkedge.Protect(kept, task)
    out = folder / "out.safetensors"
    found = bulkedge.repair(files[0], files[1], out, method=method, recipe=RECIPE)
    return {row.name: (row.status, row.note) for row in found.matrices}


FINE = dict.fromkeys(NAMES, ("repaired", None))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("marked", ["never", "before", "after"])
@pytest.mark.parametrize("far", [False, True])
def test_a_full_fine_tune_is_measured_from_itself(far, marked, saved, tmp_path):
    base = network(0)
    tuned = network(1) if far else near(base)
    task = measured(tuned, marked)
    if saved:
        task.save(tmp_path / "task.moments")
        task = Moments.load(tmp_path / "task.moments")
    assert protected(tmp_path, base, tuned, task) == FINE


@pytest.mark.parametrize("marked", ["never", "before", "after"])
@pytest.mark.parametrize("merged", ["no", "in place", "unloaded"])
@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_a_lora_is_measured_merged_or_not(strength, merged, marked, tmp_path):
    base = network(0)
    tuned, runs = lora(base, strength), lora(base, strength)
    if merged == "in place":
        runs.merge_adapter()
    elif merged == "unloaded":
        runs = runs.merge_and_unload()
    assert protected(tmp_path, base, tuned, measured(runs, marked)) == FINE


@pytest.mark.parametrize("saved_as", ["full", "adapter"])
@pytest.mark.parametrize(("marked", "note"), [("never", NEITHER), ("after", ANOTHER)])
def test_those_of_another_fine_tune_are_refused(marked, note, saved_as, tmp_path):
    base = network(0)
    tuned = network(1) if saved_as == "full" else lora(base, 0.1)
    task = measured(network(2), marked)
    refused = protected(tmp_path, base, tuned, task)
    # entries of a weight say that it is neither, whatever the mark says
    assert refused == dict.fromkeys(NAMES, ("refused", NEITHER))
    task = measured(near(base) if marked == "after" else network(3), marked)
    assert protected(tmp_path, base, tuned, task) == dict.fromkeys(NAMES, ("refused", note))


def told(layer):
    assert layer.tuned_sample is not None
    return layer.tuned_sample


def test_what_an_adapter_adds_is_part_of_the_mark():
    base = network(0)
    for settings in ({}, {"use_rslora": True}):
        tuned = lora(base, **settings)
        moments = measured(tuned, "after")
        want = measured(lora(base, **settings).merge_and_unload(), "after")
        for name, layer in some(moments.layers.items()):
            assert torch.allclose(told(layer), told(want[name]), atol=1e-6)
            assert not torch.equal(told(layer), layer.sample)
        with tuned.disable_adapter():
            moments.mark_tuned()
        assert all(torch.equal(told(x), x.sample) for x in some(moments.layers.values()))


@pytest.mark.parametrize(
    "config",
    [peft.LoraConfig(target_modules=["0"], use_dora=True), peft.IA3Config(
        target_modules=["0"], feedforward_modules=[])],
)  # fmt: skip
def test_an_adapter_that_does_more_than_add_is_not_told(config):
    tuned = peft.get_peft_model(network(0), config)
    layers = measured(tuned, "after").layers
    assert layers["0"].tuned_sample is None
    assert layers["2"].tuned_sample is not None


def test_a_layer_without_a_name_is_found_by_the_weight_of_the_fine_tune(tmp_path):
    base, tuned = network(0), network(1)
    with Moments(tuned[2]) as task, torch.no_grad():
        tuned[2](tuned[:2](weights(300, 16, seed=3)))
    found = protected(tmp_path, base, tuned, task)
    assert found["2.weight"] == ("repaired", None)
    assert found["0.weight"][0] == "refused"
