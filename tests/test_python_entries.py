"""What the entries of the library take and give in Python: kinds of arguments, data frames."""

import numpy as np
import pytest
import torch
from torch import nn

import bulkedge
from bulkedge import InputError, RecipeError, Record
from helpers import save, some, weights


@pytest.fixture
def pair(tmp_path):
    base = {"l0.weight": weights(30, 20), "l1.weight": weights(20, 30, seed=1)}
    tuned = {name: W + 0.1 * weights(*W.shape, seed=2) for name, W in base.items()}
    return save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)


ENTRIES = {
    "audit": lambda base, tuned: bulkedge.audit(base, tuned),
    "repair": lambda base, tuned: bulkedge.repair(base, tuned, None),
    "budget": lambda base, _: bulkedge.budget(base),
    "frontier": lambda base, tuned: bulkedge.frontier(
        base, tuned, "out", moments="m", evaluate="run {model}"
    ),
    "budget like": lambda _, tuned: bulkedge.budget("base", like=tuned),
    "collect_moments of a fine-tune": lambda _, tuned: bulkedge.collect_moments(
        "base", ["a text"], tuned=tuned
    ),
    "collect_moments": lambda base, _: bulkedge.collect_moments(base, ["a text"]),
}


@pytest.mark.parametrize("model", [nn.Linear(2, 2), {"a": torch.ones(2, 2)}, b"base", ["a", "b"]])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_that_is_no_path(entry, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").touch()
    kind = type(model).__name__
    with pytest.raises(InputError, match=f"as the path of one file or folder, got {kind}; a model"):
        ENTRIES[entry](model, model)


def test_settings_that_are_a_path(pair):
    with pytest.raises(RecipeError, match="expected recipe as a Recipe or a mapping of settings"):
        bulkedge.audit(*pair, recipe="recipe.yaml")


def test_a_device_of_torch_is_one_by_its_name(pair):
    assert bulkedge.audit(*pair, recipe={"device": torch.device("cpu")}).recipe.device == "cpu"


def test_a_method_that_is_a_class(pair):
    with pytest.raises(InputError, match=r"a method such as Clip\(\), got the class Clip"):
        bulkedge.repair(*pair, None, method=bulkedge.Clip)


def test_budgets_and_repairs_as_data_frames(pair):
    pytest.importorskip("pandas")
    base, tuned = pair
    record = bulkedge.budget(base, rank=4, alpha=8)
    frame = record.to_pandas().set_index("name")
    for row in some(record.matrices):
        assert tuple(frame.loc[row.name, ["rows", "columns"]]) == row.shape
        assert frame["top_k_threshold"][row.name] == row.top_k_threshold
        assert frame["bulk_edge"][row.name] == row.bulk.edge
        assert frame["allowed_alpha"][row.name] == row.allowed.alpha
    assert "to_pandas()" in repr(record)
    alone = bulkedge.budget(base).to_pandas()
    assert alone["allowed"].isna().all()
    repaired = bulkedge.repair(base, tuned, None, recipe={"epsilon": 1})
    frame = repaired.to_pandas().set_index("name")
    assert list(frame.change) == [row.change for row in repaired.matrices]
    assert "directions" not in frame


def test_one_glob_and_a_rank_of_numpy(pair):
    names = {
        row.name for row in bulkedge.repair(*pair, None, only="l1*", recipe={"epsilon": 1}).matrices
    }
    assert names == {"l1.weight"}
    with pytest.raises(InputError, match="expected an adapter for max_rank"):
        bulkedge.repair(*pair, None, max_rank=np.int64(3))


@pytest.mark.parametrize(("given", "kind"), [(b"{}", "bytes"), ({}, "dict"), ("", "an empty text")])
def test_a_record_from_what_is_no_file(given, kind):
    with pytest.raises(InputError, match=f"or its JSON text, got {kind}"):
        Record.from_json(given)


def test_a_record_is_compared_with_a_record(pair):
    with pytest.raises(InputError, match=r"got str; Record\.from_json reads one from its file"):
        bulkedge.audit(*pair).compare("record.json")
