"""Moments of the task are recognised by the fine-tune that they were measured on."""

import copy
import io

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn

import bulkedge
from bulkedge.cli import cli
from bulkedge.moments import Moments, sample, sample_places
from bulkedge.repairing import Protect
from bulkedge.repairing.measured_on import ANOTHER, NOT_TOLD
from bulkedge.report import print_repair
from helpers import save, save_adapter, some, weights

RECIPE = {"top_k": 1}
FAILURE = 2


@pytest.fixture
def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20))


def tuned_of(model, seed, size=0.05):
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for number, weight in enumerate(tuned.parameters()):
            weight += size * weights(*weight.shape, seed=10 * seed + number)
    return tuned


def measured(base, tuned, inputs=200):
    """Moments of a fine-tune, as the command measures them."""
    network = copy.deepcopy(base)
    moments = Moments(network)
    network.load_state_dict(tuned.state_dict())
    moments.mark_tuned()
    with moments, torch.no_grad():
        network(weights(inputs, 16, seed=3))
    return moments


def kept(base, inputs=200):
    with Moments(base) as moments, torch.no_grad():
        base(weights(inputs, 16, seed=4))
    return moments


def protected(folder, base, tuned, task, out=None, **stored):
    files = (
        save(folder / "base.safetensors", dict(base.state_dict())),
        stored.get("adapter") or save(folder / "tuned.safetensors", dict(tuned.state_dict())),
    )
    method = Protect(kept(base, stored.get("inputs", 200)), task)
    return bulkedge.repair(*files, out, method=method, recipe=RECIPE)


def test_of_the_same_fine_tune_nothing_is_said(base, tmp_path):
    tuned = tuned_of(base, 1)
    record = protected(tmp_path, base, tuned, measured(base, tuned))
    assert [row.status for row in record.matrices] == ["repaired"] * 2
    assert [row.note for row in record.matrices] == [None] * 2


@pytest.mark.parametrize("saved", [False, True])
def test_of_another_fine_tune_every_matrix_is_refused(saved, base, tmp_path):
    task = measured(base, tuned_of(base, 2))
    if saved:
        task.save(tmp_path / "task.moments")
        task = Moments.load(tmp_path / "task.moments")
    out = tmp_path / "out"
    record = protected(tmp_path, base, tuned_of(base, 1), task, out)
    assert [row.note for row in record.matrices] == [ANOTHER] * 2
    assert not out.exists()
    assert record.output is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merged_copy_in_half_precision_is_the_same_fine_tune(dtype, base, tmp_path):
    tuned = tuned_of(base, 1, size=1e-3)
    rounded = copy.deepcopy(tuned).to(dtype).float()
    record = protected(tmp_path, base, rounded, measured(base, tuned))
    assert [row.status for row in record.matrices] == ["repaired"] * 2


def test_the_entries_of_factors_are_those_of_the_merged_weight(base, tmp_path):
    A, B = 0.1 * weights(2, 16, seed=7), weights(24, 2, seed=8)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight += 2 * B @ A  # alpha 4, rank 2
    prefix = "base_model.model.0.lora_"
    adapter = save_adapter(tmp_path / "a", {f"{prefix}A.weight": A, f"{prefix}B.weight": B})
    for task, note in ((tuned, None), (tuned_of(base, 2), ANOTHER)):
        (row,) = protected(tmp_path, base, tuned, measured(base, task), adapter=adapter).matrices
        assert row.note == note


def test_moments_that_do_not_tell_are_in_doubt(base, tmp_path):
    tuned = tuned_of(base, 1)
    with Moments(tuned) as task, torch.no_grad():
        tuned(weights(200, 16, seed=3))
    task.tuned = True
    record = protected(tmp_path, base, tuned, task)
    assert [row.note for row in record.matrices] == [NOT_TOLD] * 2
    told = io.StringIO()
    print_repair(record, Console(file=told, width=200), brief=True)
    assert f"in doubt: 2, such as 0.weight: {NOT_TOLD}" in told.getvalue()


def test_moments_merged_of_two_fine_tunes_tell_of_none(base):
    one, other = (measured(base, tuned_of(base, seed)) for seed in (1, 2))
    again = measured(base, tuned_of(base, 1))
    assert all(layer.tuned_sample is None for layer in some(one.merge(other).layers.values()))
    for name, layer in some(one.merge(again).layers.items()):
        assert torch.equal(layer.tuned_sample, one.layers[name].tuned_sample)
    assert all(x.tuned_sample is not None for x in some(one.sketched(4).layers.values()))


@pytest.mark.parametrize("shape", [(1,), (7, 9), (64,), (30, 21)])
def test_places_are_those_of_the_sample(shape):
    weight = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    assert sample(weight).tolist() == list(sample_places(weight.numel()))


@pytest.mark.parametrize(("inputs", "refused"), [(15, 1), (19, 1), (21, 0)])
def test_fewer_inputs_than_a_full_update_may_have_ranks(inputs, refused, base, tmp_path):
    record = protected(tmp_path, base, tuned_of(base, 1), None, inputs=inputs)
    notes = {row.name: row.note for row in record.matrices if row.status == "refused"}
    assert ("2.weight" in notes) is bool(refused)  # 20 × 24
    assert ("0.weight" in notes) is (inputs < 16)  # 24 × 16
    assert all("fewer than the rank" in note for note in notes.values())
    left = [row for row in record.matrices if row.status == "repaired"]
    assert all(("the ridge decides" in (row.note or "")) == (inputs < 24) for row in left[1:])


def test_the_command_writes_no_copy_where_all_is_refused(base, tmp_path):
    files = [
        save(tmp_path / "base.safetensors", dict(base.state_dict())),
        save(tmp_path / "tuned.safetensors", dict(tuned_of(base, 1).state_dict())),
    ]
    kept(base).save(tmp_path / "base.moments")
    measured(base, tuned_of(base, 2)).save(tmp_path / "task.moments")
    out = tmp_path / "out"
    moments = ["--moments", tmp_path / "base.moments", "--task-moments", tmp_path / "task.moments"]
    command = ["repair", *files, "--method", "protect", *moments, "-k", "1", "-o", out, "-q"]
    result = CliRunner().invoke(cli, list(map(str, command)))
    assert result.exit_code == FAILURE
    assert result.stdout.startswith(
        "nothing can be repaired; 2 of 2 matrices to be treated REFUSED"
    )
    assert f"NOT repaired: 2, such as 0.weight: {ANOTHER}" in result.stdout
    told = f"nothing was repaired: {out} is not written\nexit code 2: NOT repaired: 0.weight, 2.wei"
    assert told in result.stderr
    assert list(tmp_path.glob("*out*")) == []
