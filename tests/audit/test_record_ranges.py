"""Records edited by hand: each field of each model holds what it may, or the file is refused."""

import json
import types
import typing
from copy import deepcopy

import pytest
import torch
from click.testing import CliRunner
from pydantic import BaseModel
from torch import nn

import bulkedge
from bulkedge import CheckpointError, Record, RepairRecord, Scale, Shard
from bulkedge.auditing import merge_shards
from bulkedge.cli import cli
from bulkedge.moments import Moments
from bulkedge.records.record import Document
from bulkedge.records.rows import Row
from cases import gaussian, orthonormal
from helpers import save, save_adapter, some, weights

SIGNED = {"scale", "matched_index", "base_share", "energy_removed"}
"""What may be negative."""
UNBOUNDED = {
    "sigma", "residual", "values", "edge", "misfit", "misfit_limit", "theta", "location", "sd",
    "measured_location", "spectral_norm_base", "spectral_norm_update", "threshold", "seconds",
    "scale", "base_share", "update_norm", "change", "loss",
    "drift_before", "drift_after", "task_change", "top_k_threshold", "strength", "mean", "most",
    "high", "relative_change",
}  # fmt: skip
"""Lengths, norms, seconds: as large as a double."""
FREE = {
    "name", "path", "trained_on", "version", "torch", "reason", "tuned_name", "note", "engine",
    "output", "left_behind", "include", "exclude", "quantised", "drift_note", "not_finite",
    "disagreements", "contradictions", "read_only", "known_as", "base_class",
}  # fmt: skip
"""Texts that may be any."""


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Records of each kind, with a value in every field."""
    folder = tmp_path_factory.mktemp("records")
    base = {f"l{i}.weight": gaussian(40 + i, 30) for i in range(3)} | {"l0.bias": weights(40)}
    spike = 60 * orthonormal(40, 1, 1) @ orthonormal(30, 1, 2).mT
    tuned = {name: W + 1e-3 for name, W in base.items()}
    tuned["l0.weight"] = base["l0.weight"] + spike
    tuned["l2.weight"] = torch.full((42, 30), torch.nan, dtype=torch.float64)
    norm = {"norm.weight": weights(30)}
    base_file = save(folder / "b.safetensors", base | norm)
    tuned_file = save(folder / "t.safetensors", tuned | norm)
    factors = {
        "l0.lora_A.weight": weights(2, 30), "l0.lora_B.weight": 3 * weights(40, 2, seed=1),
        "l1.lora_A.weight": weights(2, 30), "l1.lora_B.weight": weights(41, 2, seed=2),
        "l0.bias": base["l0.bias"] + 1,
    }  # fmt: skip
    adapter = save_adapter(folder / "a", factors, base_model_name_or_path="some/base")
    recipe = {"top_k": 3, "side": "both", "include": ["*"], "exclude": ["l9*", "*bias"]}
    lora = recipe | {"exclude": [], "split": {"l0.weight": [15, 25]}}
    found = {
        "full": bulkedge.audit(base_file, tuned_file, recipe=recipe | {"exclude": []}),
        "adapter": bulkedge.audit(
            base_file, adapter, recipe=lora | {"critical_scale": True}, moments=moments_of(base)
        ),
        "part": bulkedge.audit(base_file, adapter, recipe=lora, shard=Shard(1, 2)),
        "repair": bulkedge.repair(
            base_file, adapter, folder / "out", method=Scale(0.0), recipe={"top_k": 3}, max_rank=9
        ),
    }
    found = {name: json.loads(record.to_json()) for name, record in found.items()}
    of_protect = {"strength": 1.0, "drift_before": 0.5, "drift_after": 0.25, "task_change": 0.1}
    found["repair"]["matrices"][0] |= of_protect
    found["adapter"]["inputs"]["tuned"]["disagreements"] = ["rank_pattern names q_prj"]
    found["adapter"]["inputs"]["tuned"] |= {"base_class": "AutoModel", "labels": 5}
    found["full"]["matrices"][0]["read_only"] = "fp8, a scale for each row"
    found["full"]["skipped"][0]["not_finite"] = "1 NaN and 0 Inf"
    found["full"]["inputs"]["tuned"]["contradictions"] = ["config.json says n_layer 3"]
    found["adapter"]["inputs"]["base"]["known_as"] = ["org/name"]
    found["adapter"]["inputs"]["base"]["quantised"] = "bitsandbytes nf4 (1 weight)"
    return found


def moments_of(base):
    """Moments of one layer of a base: of the others there is a note why drift is not known."""
    layers = nn.ModuleDict({f"l{i}": nn.Linear(30, 40 + i, bias=i == 0) for i in range(3)})
    layers.load_state_dict(base)
    with Moments(layers) as moments, torch.no_grad():
        layers["l0"](weights(50, 30))
    return moments


def kind(name):
    return RepairRecord if name == "repair" else Record


def leaves(value, path=()):
    """The path of each plain value."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, (*path, key))
    else:
        yield path, value


def changed(document, path, value):
    document = deepcopy(document)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(document)  # with NaN and Infinity, which JSON does not have


def mutations(path, value):
    """What does not belong in the place of a value."""
    field = next(key for key in reversed(path) if isinstance(key, str))
    yield {"a": [1]}
    if isinstance(value, bool) or value is None:
        yield 3 if field in FREE else "x"
    elif isinstance(value, int | float):
        yield from (float("nan"), float("inf"), float("-inf"), "x")
        if field not in SIGNED:
            yield -1 if isinstance(value, int) else -0.5
        if field not in UNBOUNDED:
            yield 10**30 if isinstance(value, int) else 1e30
    elif field not in FREE:
        yield "x"
    else:
        yield 3


def rejected(name, text, folder):
    path = folder / "record.json"
    path.write_text(text)
    try:
        kind(name).from_json(path)
    except CheckpointError as error:
        return "record.json: not a" in str(error)
    return False


@pytest.mark.parametrize("name", ["full", "adapter", "part", "repair"])
def test_no_field_takes_what_it_cannot_mean(name, documents, tmp_path):
    document = documents[name]
    assert not rejected(name, json.dumps(document), tmp_path)
    seen, taken = {}, []
    for path, value in leaves(document):
        shape = tuple(0 if isinstance(key, int) else key for key in path)
        if seen.setdefault((shape, type(value)), 0) >= 2:  # of many alike, two
            continue
        seen[shape, type(value)] += 1
        taken += [
            (path, value, put)
            for put in mutations(path, value)
            if not rejected(name, changed(document, path, put), tmp_path)
        ]
    assert not taken, taken


def test_the_documents_have_a_value_in_every_field(documents):
    """So that the table above is one of all fields."""
    seen = {
        key
        for document in documents.values()
        for path, value in leaves(document)
        if value is not None
        for key in path
        if isinstance(key, str)
    }
    fields = {name for model in models() for name in model.model_fields}
    assert fields - seen == {"left_behind"}  # a list of texts


OTHERS = ("bulkedge.records.budget", "bulkedge.records.frontier")
"""Records that are no audit's and no repair's."""


def models(root=Row):
    """All models of records of audits and repairs."""
    for model in root.__subclasses__():
        if model is not Document and model.__module__ not in OTHERS:
            yield model
        yield from models(model)


def numbers(annotation, limits=()):
    """The numbers in an annotation, each with its limits."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        yield from numbers(inner, (*limits, *more))
    elif origin in (list, dict, tuple, typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from numbers(part, limits)
    elif annotation in (int, float):
        yield annotation, limits


def limits_of(metadata):
    """The names of what is asked of a number."""
    found = set()
    for part in metadata:
        inner = getattr(part, "metadata", [part])
        found |= {
            name for item in inner for name in ("ge", "gt", "le", "lt") if hasattr(item, name)
        }
        finite = [getattr(item, "allow_inf_nan", None) is False for item in inner]
        found |= {"finite"} if any(finite) else set()
    return found


def test_every_number_of_every_model_has_limits():
    """A field that is added has them, too."""
    found = list(models())
    assert len(found) > 15
    rows = [
        (f"{model.__name__}.{name}", name, field, number, limits)
        for model in found
        for name, field in model.model_fields.items()
        for number, limits in numbers(typing.get_type_hints(model, include_extras=True)[name])
    ]
    for where, name, field, number, limits in some(rows):
        asked = limits_of([*limits, *field.metadata])
        assert asked & {"finite", "le", "lt"}, where
        assert number is int or "finite" in asked, where
        assert asked & {"ge", "gt"} or name in SIGNED, where


EDITS = {
    "score above its interval": ("score", 1.0, "the score within its interval"),
    "score below its interval": ("score_lower", 1.0, "the score within its interval"),
    "overlap above its interval": ("subspace_overlap", 1.0, "the overlap within its interval"),
}


@pytest.mark.parametrize("case", EDITS)
def test_intervals(case, documents, tmp_path):
    field, value, message = EDITS[case]
    document = documents["full"]
    first = next(
        (i, j)
        for i, matrix in enumerate(document["matrices"])
        for j, row in enumerate(matrix["directions"])
        if max(row["score_upper"], row["overlap_upper"]) < 0.9
    )
    path = ("matrices", first[0], "directions", first[1], field)
    (tmp_path / "r.json").write_text(changed(document, path, value))
    with pytest.raises(CheckpointError, match=message):
        Record.from_json(tmp_path / "r.json")


POINT = {"scale": 1.0, "new": 1.0, "score": 0.2}
LIMITS = {
    "ends in no order": ({"critical_scale": {"expected": None, "low": 2.0, "high": 1.0}},
                         "a low end below 1.0, got 2.0"),
    "a high end alone": ({"critical_scale": {"expected": None, "high": 1.0}},
                         "a low end below 1.0, got None"),
    "more beyond the higher limit": ({"beyond_top_k_threshold": 99},
                                     "no more spikes beyond a higher limit, got .*99"),
    "more in use than there are": ({"in_use": 99}, "expected at most [0-9]+ spikes in use, got 99"),
    "an effective rank above it": ({"effective_rank": 1e3}, "expected effective_rank of 1 to"),
    "a stable rank below one": ({"stable_rank": 0.5}, "expected stable_rank of 1 to .*, got 0.5"),
    "a curve in no order": ({"scale_curve": {"judged": [POINT | {"scale": 2.0}, POINT]}},
                            "expected ascending scales, got .2.0, 1.0"),
    "a larger update": ({"relative_update": 1e30},
                        "a ratio of Frobenius norms does not fit .*: 1e[+]30"),
    "a smaller update": ({"relative_update": 1e-9},
                         "a ratio of Frobenius norms does not fit .*: 1e-09"),
    "another scale": ({"critical_scale": {"expected": 1e30}}, "expected a critical scale of "),
    "a scale out of reach": ({"critical_scale": {"expected": 1e30, "aligned": True}},
                             "a critical scale within reach, got 1e[+]30"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIMITS)
def test_limits(case, documents, tmp_path):
    update, message = LIMITS[case]
    document = deepcopy(documents["adapter"])
    next(row for row in document["matrices"] if row["top_k_threshold"]).update(update)
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        Record.from_json(tmp_path / "r.json")


LISTS = {
    "fewer values than ranks": ("spectrum", "values", "ranks in order, and a value for each"),
    "fewer ends": ("angles", "cosines_upper", "as many lower as upper ends"),
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_of_one_length(case, documents, tmp_path):
    of, field, message = LISTS[case]
    document = deepcopy(documents["full"])
    place = document["matrices"][0][of]
    (place[0] if of == "angles" else place)[field].pop()
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        Record.from_json(tmp_path / "r.json")


def test_more_wide_angles_than_angles(documents, tmp_path):
    document = deepcopy(documents["full"])
    angles = document["matrices"][0]["angles"][0]
    angles["undecided"] = len(angles["cosines_lower"]) + 1
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"expected at most \d+ angles, got more"):
        Record.from_json(tmp_path / "r.json")


def test_tensors_that_do_not_add_up(documents, tmp_path):
    document = deepcopy(documents["full"])
    document["summary"]["tensors"]["equal"] += 1
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"expected counts that add up to \d+ tensors, got"):
        Record.from_json(tmp_path / "r.json")


def cleared(document):
    document["summary"]["new_directions"] = 0


def pardoned(document):
    cleared(document)
    for matrix in document["matrices"]:
        matrix["new_directions"] = 0


def dropped(document):
    document["matrices"].pop()


def found_nothing_lost(document):
    document["skipped"] = [row for row in document["skipped"] if not row["lost"]]


def places(document, positions):
    document["shard"]["positions"] = positions


def acquitted(document, verdict="aligned"):
    """An intruder with another verdict, and whatever counts it."""
    (row,) = (d for d in document["matrices"][0]["directions"][:1])
    document["summary"]["verdicts"][row["verdict"]] -= 1
    document["summary"]["verdicts"][verdict] += 1
    row["verdict"] = verdict


def left_out(document):
    row = document["matrices"][0]["directions"].pop()
    document["summary"]["verdicts"][row["verdict"]] -= 1
    document["summary"]["new_directions"] -= row["score"] < document["recipe"]["epsilon"]
    document["matrices"][0]["new_directions"] -= row["score"] < document["recipe"]["epsilon"]


def told_twice(document):
    document["matrices"][1]["name"] = document["matrices"][0]["name"]


HAND = {
    "verdict": ("full", acquitted, "the left direction 0 cannot be aligned with a score of"),
    "epsilon": (
        "full",
        lambda d: d["recipe"].update(epsilon=0.001),
        "cannot be (rotated|intruder) with a score of",
    ),
    "undecided without a reason": (
        "full",
        lambda d: acquitted(d, "undecided"),
        "the left direction 0 cannot be undecided with a score of",
    ),
    "direction": ("full", left_out, "expected 3 right directions of 'l0.weight', each once, got 2"),
    "fewer asked for": ("full", lambda d: d["recipe"].update(top_k=2), "expected 2 left dir"),
    "a side less": ("full", lambda d: d["recipe"].update(side="left"), "expected 0 right"),
    "name twice": ("full", told_twice, "each matrix once, got 'l0.weight' twice"),
    "count": ("full", cleared, "the counts of the rows listed"),
    "counts of matrices, too": ("full", pardoned, "new directions of|counts of the rows"),
    "row": ("adapter", dropped, "tensors of the matrices that are here"),
    "angles": (
        "full",
        lambda d: d["matrices"][0]["angles"][0].update(outside=4),
        "at most 3 angles",
    ),
    "interval": (
        "full",
        lambda d: d["matrices"][0]["angles"][0].update(cosines_upper=[0, 0, 0]),
        "the cosine within its interval",
    ),
    "part of fewer": ("part", lambda d: d["shard"].update(index=3), "a part of 2, got number 3"),
    "place twice": ("part", lambda d: places(d, [0, 0]), "places below 3 in order"),
    "place beyond": ("part", lambda d: places(d, [1, 7]), "places below 3 in order"),
    "places too many": ("part", lambda d: places(d, [0, 1, 2]), "places do not add up"),
    "no place": ("part", lambda d: places(d, []), "places do not add up"),
    "no time": ("full", lambda d: d["run"].update(started="2026-01-01"), "a time with its zone"),
    "dtype": ("full", lambda d: d["matrices"][0].update(dtype="F31"), "a dtype of safetensors"),
    "setting": ("repair", lambda d: d["method"].update(keep=[1]), "a number for keep"),
    "setting of another": (
        "repair",
        lambda d: d["method"].update(level=1.0),
        "unexpected keyword argument 'level'",
    ),
    "no method": ("repair", lambda d: d["method"].pop("name"), "the name of a method"),
    "endless setting": (
        "repair",
        lambda d: d["method"].update(keep=float("inf")),
        "a number for keep",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HAND)
def test_what_was_edited_is_named(case, documents, tmp_path):
    name, edit, message = HAND[case]
    document = deepcopy(documents[name])
    edit(document)
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        kind(name).from_json(tmp_path / "r.json")


@pytest.mark.parametrize("command", ["report", "merge"])
@pytest.mark.parametrize("put", [float("nan"), 1e30, -1.0])
def test_the_commands_refuse(command, put, documents, tmp_path):
    document = documents["full" if command == "report" else "part"]
    text = changed(document, ("matrices", 0, "directions", 0, "score"), put)
    (tmp_path / "record.json").write_text(text)
    output = ["-o", str(tmp_path / "x.html")] if command == "report" else []
    found = CliRunner().invoke(cli, [command, str(tmp_path / "record.json"), *output])
    assert isinstance(found.exception, CheckpointError)
    assert "matrices.0.directions.0.score: Input should be" in str(found.exception)


def test_parts_that_are_whole_are_merged(documents, tmp_path):
    """What is refused above is not refused unchanged."""
    (tmp_path / "1.json").write_text(json.dumps(documents["part"]))
    with pytest.raises(bulkedge.InputError, match="expected 2 shards, got 1"):
        merge_shards([tmp_path / "1.json"])


def test_models_are_all_rows():
    """None is left out of the tests above."""
    import bulkedge.records.record
    import bulkedge.records.rows
    import bulkedge.repairing.record

    modules = (bulkedge.records.record, bulkedge.records.rows, bulkedge.repairing.record)
    for module in modules:
        for value in some(vars(module).values()):
            if isinstance(value, type) and issubclass(value, BaseModel) and value is not BaseModel:
                assert issubclass(value, Row) or value is bulkedge.Recipe
