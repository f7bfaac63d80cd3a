"""The journal: what it keeps, what it takes, and whatever may lie in its place."""

import json
import multiprocessing
import os
import threading

import pytest
import torch

import bulkedge
from bulkedge import BulkedgeError, InputError, OutputError, Recipe
from bulkedge.auditing import inputs as inputs_module
from bulkedge.auditing import journal as journal_module
from bulkedge.auditing.inputs import Watch, digests, files_of, plain
from bulkedge.auditing.journal import Journal, row_keys
from bulkedge.comparison import make_plan
from cases import gaussian, orthonormal
from helpers import save, save_adapter, weights


@pytest.fixture
def pair(tmp_path):
    """Four matrices, one with a new direction, one unchanged, one not finite."""
    base = {f"l{i}.weight": gaussian(30 + i, 20) for i in range(4)}
    tuned = {name: W + 1e-3 for name, W in base.items()}
    tuned["l0.weight"] = base["l0.weight"] + 20 * orthonormal(30, 1, 1) @ orthonormal(20, 1, 2).mT
    tuned["l1.weight"] = base["l1.weight"]
    tuned["l2.weight"] = torch.full((32, 20), torch.nan, dtype=torch.float64)
    return save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)


def facts(record):
    return record.model_dump(exclude={"run"})


def resumed(pair, path, **options):
    """The record, and what was said of the journal."""
    said = []
    record = bulkedge.audit(*pair, journal=path, resume=True, notice=said.append, **options)
    return record, [line.partition(": ")[2] for line in said]


def test_one_line_a_matrix_and_the_record_is_the_same(pair, tmp_path):
    plain_record = bulkedge.audit(*pair)
    path = tmp_path / "deep/journal.jsonl"
    record = bulkedge.audit(*pair, journal=path)
    assert facts(record) == facts(plain_record)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(lines) == len({line["key"] for line in lines}) == 4
    assert [line["row"] for line in lines] == json.loads(record.to_json())["matrices"]


@pytest.mark.parametrize("kept", range(5))
def test_a_resumed_record_is_that_of_an_uninterrupted_audit(kept, pair, tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    whole = bulkedge.audit(*pair, journal=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[4 - kept :]))
    counted = []
    compute = bulkedge.auditing.engine.local.audit_matrix
    monkeypatch.setattr(
        "bulkedge.auditing.engine.local.audit_matrix",
        lambda *a: counted.append(a[0].base.name) or compute(*a),
    )
    record, said = resumed(pair, path)
    assert record.to_json().split('"run"')[0] == whole.to_json().split('"run"')[0]
    assert counted == [f"l{i}.weight" for i in range(4 - kept)]
    assert record.run.resumed == kept
    assert said == [f"{kept} of 4 matrices taken from it"]
    assert sorted(path.read_bytes().splitlines(True)) == sorted(lines)


def test_progress_counts_what_was_taken(pair, tmp_path):
    path = tmp_path / "journal.jsonl"
    bulkedge.audit(*pair, journal=path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    calls = []
    bulkedge.audit(*pair, journal=path, resume=True, progress=lambda *call: calls.append(call))
    assert calls == [("l3.weight", 4, 4)]


@pytest.mark.parametrize("cut", [1, 2, 40, 300])
def test_a_torn_last_line_is_dropped_and_computed_again(cut, pair, tmp_path):
    path = tmp_path / "journal.jsonl"
    whole = bulkedge.audit(*pair, journal=path)
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    record, said = resumed(pair, path)
    assert facts(record) == facts(whole)
    assert said == ["a last line cut short was dropped", "3 of 4 matrices taken from it"]
    assert path.read_bytes() == content


def test_damaged_lines_are_computed_again(pair, tmp_path):
    path = tmp_path / "journal.jsonl"
    whole = bulkedge.audit(*pair, journal=path)
    lines = path.read_bytes().splitlines()
    known = json.loads(lines[3])
    damaged = [
        b"\0" * 100, b"[]", b'"key"', b"{}", b"\xff", b"[" * 5000, b'{"key": 3, "row": {}}',
        json.dumps(known | {"row": {"name": "x"}}).encode(),
        json.dumps(known | {"row": known["row"] | {"passes": 99}}).encode(),  # edited by hand
        json.dumps({name: known[name] for name in ("key", "row")}).encode(),
        json.dumps(known | {"row": None}).encode(), json.dumps({"key": known["key"]}).encode(),
    ]  # fmt: skip
    path.write_bytes(b"\n".join([*lines[:3], *damaged, b""]))
    record, said = resumed(pair, path)
    assert facts(record) == facts(whole)
    assert said == [f"{len(damaged)} damaged lines ignored", "3 of 4 matrices taken from it"]


def test_rows_of_other_recipes_are_left_alone(pair, tmp_path):
    path = tmp_path / "journal.jsonl"
    bulkedge.audit(*pair, journal=path)
    record, said = resumed(pair, path, recipe=Recipe(top_k=3))
    assert facts(record) == facts(bulkedge.audit(*pair, recipe=Recipe(top_k=3)))
    ignored = "4 rows of other inputs, recipes or versions ignored"
    assert said == [ignored, "0 of 4 matrices taken from it"]
    assert resumed(pair, path)[1][-1] == "4 of 4 matrices taken from it"  # they are still there


def test_rows_of_other_contents_or_versions_are_not_taken(pair, tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    bulkedge.audit(*pair, journal=path)
    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "__version__", "9.9")
        assert resumed(pair, path)[1][-1] == "0 of 4 matrices taken from it"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        assert resumed(pair, path)[1][-1] == "0 of 4 matrices taken from it"
    changed = {f"l{i}.weight": gaussian(30 + i, 20) for i in range(4)}
    save(pair[1], changed)
    assert resumed(pair, path)[1][-1] == "0 of 4 matrices taken from it"


def test_inputs_may_move(pair, tmp_path):
    path = tmp_path / "journal.jsonl"
    bulkedge.audit(*pair, journal=path)
    (tmp_path / "elsewhere").mkdir()
    moved = [file.rename(tmp_path / "elsewhere" / file.name) for file in pair]
    record, said = resumed(moved, path)
    assert said == ["4 of 4 matrices taken from it"]
    assert facts(record) == facts(bulkedge.audit(*moved))


def test_keys_tell_comparisons_apart(tmp_path):
    """Everything that a row is computed from: scale, factors, transpose, name."""
    base = save(tmp_path / "b.safetensors", {"a.weight": weights(9, 9), "b.weight": weights(9, 9)})
    tensors = {
        f"base_model.model.{module}.lora_{factor}.weight": weights(*shape)
        for module in "ab"
        for factor, shape in {"A": (2, 9), "B": (9, 2)}.items()
    }
    found = set()
    for number, changes in enumerate(({}, {"lora_alpha": 5}, {"fan_in_fan_out": True})):
        adapter = save_adapter(tmp_path / str(number), tensors, **changes)
        plan = make_plan(base, adapter, Recipe())
        known = dict.fromkeys(Watch(plan).digests, "0" * 64)  # even where the digests agree
        keys = row_keys(plan.comparisons, Recipe(), Watch(plan).inputs, known)
        assert keys == row_keys(plan.comparisons, Recipe(), Watch(plan).inputs, known)
        assert {file.name for file in files_of(plan.comparisons[0])} == {
            "b.safetensors", "adapter_model.safetensors",
        }  # fmt: skip
        found |= set(keys)
    assert len(found) == 6


def test_a_comparison_of_unknown_parts_has_no_key():
    with pytest.raises(TypeError, match=r"expected plain values in a comparison, got set"):
        plain({"x": ({1, 2},)}, {})


def test_failed_matrices_are_tried_again(pair, tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise MemoryError("for once")

        patch.setattr("bulkedge.auditing.matrix.load", fail)
        record = bulkedge.audit(*pair, journal=path)
        assert {row.status for row in record.matrices} == {"failed"}
    record, said = resumed(pair, path)
    assert said == ["0 of 4 matrices taken from it"]
    assert facts(record) == facts(bulkedge.audit(*pair))
    assert resumed(pair, path)[1] == ["4 of 4 matrices taken from it"]


def test_without_resume_a_new_journal_takes_the_place(pair, tmp_path):
    path = tmp_path / "journal.jsonl"
    victim = tmp_path / "victim"
    victim.write_text("precious\n")
    path.symlink_to(victim)
    bulkedge.audit(*pair, journal=path)
    assert victim.read_text() == "precious\n"
    assert not path.is_symlink()
    assert len(path.read_bytes().splitlines()) == 4


def test_a_file_that_changes_leaves_no_row_behind(pair, tmp_path, monkeypatch):
    """The row of what was read after the change, under the key of what was there before it."""
    path = tmp_path / "journal.jsonl"
    compute = bulkedge.auditing.engine.local.audit_matrix

    def change(comparison, recipe):
        if comparison.base.name == "l2.weight":
            os.utime(pair[0], ns=(1, 1))
        return compute(comparison, recipe)

    monkeypatch.setattr("bulkedge.auditing.engine.local.audit_matrix", change)
    with pytest.raises(bulkedge.CheckpointError, match=r"was changed during the audit"):
        bulkedge.audit(*pair, journal=path)
    names = [json.loads(line)["row"]["name"] for line in path.read_bytes().splitlines()]
    assert names == ["l0.weight", "l1.weight"]


# ---- places where no journal can be


def test_resume_needs_a_journal(pair):
    with pytest.raises(InputError, match=r"expected the journal to resume from, got none"):
        bulkedge.audit(*pair, resume=True)


def test_links_and_pipes_are_not_written_to(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match=r"link: cannot be written"):
        Journal(tmp_path / "link", resume=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match=r"expected a journal, got no regular file"):
        Journal(tmp_path / "pipe", resume=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"folder: cannot be written"):
        Journal(tmp_path / "folder")
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_file_too_large_for_a_journal_is_not_read(tmp_path):
    path = tmp_path / "journal.jsonl"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole, which takes no room on the disk
    message = r"journal.jsonl: has 1099511627776 bytes, expected at most 1073741824 .* remove it"
    with pytest.raises(OutputError, match=message):
        Journal(path, resume=True)
    assert path.stat().st_size == 2**40
    Journal(path).__exit__(None, None, None)  # without --resume a new one takes its place
    assert path.stat().st_size == 0


def test_two_audits_do_not_share_a_journal(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path):
        before = path.stat()
        for resume in (True, False):
            with pytest.raises(OutputError, match=r"another audit is writing it; give another"):
                Journal(path, resume=resume)
            assert os.path.samestat(before, path.stat())
    Journal(path, resume=True).__exit__(None, None, None)


def test_a_journal_that_another_process_puts_in_its_place_meanwhile(tmp_path, monkeypatch):
    """Between the opening and the lock, and between the removal and the new file."""
    path, other = tmp_path / "journal.jsonl", tmp_path / "other"
    path.touch()

    def replaced(_):
        other.write_text("theirs")
        other.replace(path)
        return True

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "lock", replaced)
        for resume in (True, False):
            with pytest.raises(OutputError, match=r"another audit is writing it"):
                Journal(path, resume=resume)
            assert path.read_text() == "theirs"
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "unlink", lambda *_, **__: None)
        with pytest.raises(OutputError, match=r"another audit is writing it"):
            Journal(path)
    assert path.read_text() == "theirs"


def test_a_full_disk_ends_the_audit_at_once(pair, tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OutputError, match=r"cannot be written .No space left"):
            bulkedge.audit(*pair, journal=path)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr("os.write", lambda file, data: write(file, data[:-9]))
        with pytest.raises(OutputError, match=r"cannot be written .the disk is full"):
            bulkedge.audit(*pair, journal=path)
    assert resumed(pair, path)[1][0] == "a last line cut short was dropped"


def append_many(path, name, barrier):
    journal_module.lock = lambda _: True  # in a process of its own
    with Journal.__new__(Journal) as journal:
        journal.path, journal._file = path, journal_module._open(path, True)
        barrier.wait(timeout=60)
        for _ in range(200):
            os.write(journal._file, name.encode() * 4000 + b"\n")


def test_appends_of_two_processes_do_not_mix(tmp_path):
    """On a file system without locks: a line is one write at the end, whoever else writes."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    path = tmp_path / "journal.jsonl"
    writers = [context.Process(target=append_many, args=(path, n, barrier)) for n in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    lines = path.read_bytes().splitlines()
    assert sorted(set(lines)) == [b"a" * 4000, b"b" * 4000]
    assert len(lines) == 400


# ---- digests


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_an_input_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(bulkedge.CheckpointError, match=r"pipe: cannot be read .not a regular file"):
        inputs_module._sha256(tmp_path / "pipe", threading.Event())  # here: a thread is not killed


def test_each_file_is_read_once(tmp_path, monkeypatch):
    files = [tmp_path / f"{i}" for i in range(6)]
    for file in files:
        file.write_bytes(file.name.encode() * 3_000_000)
    reads = []
    sha256 = inputs_module._sha256
    monkeypatch.setattr(
        inputs_module, "_sha256", lambda file, stop: reads.append(file) or sha256(file, stop)
    )
    found = digests([*files, *files])
    assert sorted(reads) == files
    import hashlib

    assert found == {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    with pytest.raises(BulkedgeError, match=r"nowhere: cannot be read"):
        digests([*files, tmp_path / "nowhere"])
