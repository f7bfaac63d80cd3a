"""Drift of every kind of update, against the mean squares of the outputs themselves."""

import json
import os

import pytest
import torch
from torch import nn

import bulkedge
from bulkedge import CheckpointError, InputError
from bulkedge._linmap import LowRank
from bulkedge.auditing.engine.ray import audit_on_node, versions
from bulkedge.auditing.inputs import files_of, stamps
from bulkedge.comparison import Pair, make_plan, with_moments
from bulkedge.comparison.drift import update_rows
from bulkedge.moments import Moments, to_dense
from helpers import save, save_adapter, some, weights


class Conv1D(nn.Module):
    """GPT-2's layer of this name, which stores its weight as (in, out)."""

    def __init__(self, width, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out))

    def forward(self, x):
        return x @ self.weight


class Net(nn.Module):
    """A layer of each kind, and stacked experts, which no hook sees."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(30, 16)
        self.qkv_proj, self.up = nn.Linear(16, 36), nn.Linear(12, 24)
        self.c_proj = Conv1D(24, 10)
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.idle = nn.Linear(5, 7)
        self.experts = nn.ParameterDict({"down_proj": torch.randn(3, 8, 10)})

    def forward(self, ids):
        q, k, v = self.qkv_proj(self.words(ids)).chunk(3, dim=-1)
        hidden = self.c_proj(torch.tanh(self.up(q + k * v)))
        return self.conv(hidden.reshape(len(ids), 2, 5, -1))


IDS = torch.randint(0, 30, (60, 5), generator=torch.Generator().manual_seed(1)) // 2
SPLIT = {"split": {"qkv_proj.weight": [12, 12, 12]}}


@pytest.fixture(scope="module")
def model():
    return Net()


@pytest.fixture(scope="module")
def moments(model):
    with Moments(model) as moments, torch.no_grad():
        model(IDS)
    return moments


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, moments):
    folder = tmp_path_factory.mktemp("drift")
    save(folder / "base.safetensors", dict(model.state_dict()))
    (folder / "config.json").write_text('{"model_type": "gpt2", "tie_word_embeddings": false}')
    moments.save(folder / "base.moments")
    return folder


@pytest.fixture(scope="module")
def inputs(model):
    """What each layer multiplies its weight with, one row each, and its weight as (out, in)."""
    rows = {}

    def hook(name):
        return lambda _, args: rows.update({name: args[0].detach().double()})

    named = ("qkv_proj", "up", "c_proj", "conv", "words")
    handles = [getattr(model, n).register_forward_pre_hook(hook(n)) for n in named]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    patches = nn.functional.unfold(rows["conv"], 3, padding=1).mT
    one_hot = nn.functional.one_hot(rows["words"].long(), 30).double()
    rows |= {"conv": patches, "words": one_hot}
    return {name: x.reshape(-1, x.shape[-1]) for name, x in rows.items()}


def acting(name, weight):
    """A weight as ``(out, in)``."""
    weight = weight.double().flatten(1)
    return weight.mT if name in ("c_proj", "words") else weight


def powers(x, base, change):
    """Mean squares of what is added to the outputs, and of the outputs."""
    return [float((x @ W.mT).square().sum() / len(x)) for W in (change, base)]


def check(record, inputs, model, changes, rows=None):
    """Each row of a record against the outputs themselves."""
    tensors = model.state_dict()
    checked = []
    for matrix in some(record.matrices):
        name = matrix.name.partition(".")[0]
        if name not in changes:
            continue
        part = slice(None) if rows is None else rows.get(matrix.name, slice(None))
        base, change = acting(name, tensors[f"{name}.weight"])[part], changes[name][part]
        moved, power = powers(inputs[name], base, change)
        assert matrix.output_change == pytest.approx(moved, rel=1e-5)
        assert matrix.output_power == pytest.approx(power, rel=1e-5)
        assert matrix.drift == pytest.approx(moved / power, rel=1e-5)
        assert matrix.drift_note is None
        check_parts(matrix, inputs[name], base, change, name == "words")
        checked.append(name)
    return checked


def check_parts(matrix, x, base, change, transposed):
    """Directions of the update, and those of the tuned matrix, against SVDs in float64."""
    U, s, _ = torch.linalg.svd(change, full_matrices=False)
    power = powers(x, base, change)[1]
    parts = (x @ change.mT @ U).square().sum(dim=0) / len(x) / power
    for part in some(matrix.drift_parts):
        assert part.sigma == pytest.approx(float(s[part.index]), rel=2e-3)
        if matrix.update == "lora" or len(s) == 1:  # of a dense one the vectors have three digits
            assert part.drift == pytest.approx(float(parts[part.index]), rel=1e-5, abs=1e-12)
    listed = [part.drift for part in matrix.drift_parts]
    assert listed == sorted(listed, reverse=True)
    if len(listed) >= len(s) or matrix.update == "lora":
        assert sum(listed) == pytest.approx(matrix.drift, rel=1e-6)
    tuned = torch.linalg.svd(base + change, full_matrices=False).U
    side = "right" if transposed else "left"
    for row in some(d for d in matrix.directions if d.side == side):
        along = (x @ change.mT @ tuned[:, row.index]).square().mean() / power
        assert row.drift_along == pytest.approx(float(along), rel=1e-4, abs=1e-9)
    assert all(d.drift_along is None for d in matrix.directions if d.side != side)


def test_dense_updates_of_every_kind_of_layer(folder, model, moments, inputs):
    tensors = dict(model.state_dict())
    changed = {
        n: W + 0.1 * weights(*W.shape, seed=len(n)) for n, W in tensors.items() if W.ndim > 1
    }
    tuned = save(folder / "dense.safetensors", tensors | changed)
    recipe = SPLIT | {"side": "both", "top_k": 5}
    record = bulkedge.audit(folder / "base.safetensors", tuned, recipe=recipe, moments=moments)
    changes = {
        name: acting(name, changed[f"{name}.weight"]) - acting(name, tensors[f"{name}.weight"])
        for name in inputs
    }
    blocks = {f"qkv_proj.weight[{i}:{i + 12}]": slice(i, i + 12) for i in (0, 12, 24)}
    assert len(check(record, inputs, model, changes, blocks)) == 4 + 3
    unknown = {m.name: m.drift_note for m in record.matrices if m.drift is None}
    assert (
        unknown.pop("idle.weight") == "no inputs of this layer in the base moments: it did not run"
    )
    assert len(unknown) == 3  # one row an expert
    assert all(
        "the tokens of each are not measured separately" in note for note in unknown.values()
    )
    assert (record.summary.drift.measured, record.summary.drift.unknown) == (7, 4)


def adapter(folder, **config):
    tensors = {}
    shapes = {"qkv_proj": (36, 16), "up": (24, 12), "c_proj": (10, 24)}
    for name, (m, n) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = weights(2, n)
        tensors[f"base_model.model.{name}.lora_B.weight"] = weights(m, 2, seed=1)
    tensors["base_model.model.conv.lora_A.weight"] = weights(2, 2, 3, 3)
    tensors["base_model.model.conv.lora_B.weight"] = weights(6, 2, 1, 1, seed=1)
    tensors["base_model.model.words.lora_embedding_A"] = weights(2, 30)
    tensors["base_model.model.words.lora_embedding_B"] = weights(16, 2, seed=1)
    return tensors, save_adapter(folder, tensors, **config)


def lora_change(tensors, name):
    """The update of a layer as ``(out, in)``."""
    middle, end = ("embedding_", "") if name == "words" else ("", ".weight")
    A, B = (
        tensors[f"base_model.model.{name}.lora_{middle}{x}{end}"].double().flatten(1) for x in "AB"
    )
    return 2 * B @ A  # alpha/r of save_adapter


def test_low_rank_updates_of_every_kind_of_layer(folder, model, moments, inputs):
    tensors, tuned = adapter(folder / "lora")
    changes = {name: lora_change(tensors, name) for name in inputs}
    record = bulkedge.audit(
        folder / "base.safetensors", tuned, recipe={"side": "both"}, moments=moments
    )
    assert sorted(check(record, inputs, model, changes)) == sorted(inputs)
    for matrix in some(record.matrices):
        assert (matrix.update, len(matrix.drift_parts)) == ("lora", 2)
    drifts = [m.drift for m in record.matrices]
    found = record.summary.drift
    assert found.mean == pytest.approx(sum(drifts) / len(drifts))
    changed, power = (
        sum(getattr(m, name) for m in record.matrices) for name in ("output_change", "output_power")
    )
    assert found.of_sums == pytest.approx(changed / power)
    shares = [m.drift_along_new / m.drift for m in record.matrices]
    assert found.along_new == pytest.approx(sum(shares) / len(shares))
    assert 0 < found.along_new < 1


def test_dora_and_a_merged_update_of_low_rank(folder, model, moments, inputs):
    stored, (B, A) = model.state_dict(), (weights(24, 2), weights(2, 12, seed=1))
    W0 = stored["up.weight"].double()
    norms = torch.linspace(0.5, 2, 24)
    tensors = {
        "base_model.model.up.lora_A.weight": A,
        "base_model.model.up.lora_B.weight": B,
        "base_model.model.up.lora_magnitude_vector": norms,
    }
    tuned = save_adapter(folder / "dora", tensors, use_dora=True)
    start = W0 + 2 * B.double() @ A.double()
    W = (norms.double() / start.norm(dim=1))[:, None] * start
    record = bulkedge.audit(folder / "base.safetensors", tuned, moments=moments)
    assert check(record, inputs, model, {"up": W - W0}) == ["up"]

    merged = (W0 + 2 * B.double() @ A.double()).float()
    tuned = save(folder / "merged.safetensors", dict(stored) | {"up.weight": merged})
    record = bulkedge.audit(folder / "base.safetensors", tuned, moments=moments)
    (row,) = [matrix for matrix in record.matrices if matrix.status == "audited"]
    moved, power = powers(inputs["up"], W0, merged.double() - W0)
    assert row.drift == pytest.approx(moved / power, rel=1e-6)
    assert sum(part.drift for part in row.drift_parts[:2]) == pytest.approx(row.drift, rel=1e-6)
    assert {matrix.drift for matrix in record.matrices if matrix is not row} == {0.0}
    assert (record.summary.drift.measured, record.summary.drift.unknown) == (1, 0)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_rows_of_an_update_are_those_of_its_map(columns, replaced):
    base, magnitude = weights(1100, 6), weights(6 if columns else 1100, seed=3).abs().double()
    factors = LowRank(weights(1100, 2, seed=1).double(), weights(2, 6, seed=2).double(), 0.5)
    pair = Pair(base, base + 1 if replaced else None, factors, magnitude, columns)
    rows = list(update_rows(pair))
    assert len(rows) == 2
    torch.testing.assert_close(torch.cat(rows), pair.update_map().to_dense())


def test_a_sketch_and_a_file_give_what_they_stand_for(folder, moments):
    tensors, tuned = adapter(folder / "sketched")
    sketched = moments.sketched(4)
    exact, rough = (
        bulkedge.audit(folder / "base.safetensors", tuned, moments=given)
        for given in (folder / "base.moments", sketched)
    )
    assert exact.inputs.moments.path == str(folder / "base.moments")
    assert rough.inputs.moments.path == "moments.safetensors"
    for one, other in some(zip(exact.matrices, rough.matrices, strict=True)):
        name = one.name.partition(".")[0]
        change = lora_change(tensors, name)
        C = to_dense(sketched[name].moment)
        moved = float((change @ C * change).sum())
        assert other.drift == pytest.approx(moved / one.output_power, rel=1e-5)
        assert other.output_power == pytest.approx(one.output_power, rel=1e-6)


def test_an_output_layer_that_shares_the_embedding_has_inputs_of_its_own(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens, self.lm_head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
            self.lm_head.weight = self.embed_tokens.weight

        def forward(self, ids):
            return self.lm_head(torch.tanh(self.embed_tokens(ids)))

    torch.manual_seed(0)
    model = Tied()
    with Moments(model) as moments, torch.no_grad():
        model(IDS)
    W0 = model.embed_tokens.weight.detach()
    base = save(tmp_path / "base/model.safetensors", {"embed_tokens.weight": W0}).parent
    (base / "config.json").write_text('{"tie_word_embeddings": true}')
    A, B = weights(2, 8), weights(30, 2, seed=1)
    names = ("base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight")
    tuned = save_adapter(tmp_path / "lora", dict(zip(names, (A, B), strict=True)))
    (row,) = bulkedge.audit(base, tuned, moments=moments).matrices
    assert row.name == "embed_tokens.weight[as lm_head]"
    x = torch.tanh(W0.double()[IDS.flatten()])
    moved, power = powers(x, W0.double(), 2 * B.double() @ A.double())
    assert row.drift == pytest.approx(moved / power, rel=1e-5)


def test_what_cannot_be_measured_is_said(folder, model, tmp_path):
    base, (_, tuned) = folder / "base.safetensors", adapter(tmp_path / "lora")
    torch.manual_seed(5)
    other = Net()
    for layer in other.children():
        for weight in layer.parameters():
            nn.init.normal_(weight)
    with Moments(other) as foreign, torch.no_grad():
        other(IDS)
    record = bulkedge.audit(base, tuned, moments=foreign)
    for matrix in some(record.matrices):
        assert (matrix.status, matrix.drift, matrix.drift_parts) == ("audited", None, [])
        assert "of another model" in matrix.drift_note
    found = record.summary.drift
    assert (found.measured, found.unknown, found.mean, found.along_new) == (0, 5, None, None)
    small = nn.Sequential(nn.Linear(3, 3))
    with Moments(small) as foreign, torch.no_grad():
        small(torch.eye(3))
    with pytest.raises(InputError, match="no layer of the moments is in the checkpoint"):
        bulkedge.audit(base, tuned, moments=foreign)
    with pytest.raises(CheckpointError, match="no moments; collect them again"):
        bulkedge.audit(base, tuned, moments=base)
    silent = Net()
    silent.load_state_dict(model.state_dict())
    with Moments(silent) as moments, torch.no_grad():
        silent.up(torch.zeros(4, 12))
    notes = {m.name: m.drift_note for m in bulkedge.audit(base, tuned, moments=moments).matrices}
    assert notes["up.weight"].startswith("the base's outputs are zero on the inputs")
    assert "did not run" in notes["conv.weight"]


def test_layers_that_cannot_be_told_apart_are_an_error(tmp_path):
    W = weights(6, 4)
    pair = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 6)), "b": nn.Sequential(nn.Linear(4, 6))})
    for module in pair.values():
        module[0].weight = nn.Parameter(W.clone())
    with Moments(pair) as both, torch.no_grad():
        pair["a"](weights(5, 4))
        pair["b"](weights(5, 4, seed=1))
    with Moments(pair["a"]) as one, torch.no_grad():
        pair["a"](weights(5, 4))
    alone, twice = {"0.weight": W}, {"a.0.weight": W, "b.0.weight": W}
    for tensors, moments, message in (
        (alone, both, "'a.0' and 'b.0' share one weight, '0.weight'"),
        (twice, one, "layer '0' may be any of 'a.0.weight', 'b.0.weight': their weights are alike"),
    ):
        base = save(tmp_path / "base.safetensors", tensors)
        tuned = save(tmp_path / "tuned.safetensors", dict.fromkeys(tensors, 2 * W))
        with pytest.raises(InputError, match=message):
            bulkedge.audit(base, tuned, moments=moments)


def test_a_model_that_went_on_training_gives_its_own_power(folder, model, moments, tmp_path):
    """Where the weights that were run are not quite the base's, their outputs are not either."""
    weight = model.up.weight.detach() * 1.1 + 0.01 * weights(24, 12)
    base = save(tmp_path / "base.safetensors", {"up.weight": weight})
    A, B = weights(2, 12), weights(24, 2, seed=1)
    names = ("base_model.model.up.lora_A.weight", "base_model.model.up.lora_B.weight")
    tuned = save_adapter(tmp_path / "lora", dict(zip(names, (A, B), strict=True)))
    (row,) = bulkedge.audit(base, tuned, moments=moments).matrices
    W0, C = weight.double(), moments["up"].moment
    assert row.output_power == pytest.approx(float((W0 @ C * W0).sum()), rel=1e-5)


@pytest.fixture(scope="module")
def audited(folder):
    _, tuned = adapter(folder / "again")
    base, file = folder / "base.safetensors", folder / "base.moments"
    return base, tuned, file, bulkedge.audit(base, tuned, moments=file)


def test_a_cluster_is_told_of_the_file(audited):
    base, tuned, file, whole = audited
    plan = with_moments(make_plan(base, tuned, whole.recipe), file)
    for comparison, row in some(zip(plan.comparisons, whole.matrices, strict=True)):
        assert file in files_of(comparison)
        seen = stamps(files_of(comparison))
        assert audit_on_node(comparison, whole.recipe, versions(), seen) == ("", row.model_dump())


def test_parts_give_the_same_record(audited, tmp_path):
    base, tuned, file, whole = audited
    for i in (1, 2):
        part = bulkedge.audit(base, tuned, moments=file, shard=bulkedge.Shard(i, 2))
        assert part.summary.drift.measured == len(part.matrices)
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}/record.json").write_text(part.to_json())
    merged = bulkedge.merge_shards([tmp_path / "1", tmp_path / "2"])
    assert (merged.matrices, merged.summary) == (whole.matrices, whole.summary)
    other = bulkedge.audit(base, tuned, moments=others(file, tmp_path), shard=bulkedge.Shard(2, 2))
    (tmp_path / "2/record.json").write_text(other.to_json())
    with pytest.raises(InputError, match="their inputs differ"):
        bulkedge.merge_shards([tmp_path / "1", tmp_path / "2"])
    bare = bulkedge.audit(base, tuned, shard=bulkedge.Shard(2, 2))
    (tmp_path / "2/record.json").write_text(bare.to_json())
    with pytest.raises(InputError, match="their inputs differ"):
        bulkedge.merge_shards([tmp_path / "1", tmp_path / "2"])


def others(file, folder):
    """The moments of other texts, which the same model has read."""
    found = Moments.load(file)
    found.merge(found.sketched(2)).save(folder / "other.moments")
    return folder / "other.moments"


def test_a_resumed_audit_takes_no_rows_of_other_moments(audited, tmp_path):
    base, tuned, file, whole = audited
    journal, given = tmp_path / "journal.jsonl", others(file, tmp_path)
    bulkedge.audit(base, tuned, moments=given, journal=journal)
    notes = []
    resume = {"journal": journal, "resume": True, "notice": notes.append}
    record = bulkedge.audit(base, tuned, moments=file, **resume)
    assert record.run.resumed == 0
    assert record.matrices == whole.matrices
    assert "5 rows of other inputs, recipes or versions ignored" in notes[0]
    again = bulkedge.audit(base, tuned, moments=file, **resume)
    assert again.run.resumed == 5
    assert again.matrices == whole.matrices
    assert bulkedge.audit(base, tuned, **resume).run.resumed == 0


def test_moments_in_memory_are_the_same_file_each_time(audited, moments, tmp_path):
    base, tuned, *_ = audited
    journal = {"journal": tmp_path / "journal.jsonl", "resume": True}
    for taken in (0, 5, 5, 5, 5):  # the library puts metadata in an order of chance
        assert bulkedge.audit(base, tuned, moments=moments, **journal).run.resumed == taken


def test_moments_that_change_meanwhile_end_the_audit(audited, tmp_path):
    base, tuned, file, _ = audited
    own = tmp_path / "own.moments"
    own.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="an input file was changed during the audit"):
        bulkedge.audit(base, tuned, moments=own, progress=lambda *_: os.utime(own, (1, 1)))


def test_a_record_with_drift_survives_the_disk_and_must_add_up(audited, tmp_path):
    *_, record = audited
    path = tmp_path / "record.json"
    path.write_text(record.to_json())
    assert bulkedge.Record.from_json(path) == record
    content = json.loads(record.to_json())

    def set_first(**values):
        return lambda other: other["matrices"][0].update(values)

    part = content["matrices"][0]["drift_parts"][0]
    for change, message in (
        (set_first(drift=0.5), "expected a drift of"),
        (set_first(output_power=1e-3), "expected a drift of"),
        (set_first(drift_parts=[part] * 3), "expected parts of the drift"),
        (set_first(drift_note="why"), "or why it is not known, where there are moments"),
        (set_first(drift=None), "expected no parts of a drift that is not known"),
        (lambda other: other["summary"]["drift"].update(unknown=1), "counts of the rows"),
        (lambda other: other["inputs"].update(moments=None), "counts of the rows"),
    ):
        other = json.loads(json.dumps(content))
        change(other)
        path.write_text(json.dumps(other))
        with pytest.raises(CheckpointError, match=message):
            bulkedge.Record.from_json(path)
