"""What the objects of ``bulkedge.tune`` refuse when they are made, found by their signatures."""

import inspect

import pytest
import torch
from torch import nn

from bulkedge import InputError, RecipeError, tune
from bulkedge.moments import Moments
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


def moments():
    base = nn.ModuleDict({"some": nn.ModuleDict({"layer": nn.Linear(30, 40, bias=False)})})
    base["some"]["layer"].weight.data.copy_(draw(40, 30))
    with Moments(base) as found, torch.no_grad():
        base["some"]["layer"](torch.eye(30))
    return found


CALLS = CALLABLES | {
    "DriftClip": lambda first, limit=1.0, **options: tune.DriftClip(
        first, moments(), limit, **options
    ),
    "DriftPenalty": lambda first, **options: tune.DriftPenalty(first, moments(), **options),
    "IntruderMonitor": lambda _, **options: tune.IntruderMonitor(**options),
}
LAZY = ("Hold", "IntruderMonitor")
"""These learn the names of layers when training begins."""
FIRST = {
    "Hold": lambda: "edge",
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
GLOBS = [
    name
    for name, x in CALLABLES.items()
    if name not in LAZY and {"include", "exclude"} <= set(inspect.signature(x).parameters)
]


def test_the_signatures_were_read():
    assert {name for name, _ in NUMBERS} == {
        "DriftClip", "DriftPenalty", "Hold", "IntruderMonitor", "IntruderPenalty",
        "LeadingTriplets", "Monitor", "RankController", "SpikeClip", "hold_update",
    }  # fmt: skip
    assert set(GLOBS) == {
        "DriftClip", "DriftPenalty", "IntruderPenalty", "Monitor", "OrthonormalFactors",
        "RankController", "SpikeClip", "adapted_matrices", "full_matrices",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "parameter"), NUMBERS, ids=map(".".join, NUMBERS))
def test_numbers_that_mean_nothing_are_refused(name, parameter):
    for value in NONSENSE:
        with pytest.raises(InputError, match=rf"^expected {parameter} .*, got .*; give {name} a "):
            CALLS[name](FIRST.get(name, adapted)(), **{parameter: value})


@pytest.mark.parametrize("name", GLOBS)
def test_a_glob_that_matches_nothing_is_an_error(name):
    """The error of an audit: one misspelt pattern among others would leave layers unheld."""
    known = "0.weight" if name == "full_matrices" else "some.*"
    CALLS[name](FIRST.get(name, adapted)(), include=[known])
    message = r"'\*typo\*' matches no layer that can be held or watched; the nearest name is '"
    for globs in ("*typo*", [known, "*typo*"]):
        for which in ("include", "exclude"):
            with pytest.raises(RecipeError, match=message):
                CALLS[name](FIRST.get(name, adapted)(), **{which: globs})
    first = FIRST.get(name, adapted)()
    if name != "full_matrices":
        with pytest.raises(
            InputError, match=r"expected (adapted layers, found|matrices to watch, .*got) none"
        ):
            CALLS[name](first, exclude=[known])
