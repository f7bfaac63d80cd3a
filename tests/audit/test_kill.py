"""An audit killed at random moments, again and again, leaves the record of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bulkedge
from bulkedge import Record
from helpers import save, weights

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs process groups")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Many small matrices, so that a kill often falls in the middle of something."""
    folder = tmp_path_factory.mktemp("inputs")
    base = {f"l{i:03}.weight": weights(60 + i % 5, 50, seed=i) for i in range(160)}
    tuned = {name: W + 0.1 * weights(*W.shape, seed=1000) for name, W in base.items()}
    return save(folder / "b.safetensors", base), save(folder / "t.safetensors", tuned)


def command(inputs, out, jobs):
    options = ["-o", out, "--resume", "-j", jobs, "--fail-on", "never", "-q"]
    return [sys.executable, "-m", "bulkedge", "audit", *map(str, [*inputs, *options])]


def rows(out):
    journal = out / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def start_and_kill(inputs, out, jobs, wait, *, anywhere):
    """Start; wait until a row is written, or not; then a while; kill the group.  The exit code."""
    before = rows(out)
    process = subprocess.Popen(
        command(inputs, out, jobs),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and rows(out) == before and not anywhere:
        time.sleep(0.002)
    time.sleep(wait)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    error = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), error
    return process.returncode


def bare(out):
    return json.loads((out / "record.json").read_text()) | {"run": None}


def kill_and_finish(inputs, folder, jobs, times, whole, longest):
    """Kill it so many times, in a new folder whenever it came to its end; then let it."""
    draw = random.Random(7)  # noqa: S311
    killed = audits = 0
    while killed < times:
        out = folder / str(audits)
        anywhere = killed % 3 == 2  # often before the first row: imports, digests, workers' start
        wait = draw.uniform(0, 5 if anywhere else longest)
        if start_and_kill(inputs, out, jobs, wait, anywhere=anywhere) == 0:
            assert bare(out) == whole
            audits += 1
        else:
            killed += 1
            assert not (out / "record.json").exists()
    subprocess.run(command(inputs, out, jobs), check=True, stdout=subprocess.DEVNULL)
    assert bare(out) == whole
    return Record.from_json(out / "record.json").run.resumed


@pytest.fixture(scope="module")
def whole(inputs):
    return json.loads(bulkedge.audit(*inputs).to_json()) | {"run": None}


def test_killed_and_resumed(inputs, whole, tmp_path):
    assert kill_and_finish(inputs, tmp_path, 1, 2, whole, longest=0.2) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_twenty_times_and_resumed(jobs, inputs, whole, tmp_path):
    kill_and_finish(inputs, tmp_path, jobs, 20, whole, longest=0.05)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="counts processes in /proc")
def test_workers_end_with_their_parent(inputs, tmp_path):
    """Killed alone, as the kernel does for want of memory, it leaves nobody behind."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(inputs, out, 2), stdout=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and rows(out) == 0:
        time.sleep(0.01)
    assert len(members(process.pid)) >= 3
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert members(process.pid) == []


def members(group):
    """The living processes of a group: in /proc/PID/stat the state follows the name's bracket."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # ended meanwhile
            continue
        if int(number) == group and state != "Z":
            found.append(path)
    return found


@pytest.mark.slow
def test_a_killed_worker_is_told_and_its_matrix_computed_later(inputs, whole, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(inputs, out, 2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and rows(out) == 0:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert "a worker process died (signal 9) on tensor 'l" in error
    assert f"kept in {out / 'journal.jsonl'}; --resume" in error
    subprocess.run(command(inputs, out, 2), check=True, stdout=subprocess.DEVNULL)
    assert bare(out) == whole
