"""Settings that mean nothing are refused when a strategy is made, whichever strategy it is."""

import dataclasses
import importlib
import inspect

import numpy as np
import pytest
import torch

import bulkedge
from bulkedge import InputError, Shard
from bulkedge.rmt import Law

PLACES = ["", ".triplet", ".spectral", ".rmt", ".update", ".intruder", ".tune"]
MODULES = [importlib.import_module(f"bulkedge{place}") for place in PLACES]
PUBLIC = {getattr(module, name) for module in MODULES for name in module.__all__ if name[0] != "_"
          if inspect.isclass(getattr(module, name))}  # fmt: skip
DOES = ("compute", "solve", "bound", "prepare", "correct", "rows")
"""What a solver, an adjoint, a certificate, a system solver, a repair and an engine are asked."""
NEEDED = {Shard: {"index": 1, "count": 2}, bulkedge.Rescale: {"level": 1.0}} | {
    law: {"theta": 1.0, "ratio": 0.5} for law in PUBLIC if issubclass(law, Law)
}
"""What has no default."""
NONSENSE = [float("nan"), True, "nonsense", -1e9, -3, 1j, object(), [1], float, np.array([1, 2])]


def _is_strategy(kind):
    if not dataclasses.is_dataclass(kind) or inspect.isabstract(kind):
        return False
    chosen = all(
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        for field in dataclasses.fields(kind)
    )
    return chosen or issubclass(kind, Law | Shard)


STRATEGIES = sorted(filter(_is_strategy, PUBLIC), key=lambda kind: kind.__name__)
FIELDS = [(kind, field) for kind in STRATEGIES for field in dataclasses.fields(kind) if field.init]


def made(kind, **settings):
    needed = {
        name: value
        for name, value in NEEDED.get(kind, {}).items()
        if name in {field.name for field in dataclasses.fields(kind) if field.init}
    }
    return kind(**needed | settings)


def test_every_kind_of_strategy_was_found():
    asked = {kind for kind in PUBLIC if any(hasattr(kind, name) for name in DOES)}
    protocols = {kind for kind in asked if getattr(kind, "_is_protocol", False)}
    assert asked - protocols <= set(STRATEGIES)
    assert len(STRATEGIES) >= 30
    assert all(kind.__dataclass_params__.frozen for kind in STRATEGIES)


@pytest.mark.parametrize(
    ("kind", "field"), FIELDS, ids=[f"{kind.__name__}.{field.name}" for kind, field in FIELDS]
)
def test_nonsense_in_any_field_is_refused(kind, field):
    default = getattr(made(kind), field.name)
    for value in NONSENSE:
        if isinstance(value, type(default)) and isinstance(default, bool | str):
            continue
        if field.name == "theta" and isinstance(value, int | float) and value < 0:
            continue  # a spike may be negative
        with pytest.raises(InputError, match=rf"^expected (a )?{field.name}\b.*, got "):
            made(kind, **{field.name: value})


@pytest.mark.parametrize(
    ("kind", "field"), FIELDS, ids=[f"{kind.__name__}.{field.name}" for kind, field in FIELDS]
)
def test_numbers_of_numpy_and_torch_are_kept_as_plain_ones(kind, field):
    default = getattr(made(kind), field.name)
    if type(default) not in (int, float):
        return
    for number in (np.asarray(default)[()], torch.tensor(default, dtype=torch.float64)):
        if isinstance(default, int) and isinstance(number, torch.Tensor):
            number = number.long()
        again = made(kind, **{field.name: number})
        assert again == made(kind)
        assert type(getattr(again, field.name)) is type(default)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bulkedge.triplet.BlockKrylov(oversample=-3),
        lambda: bulkedge.triplet.BlockKrylov(max_steps=0),
        lambda: bulkedge.triplet.Lanczos(max_steps=True),
        lambda: bulkedge.triplet.Minres(rtol=1.5),
        lambda: bulkedge.update.ConjugateGradients(max_steps=0),
        lambda: bulkedge.Scale(rounds=1.5),
    ],
)
def test_the_message_says_what_to_give(make):
    with pytest.raises(InputError, match=r"; give \w+ a (whole )?number(, or None)?$"):
        make()
