"""What the objects of ``bulkedge.tune`` refuse when they are made, found by their signatures."""

import inspect

import pytest
import torch
from torch import nn

from bulkedge import InputError, RecipeError, tune
from bulkedge.tune import AdaptedMatrix

NONSENSE = [float("nan"), True, "nonsense", -3, 1j, [1]]
CALLABLES = {
    name: x
    for name in tune.__all__
    if callable(x := getattr(tune, name)) and not inspect.isabstract(x)
}


def draw(m, n):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m))


def adapted():
    return [AdaptedMatrix("some.layer", draw(40, 30), draw(2, 30), draw(40, 2))]


def network():
    return nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))


FIRST = {
    "full_matrices": network,
    "hold_update": lambda: network()[0],
    "LeadingTriplets": lambda: [draw(40, 30)],
}
NUMBERS = [
    (name, parameter)
    for name, x in CALLABLES.items()
    for parameter, given in inspect.signature(x).parameters.items()
    if any(kind in str(given.annotation).split(" | ") for kind in ("int", "float", "Schedule"))
    and name not in ("LayerFigures", "LayerState")  # results
]
GLOBS = [name for name, x in CALLABLES.items() if "include" in inspect.signature(x).parameters]


def test_the_signatures_were_read():
    assert {name for name, _ in NUMBERS} == {
        "SpikeClip", "IntruderPenalty", "LeadingTriplets", "Monitor", "RankController",
        "hold_update",
    }  # fmt: skip
    assert set(GLOBS) == {
        "SpikeClip", "IntruderPenalty", "Monitor", "OrthonormalFactors", "RankController",
        "adapted_matrices", "full_matrices",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "parameter"), NUMBERS, ids=map(".".join, NUMBERS))
def test_numbers_that_mean_nothing_are_refused(name, parameter):
    for value in NONSENSE:
        with pytest.raises(InputError, match=rf"^expected {parameter} .*, got .*; give {name} a "):
            CALLABLES[name](FIRST.get(name, adapted)(), **{parameter: value})


@pytest.mark.parametrize("name", GLOBS)
def test_a_glob_that_matches_nothing_is_an_error(name):
    """The error of an audit: one misspelt pattern among others would leave layers unheld."""
    known = "0.weight" if name == "full_matrices" else "some.*"
    CALLABLES[name](FIRST.get(name, adapted)(), include=[known])
    message = r"'\*typo\*' matches no layer that can be held or watched; the nearest name is '"
    for globs in ("*typo*", [known, "*typo*"]):
        with pytest.raises(RecipeError, match=message):
            CALLABLES[name](FIRST.get(name, adapted)(), include=globs)
