"""Whoever reads the output of a command: its exit code and its files are those of the result."""

import contextlib
import io
import os
import shlex
import subprocess
import sys
from unittest import mock

import pytest
import torch

from bulkedge.cli import COMMANDS, main
from bulkedge.moments import Moments
from cases import gaussian, orthonormal
from commands import run
from helpers import save

CLEAN, FINDINGS, FAILURE = 0, 1, 2
NUMBERS = """import json; print(json.dumps(dict(task=1, kept=2)))"""

CALLS = {
    "audit": ["{base}", "{clean}", "-o", "{out}/a", "--csv", "{out}/a.csv", "--report",
              "{out}/a.html"],
    "audit with findings": ["{base}", "{found}", "-o", "{out}/a", "--json"],
    "audit of several": ["{base}", "{clean}", "{found}", "-o", "{out}/a"],
    "audit dry": ["{base}", "{clean}", "--dry-run"],
    "budget": ["{base}", "-k", "3", "-o", "{out}/b", "--csv", "{out}/b.csv"],
    "compare": ["{record}", "{record}", "-o", "{out}/c.json"],
    "frontier": ["{base}", "{found}", "-o", "{out}/f", "--moments", "{moments}", "--task-moments",
                 "{moments}", "--evaluate", "{evaluate}", "--scales", "0.5", "--strengths", "1"],
    "help": ["audit"],
    "inspect": ["{base}"],
    "merge": ["{part}", "-o", "{out}/m"],
    "moments": ["--help"],
    "repair": ["{base}", "{found}", "-o", "{out}/r", "--record", "{out}/r.json", "--report",
               "{out}/r.html"],
    "report": ["{record}", "-o", "-", "--format", "markdown"],
    "show": ["{record}"],
    "simulate": ["rank", "--set", "size=20", "--set", "repeats=1", "--set", "ranks=[1]",
                 "-o", "{out}/s", "--json"],
}  # fmt: skip


def net(W):
    """A layer called ``a`` with this weight."""
    layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False).double()
    layer.weight.data = W.clone()
    return torch.nn.ModuleDict({"a": layer})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two fine-tunes of a base, a record, a part of one, and moments."""
    folder = tmp_path_factory.mktemp("inputs")
    W0 = gaussian(60, 45)
    spike = 40 * orthonormal(60, 1, 1) @ orthonormal(45, 1, 2).mT
    made = {
        "base": save(folder / "base.safetensors", {"a.weight": W0}),
        "clean": save(folder / "clean.safetensors", {"a.weight": W0 + 1e-4}),
        "found": save(folder / "found.safetensors", {"a.weight": W0 + spike}),
        "record": folder / "record",
        "part": folder / "part",
        "moments": folder / "base.moments",
        "evaluate": shlex.join([sys.executable, "-c", NUMBERS]) + " {model}",
    }
    model = net(W0)
    with Moments(model) as moments, torch.no_grad():
        model["a"](gaussian(100, 45))
    moments.save(made["moments"])
    run("audit", made["base"], made["clean"], "-o", made["record"])
    run("audit", made["base"], made["clean"], "--shard", "1/1", "-o", made["part"])
    return made


def call(name, inputs, out):
    """The words of a call that writes into ``out``."""
    places = inputs | {"out": out}
    words = [
        str(places[word[1:-1]]) if word[1:-1] in places else word.replace("{out}", str(out))
        for word in CALLS[name]
    ]
    return [name.split()[0], *words]


def ended(words, descriptor):
    """The exit code and stderr of a command whose stdout is an open file, as Python opens it."""
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    out = open(descriptor, "w", encoding="utf-8")  # noqa: SIM115
    with (
        mock.patch.object(sys, "argv", ["bulkedge", *words]),
        mock.patch.object(sys, "stdout", out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as code,
    ):
        main()
    with contextlib.suppress(OSError):
        out.close()
    return code.value.code or 0, err.buffer.getvalue().decode()


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return write


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


def test_every_command_is_called():
    assert {name.split()[0] for name in CALLS} == {command.name for command in COMMANDS}


@pytest.fixture(scope="module")
def usual(inputs, tmp_path_factory):
    """What each call leaves where its output is read, computed once."""
    known = {}

    def of(name):
        if name not in known:
            out = tmp_path_factory.mktemp("read")
            result = run(*call(name, inputs, out))
            assert result.stdout, result.stderr
            known[name] = result.returncode, files(out)
        return known[name]

    return of


@pytest.mark.parametrize("name", CALLS)
def test_a_closed_pipe_changes_nothing(name, inputs, usual, tmp_path):
    code, written = usual(name)
    assert code == (FINDINGS if name in ("audit with findings", "audit of several") else CLEAN)
    found, told = ended(call(name, inputs, tmp_path), closed_pipe())
    assert (found, files(tmp_path)) == (code, written)
    assert "Broken pipe" not in told


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", CALLS)
def test_a_full_stdout_is_a_failure_with_every_file_there(name, inputs, usual, tmp_path):
    found, told = ended(call(name, inputs, tmp_path), full_disk())
    assert (found, files(tmp_path)) == (FAILURE, usual(name)[1])
    assert "bulkedge: stdout cannot be written (No space left on device)" in told.splitlines()


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("streams", "unbuffered"),
    [
        *((streams, "") for streams in ("| true", "2>&1 | true", ">&-", "2>&-", ">&- 2>&-")),
        ("| true", "1"),
    ],
)
def test_streams_of_a_process_that_nobody_reads(streams, unbuffered, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)  # as images for CI have it
    words = call("audit with findings", inputs, tmp_path)
    line = f"{shlex.join([sys.executable, '-m', 'bulkedge', *words])}; echo $? > {tmp_path}/code"
    shell = f"{{ {line}; }} {streams}"
    result = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0  # of the last program of the pipe
    assert (tmp_path / "code").read_text() == f"{FINDINGS}\n"
    assert (tmp_path / "a/record.json").is_file()
    assert "Traceback" not in result.stderr
    assert "Broken pipe" not in result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_of_a_process(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    words = [sys.executable, "-m", "bulkedge", *call("audit with findings", inputs, tmp_path)]
    with open("/dev/full", "w") as full:
        result = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == FAILURE
    assert "stdout cannot be written (No space left on device)" in result.stderr
