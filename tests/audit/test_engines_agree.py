"""Every engine gives the rows of one process, and leaves nothing behind when it is closed."""

import multiprocessing

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bulkedge
from bulkedge import LocalEngine, Recipe
from bulkedge.comparison import make_plan
from bulkedge.moments import Moments
from cases import gaussian, orthonormal
from helpers import save

ENGINES = {
    "local": LocalEngine(),
    "processes": LocalEngine(2),
}
RECIPE = Recipe(top_k=3, method="dense")


@pytest.fixture
def pair(tmp_path):
    base = {f"l{i}.weight": gaussian(30 + i, 24) for i in range(3)}
    tuned = {
        name: W + 30 * orthonormal(W.shape[0], 1, 1) @ orthonormal(24, 1, 2).mT
        for name, W in base.items()
    }
    return save(tmp_path / "base.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)


@pytest.fixture
def moments(pair, tmp_path):
    """Of the inputs of the same layers, in a file."""
    weights = load_file(pair[0])
    model = nn.ModuleDict(
        {name.partition(".")[0]: nn.Linear(24, 1, bias=False) for name in weights}
    )
    for name, layer in model.items():
        layer.weight = nn.Parameter(weights[f"{name}.weight"])
    with Moments(model) as found, torch.no_grad():
        for layer in model.values():
            layer(gaussian(50, 24).to(layer.weight))
    found.save(tmp_path / "base.moments")
    return tmp_path / "base.moments"


@pytest.mark.parametrize("name", ENGINES)
def test_the_record_is_that_of_one_process(name, pair, moments):
    alone = bulkedge.audit(*pair, recipe=RECIPE, moments=moments)
    found = bulkedge.audit(*pair, recipe=RECIPE, moments=moments, engine=ENGINES[name])
    assert found.matrices == alone.matrices
    assert found.summary == alone.summary
    assert found.summary.new_directions > 0
    assert found.summary.drift.measured == 3


@pytest.mark.parametrize("name", ENGINES)
def test_closed_early_it_ends_its_work(name, pair):
    comparisons = make_plan(*pair, RECIPE).comparisons
    ENGINES[name].check(RECIPE)
    rows = ENGINES[name].rows(comparisons, RECIPE)
    position, row = next(rows)
    assert row.name == comparisons[position].base.name
    rows.close()
    assert not multiprocessing.active_children()
