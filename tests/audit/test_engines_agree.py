"""Every engine gives the rows of one process, and leaves nothing behind when it is closed."""

import multiprocessing

import pytest

import bulkedge
from bulkedge import LocalEngine, Recipe
from bulkedge.comparison import make_plan
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


@pytest.mark.parametrize("name", ENGINES)
def test_the_record_is_that_of_one_process(name, pair):
    alone = bulkedge.audit(*pair, recipe=RECIPE)
    found = bulkedge.audit(*pair, recipe=RECIPE, engine=ENGINES[name])
    assert found.matrices == alone.matrices
    assert found.summary == alone.summary
    assert found.summary.intruders > 0


@pytest.mark.parametrize("name", ENGINES)
def test_closed_early_it_ends_its_work(name, pair):
    comparisons = make_plan(*pair, RECIPE).comparisons
    ENGINES[name].check(RECIPE)
    rows = ENGINES[name].rows(comparisons, RECIPE)
    position, row = next(rows)
    assert row.name == comparisons[position].base.name
    rows.close()
    assert not multiprocessing.active_children()
