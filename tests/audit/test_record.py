import hashlib
import inspect
import json
import os
import re
import tracemalloc
from pathlib import Path

import pytest
import torch

import bulkedge
from bulkedge import CheckpointError, Recipe, RecipeError, Record
from bulkedge.intruder import DEFAULT_EPSILON
from bulkedge.records import make_recipe, read_recipe
from helpers import save, save_adapter, some, weights


@pytest.fixture
def record(tmp_path):
    W0 = weights(150, 120)
    base = save(tmp_path / "base.safetensors", {"layer.weight": W0, "layer.bias": weights(3)})
    W = W0 + 40 * torch.eye(150)[:, :1] @ torch.eye(120)[:1]
    return bulkedge.audit(base, save(tmp_path / "tuned.safetensors", {"layer.weight": W}))


def test_the_json_has_the_promised_fields(record, tmp_path):
    data = json.loads(record.to_json())
    assert set(data) == {
        "schema_version", "tool", "inputs", "recipe", "summary", "skipped", "matrices", "run",
        "shard", "tensors",
    }  # fmt: skip
    assert data["schema_version"] == "2"
    assert data["tool"] == {
        "name": "bulkedge", "version": bulkedge.__version__, "torch": torch.__version__,
    }  # fmt: skip
    tuned = tmp_path / "tuned.safetensors"
    assert data["inputs"]["tuned"] == {
        "path": str(tuned),
        "kind": "file",
        "trained_on": None,
        "known_as": [],
        "quantised": None,
        "disagreements": [],
        "contradictions": [],
        "base_class": None,
        "labels": None,
        "files": [
            {
                "name": tuned.name,
                "bytes": tuned.stat().st_size,
                "sha256": hashlib.sha256(tuned.read_bytes()).hexdigest(),
            }
        ],
    }
    assert data["summary"]["matrices"] == 1
    assert data["summary"]["new_directions"] == 1
    assert data["summary"]["verdicts"] == {
        "aligned": 9, "rotated": 0, "intruder": 1, "undecided": 0,
    }  # fmt: skip
    assert data["skipped"] == [
        {
            "name": "layer.bias",
            "reason": "not stored in the tuned checkpoint",
            "lost": False,
            "side": "base",
            "accepted": False,
            "changed": False,
            "missing": True,
            "bounded": False,
            "zeroed": False,
            "relative_change": None,
            "not_finite": None,
        }
    ]
    assert data["tensors"] == [
        {"side": side, "name": "layer.weight", "fate": "judged", "rows": [0]}
        for side in ("base", "tuned")
    ]
    assert data["summary"]["tensors"] == {
        "base": 1, "tuned": 1, "compared": 2, "equal": 0, "lost": 0, "excluded": 0, "apart": 0,
    }  # fmt: skip
    (matrix,) = data["matrices"]
    assert {"name", "shape", "dtype", "update", "rank", "spectral_norm_base"} < set(matrix)
    assert {"spectral_norm_update", "new_directions", "directions", "status", "note"} < set(matrix)
    assert set(matrix["directions"][0]) == {
        "index", "sigma", "side", "score", "score_lower", "score_upper", "subspace_overlap",
        "overlap_lower", "overlap_upper", "matched_index", "verdict", "method", "residual",
        "drift_along",
    }  # fmt: skip


def test_a_record_survives_the_disk(record, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(record.to_json())
    assert Record.from_json(path) == record


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("some/model", "some/model"),
        ("", None),
        (["a"], None),
        ("x\ud800\x1b[31m", "x\\ud800\\x1b[31m"),
        ("y" * 10**5, "y" * 500),
    ],
)
def test_what_an_adapter_names_as_its_base_is_told_harmlessly(named, told, tmp_path):
    base = save(tmp_path / "b.safetensors", {"x.weight": weights(6, 5)})
    factors = {"x.lora_A.weight": weights(2, 5), "x.lora_B.weight": weights(6, 2)}
    adapter = save_adapter(tmp_path / "a", factors, base_model_name_or_path=named)
    record = bulkedge.audit(base, adapter)
    assert record.inputs.tuned.trained_on == told
    (tmp_path / "r.json").write_text(record.to_json(), encoding="utf-8")
    assert Record.from_json(tmp_path / "r.json") == record


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "not a bulkedge record of schema 2 .*Field required"),
        ("[", "not a bulkedge record"),
        ('{"schema_version": "1"}', "schema_version: Input should be '2'"),
        ('{"schema_version": "99"}', "schema_version: Input should be '2'"),
    ],
)
def test_other_files_are_no_records(text, message, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Record.from_json(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match=r"missing\.json: cannot be read"):
        Record.from_json(tmp_path / "missing.json")


def test_the_schema_describes_every_field():
    schema = Record.model_json_schema()
    for name, model in some(schema["$defs"].items()):
        if name in ("Verdict", "Expectation", "Inputs", "Tool", "Record"):
            continue
        undescribed = {
            field
            for field, told in model["properties"].items()
            if "description" not in told and "$ref" not in str(told)
        }
        assert undescribed <= {
            "reason", "verdict", "side", "update", "status", "spectral_norm_base",
            "spectral_norm_update", "seconds", "jobs", "directions",
        }, name  # fmt: skip


def test_bad_recipes_name_every_problem_at_once():
    with pytest.raises(RecipeError) as caught:
        make_recipe({"top_k": 0, "epsilon": 2, "colour": "red", "side": "up"}, source="r.yaml")
    text = str(caught.value)
    for part in ("r.yaml", "top_k", "epsilon", "unknown field 'colour'", "side", "the fields are"):
        assert part in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 5}, "recipe: unknown field 'topk'; did you mean top_k? (the fields are top_k, "),
        ({"exclude": "pooler.*"}, "exclude: give a list of globs, such as ['pooler.*'] ("),
        ({"device": "gpu"}, "device: use cpu, cuda or cuda:0, got 'gpu' ("),
        ({"top_k": 0}, "top_k: at least 1, got 0 ("),
        ({"epsilon": 0}, "epsilon: more than 0, got 0 ("),
    ],
)
def test_a_bad_setting_is_told_with_what_to_write_instead(settings, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        make_recipe(settings)


@pytest.mark.parametrize("call", [bulkedge.audit, bulkedge.repair])
def test_a_setting_beside_the_recipe_is_told_where_it_goes(call):
    with pytest.raises(RecipeError, match=r"top_k is a setting of the recipe; give recipe={'top_"):
        call("base", "tuned", "out", top_k=5)
    with pytest.raises(TypeError, match="frobnicate"):
        call("base", "tuned", frobnicate=5)


def test_the_default_of_epsilon_has_one_place():
    places = [
        bulkedge.intruder.certify, bulkedge.update.predict, bulkedge.update.predict_spikes,
        bulkedge.tune.Monitor,
    ]  # fmt: skip
    for place in some(places):
        assert inspect.signature(place).parameters["epsilon"].default is DEFAULT_EPSILON
    assert Recipe().epsilon is DEFAULT_EPSILON
    typed = re.compile(r"epsilon[^\n]*= *0\.5\b|(?:score|below|ε) *<? *0\.5\b", re.IGNORECASE)
    source = Path(bulkedge.__file__).parent
    found = {path.name for path in source.rglob("*.py") if typed.search(path.read_text("utf-8"))}
    assert found == {"_fields.py", "_verdict.py"}  # its home, and an example


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("docs/audit.md", "| `--epsilon` | the score below which a direction is new | {} |"),
        ("docs/audit.md", "| `aligned` | score ≥ ε ({}) |"),
        ("docs/audit.md", "epsilon: {}\n"),
        ("docs/faq.md", "k = 10 and ε = {}, are those of Shuttleworth et al."),
        ("docs/simulate.md", "What counts as new is a score below {}\n"),
        ("README.md", "**aligned**: score ≥ {}."),
    ],
)
def test_pages_tell_the_default_of_epsilon(page, text):
    root = Path(bulkedge.__file__).parents[2]
    assert text.format(DEFAULT_EPSILON) in (root / page).read_text(encoding="utf-8")


def test_the_message_on_a_thousand_problems_has_ten():
    with pytest.raises(RecipeError, match="; and 991 more") as caught:
        make_recipe({f"field{i}" + "x" * 1000: i for i in range(1001)})
    assert len(str(caught.value)) < 4000


def test_a_value_built_to_be_endless_is_not_written_out(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    (tmp_path / "r.yaml").write_text("\n".join([*lines, "top_k: *a39"]))
    with pytest.raises(RecipeError, match=r"top_k: Input should be a valid integer, got \[\["):
        make_recipe(read_recipe(tmp_path / "r.yaml"))


@pytest.mark.parametrize("value", [0, -3])
def test_recipe_is_frozen_and_checked(value):
    with pytest.raises(ValueError, match=r"top_k\s+Input should be greater than or equal to 1"):
        Recipe(top_k=value)
    with pytest.raises(ValueError, match="Instance is frozen"):
        Recipe().top_k = 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top_k: [", "not valid YAML"),
        ("- 1", "expected fields and values, got list"),
        ("", "holds no settings; write some, or leave the file out"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
        ("seed: 2024-13-45", "not valid YAML: month must be in"),
        ("top_k: !!int x", "not valid YAML"),
    ],
)
def test_recipe_files_that_are_none(text, message, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)


def test_recipe_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"missing\.yaml: cannot be read .*; is it a recipe"):
        read_recipe(tmp_path / "missing.yaml")
    (tmp_path / "r.yaml").write_text("top_k: 3")
    assert read_recipe(tmp_path / "r.yaml") == {"top_k": 3}
    monkeypatch.setattr("bulkedge.records.recipe.MAX_RECIPE_BYTES", 2)
    with pytest.raises(RecipeError, match="larger than 2 bytes"):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_pipes_are_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(RecipeError, match="not a regular file"):
        read_recipe(pipe)
    with pytest.raises(CheckpointError, match=r"not a regular file.; give the file of a bulkedge"):
        Record.from_json(pipe)


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole, which takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"cannot be read .larger than 1073741824 bytes"):
            Record.from_json(path)
        with pytest.raises(RecipeError, match=r"large: cannot be read .larger than 1048576 by"):
            read_recipe(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
