"""A folder that a command writes into is left alone by every other one."""

import json
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

import bulkedge
from bulkedge import OutputError, Shard
from bulkedge.auditing import hold, refuse_held
from bulkedge.auditing import lock as lock_module
from bulkedge.auditing.journal import Journal
from bulkedge.cli import cli
from helpers import save, weights

pytest.importorskip("fcntl")

HOLD = """
import sys
from pathlib import Path
from bulkedge.auditing import hold
from bulkedge.auditing.journal import Journal
while line := sys.stdin.readline():
    kind, _, name = line.rstrip().partition(" ")
    folder = Path(name)
    with hold(folder) if kind == "folder" else Journal(folder / "journal.jsonl"):
        print("held", flush=True)
        sys.stdin.readline()
    print("let go", flush=True)
"""
IN_USE = "another bulkedge command is writing into it; wait until it has finished, or give another"


def start():
    """Another process, which can hold what a command holds."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", HOLD], stdin=pipe, stdout=pipe, text=True)


def ask(process, line, answer):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    assert process.stdout.readline() == f"{answer}\n"


def stop(process, how=signal.SIGKILL):
    process.send_signal(how)
    process.wait(60)
    process.stdin.close()
    process.stdout.close()


@pytest.fixture(scope="module")
def other():
    """One for all tests that only need somebody else."""
    process = start()
    yield process
    stop(process)


@pytest.fixture(params=["folder", "journal"])
def held(request, other, tmp_path):
    """A folder that another process holds, as a command does, or the journal in it."""
    folder = tmp_path / "out"
    folder.mkdir()
    ask(other, f"{request.param} {folder}", "held")
    (folder / "record.json").write_text("theirs")
    yield folder
    ask(other, "enough", "let go")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two inputs, the folder of an audit and that of a part of one."""
    folder = tmp_path_factory.mktemp("made")
    base = save(folder / "b.safetensors", {"w": weights(8, 8)})
    tuned = save(folder / "t.safetensors", {"w": weights(8, 8, seed=1)})
    record = bulkedge.audit(base, tuned, recipe={"top_k": 2})
    part = bulkedge.audit(base, tuned, recipe={"top_k": 2}, shard=Shard(1, 1))
    for name, found in (("whole", record), ("part", part)):
        (folder / name).mkdir()
        (folder / name / "record.json").write_text(found.to_json())
    return folder


COMMANDS = {
    "audit": "audit {both} -o {out} --force",
    "audit resumed": "audit {both} -o {out} --resume",
    "audit by another name": "audit {both} -o {out}/../out --force",
    "audit --csv": "audit {both} --csv {out}/x.csv --force",
    "audit --report": "audit {both} --report {out}/x.md --force",
    "merge": "merge {made}/part -o {out} --force",
    "merge --csv": "merge {made}/part --csv {out}/record.json --force",
    "report": "report {made}/whole -o {out}/journal.jsonl --format html --force",
    "report a new file": "report {made}/whole -o {out}/x.html",
    "repair --record": "repair {both} --dry-run --force "
    "--record {out}/record.json",
    "repair --report": "repair {both} --dry-run --force "
    "--report {out}/x.html",
    "simulate": "simulate transition -o {out} --force",
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_every_command_leaves_a_folder_in_use_alone(case, held, made):
    (held / "journal.jsonl").touch()
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in held.iterdir()}
    both = f"{made}/b.safetensors {made}/t.safetensors"
    command = COMMANDS[case].format(made=made, both=both, out=held).split()
    found = CliRunner().invoke(cli, command)
    assert isinstance(found.exception, OutputError)
    assert IN_USE in str(found.exception)
    assert str(held) in str(found.exception).replace("/../out", "")
    after = {path.name: (path.stat().st_ino, path.read_bytes()) for path in held.iterdir()}
    assert after == before


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("folder", signal.SIGKILL),
        ("journal", signal.SIGKILL),
        ("folder", signal.SIGINT),
        ("journal", signal.SIGTERM),
    ],
)
def test_a_dead_process_holds_nothing(kind, how, made, tmp_path):
    out = tmp_path / "out"
    process = start()
    ask(process, f"{kind} {out if kind == 'folder' else tmp_path}", "held")
    stop(process, how)
    command = ["audit", str(made / "b.safetensors"), str(made / "t.safetensors"), "-o", str(out)]
    found = CliRunner().invoke(cli, [*command, "--fail-on", "never"])
    assert found.exit_code == 0
    again = CliRunner().invoke(cli, [*command, "--fail-on", "never", "--force"])
    assert again.exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["journal.jsonl", "record.json"]


def test_a_command_writes_its_other_files_into_its_own_folder(made, tmp_path):
    out = tmp_path / "out"
    files = ["--csv", str(out / "x.csv"), "--report", str(out / "x.html")]
    inputs = [str(made / "b.safetensors"), str(made / "t.safetensors")]
    for more in ([], ["--force"]):
        command = ["audit", *inputs, "-o", str(out), *files, "--fail-on", "never", *more]
        assert CliRunner().invoke(cli, command).exit_code == 0
        assert json.loads((out / "record.json").read_text())["summary"]["matrices"] == 1
    with hold(out):
        refuse_held(out)


def test_commands_that_only_write_files_are_not_in_each_others_way(made, tmp_path):
    command = [sys.executable, "-m", "bulkedge", "report", str(made / "whole"), "-o"]
    both = [subprocess.Popen([*command, str(tmp_path / f"{i}.html")]) for i in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]


def test_an_audit_that_runs_keeps_its_journal(made, tmp_path):
    """The whole way, between two commands: the first is stopped in the middle."""
    base = {f"l{i:03}.weight": weights(60, 50, seed=i) for i in range(300)}
    base_file = save(tmp_path / "b.safetensors", base)
    tuned = save(tmp_path / "t.safetensors", {name: W + 0.01 for name, W in base.items()})
    out = tmp_path / "out"
    command = ["audit", str(base_file), str(tuned), "-o", str(out), "--fail-on", "never", "-q"]
    process = subprocess.Popen([sys.executable, "-m", "bulkedge", *command])
    while process.poll() is None and not (out / "journal.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    try:
        assert not (out / "record.json").exists()  # it is in the middle, indeed
        inode = (out / "journal.jsonl").stat().st_ino
        found = CliRunner().invoke(cli, [*command, "--force"])
        assert IN_USE in str(found.exception)
        assert (out / "journal.jsonl").stat().st_ino == inode
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait(300) == 0
    assert (out / "journal.jsonl").read_bytes().count(b"\n") == 300


def test_without_locks_commands_go_on(monkeypatch, tmp_path):
    """On Windows there are none, and some file systems refuse."""
    with Journal(tmp_path / "journal.jsonl"), monkeypatch.context() as patch:
        patch.setattr(lock_module, "fcntl", None)
        with hold(tmp_path), hold(tmp_path):
            assert refuse_held(tmp_path) is None

    def refused(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock_module.fcntl, "flock", refused)
    with hold(tmp_path), hold(tmp_path):
        assert refuse_held(tmp_path) is None


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    message = r"file/out: cannot be made \(Not a directory\)"
    with pytest.raises(OutputError, match=message), hold(tmp_path / "file/out"):
        pytest.fail("it was made")
