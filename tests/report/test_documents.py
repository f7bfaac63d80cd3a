"""Every record is read from its text, its file, or the folder that holds it."""

import json

import pytest

import bulkedge
import frontiers
from bulkedge import CheckpointError, FrontierRecord, Record
from bulkedge.records.budget import BudgetRecord
from bulkedge.records.document import Document
from bulkedge.repairing import RepairRecord
from helpers import save, some, weights

KINDS = {kind.__name__: kind for kind in (Record, BudgetRecord, RepairRecord, FrontierRecord)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A record of each kind."""
    folder = tmp_path_factory.mktemp("inputs")
    base, tuned = folder / "base.safetensors", folder / "tuned.safetensors"
    save(base, {"up.weight": weights(40, 30)})
    save(tuned, {"up.weight": weights(40, 30) + weights(40, 30, seed=1)})
    return {
        "Record": bulkedge.audit(base, tuned),
        "BudgetRecord": bulkedge.budget(base),
        "RepairRecord": bulkedge.repair(base, tuned, folder / "repaired"),
        "FrontierRecord": frontiers.made(),
    }


def test_each_kind_is_tried_here():
    assert set(Document.__subclasses__()) == set(KINDS.values())


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_stands_for_the_record_in_it(made, name, tmp_path):
    kind, record = KINDS[name], made[name]
    (tmp_path / kind.file_name).write_text(record.to_json())
    for source in (tmp_path, str(tmp_path), tmp_path / kind.file_name, record.to_json()):
        assert kind.from_json(source) == record


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_without_it_is_told_what_to_run(name, tmp_path):
    kind = KINDS[name]
    with pytest.raises(
        CheckpointError, match=rf"holds no {kind.file_name}; run `bulkedge "
    ) as told:
        kind.from_json(tmp_path)
    assert f"run `{kind.made_by}` first" in str(told.value)
    inner = tmp_path / "one" / kind.file_name
    inner.parent.mkdir()
    inner.write_text("{}")
    with pytest.raises(CheckpointError, match="holds the records of several runs, in one; give"):
        kind.from_json(tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_of_another_record_names_what_reads_it(made, name, tmp_path):
    kind = KINDS[name]
    (tmp_path / kind.file_name).write_text(made[name].to_json())
    for other in some(KINDS.values()):
        if other is kind:
            continue
        words = f"holds no {other.file_name}, but a {kind.file_name}, which {name}.from_json reads"
        with pytest.raises(CheckpointError, match=words):
            other.from_json(tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_in_a_folder_is_named(name, tmp_path):
    kind = KINDS[name]
    (tmp_path / kind.file_name).write_text(json.dumps({"schema_version": "0"}))
    with pytest.raises(CheckpointError, match=rf"{kind.file_name}: not a {kind.kind} of schema"):
        kind.from_json(tmp_path)
    (tmp_path / kind.file_name).unlink()
    (tmp_path / kind.file_name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=rf"{kind.file_name}: cannot be read .*; give the file of a"
    ):
        kind.from_json(tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_the_file_of_another_record_is_called_what_it_is(made, name, tmp_path):
    kind = KINDS[name]
    file = tmp_path / "x.json"
    file.write_text(made[name].to_json())
    for other in some(KINDS.values()):
        if other is kind:
            continue
        words = f"is a {kind.kind}, not a {other.kind}; {name}.from_json reads it in Python"
        with pytest.raises(CheckpointError, match=words):
            other.from_json(file)
        with pytest.raises(CheckpointError, match=words):
            other.from_json(made[name].to_json())


def test_files_that_are_no_records_are_called_what_they_are(tmp_path):
    file = save(tmp_path / "x.moments", {"a": weights(3, 2)})
    comparison = {"first": {}, "second": {}, "matrices": []}
    for kind in some(KINDS.values()):
        with pytest.raises(CheckpointError, match="is a file of tensors, such as weights or mom"):
            kind.from_json(file)
        with pytest.raises(CheckpointError, match=r"is a comparison, not a .* prints it from the"):
            kind.from_json(json.dumps(comparison))
