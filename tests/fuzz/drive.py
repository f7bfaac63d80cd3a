"""Open, plan and audit damaged inputs, one after another; a process of its own, short of memory.

    python tests/fuzz/drive.py START COUNT

prints one JSON object: how far the cases came, and every one that did what it must not.  A case is
its number, so that ``drive.py NUMBER 1`` does the same again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

SECONDS = 30  # a busy machine is slow, a hang is for ever
MEGABYTES = 768
LONGEST_MESSAGE = 10_000


class Hang(BaseException):
    """A case that took too long."""


def main(start: int, count: int) -> dict[str, Any]:
    """Run the cases ``start … start + count``."""
    import torch

    from fuzz.victims import VICTIMS

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    victims = {name: make() for name, make in VICTIMS.items()}
    for name in victims:  # healthy, before anything is damaged; what is loaded late is loaded now
        reached = run(victims[name], victims[name].files)
        assert reached == "audited", (name, reached)
    signal.signal(signal.SIGALRM, _hang)
    _limit_memory()
    reached, faults, slowest = Counter(), [], 0.0
    for number in range(start, start + count):
        clock = time.monotonic()
        try:
            reached[_case(number, victims)] += 1
        except (Exception, Hang) as error:
            told = "".join(traceback.format_exception(error)[-4:])
            faults.append(
                {"case": number, "error": f"{type(error).__name__}", "told": told[-3000:]}
            )
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        slowest = max(slowest, time.monotonic() - clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {
        "cases": count, "reached": dict(reached), "faults": faults,
        "slowest": round(slowest, 2), "peak_megabytes": peak,
    }  # fmt: skip


def _hang(*_: Any) -> None:
    raise Hang


def _limit_memory() -> None:
    """No more address space than now and a bit."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limit = now + MEGABYTES * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _case(number: int, victims: dict[str, Any]) -> str:
    from fuzz.mutate import mutate

    rng = Random(number)  # noqa: S311
    victim = victims[rng.choice(sorted(victims))]
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    files = mutate(victim.files, rng)
    return run(victim, files)


def run(victim: Any, files: Any) -> str:
    """Put the files down, and do with them whatever a user could."""
    with _folder() as name:
        folder = Path(name)
        for path, content in files.items():
            _put(folder / path, content)
        before = _listing(folder)
        reached = _use(folder / victim.base, folder / victim.tuned, victim.recipe)
        assert _listing(folder) == before, "an input was written to"
        return reached


def _folder() -> tempfile.TemporaryDirectory[str]:
    """One in memory, where there is such a place."""
    memory = "/dev/shm"  # noqa: S108
    return tempfile.TemporaryDirectory(dir=memory if os.path.isdir(memory) else None)


def _listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.lstat().st_mtime_ns) for p in folder.rglob("*") if not p.is_dir())


def _put(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content.kind == "link":
        path.symlink_to(content.target)
    elif content.kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir(exist_ok=True)


def _use(base: Path, tuned: Path, settings: dict[str, Any]) -> str:
    """How far an audit gets: refused, planned, audited; whatever is said is harmless to print."""
    from bulkedge import BulkedgeError, Recipe
    from bulkedge.auditing import run_plan
    from bulkedge.comparison import make_plan

    for path in (base, tuned):
        _inspect(path)
        _read(path)
    if "method" in Recipe.model_fields:  # small matrices are judged by SVDs unless told otherwise
        settings = {"method": "certified", **settings}
    recipe = Recipe(top_k=2, side="both", **settings)
    try:
        plan = make_plan(base, tuned, recipe)
    except BulkedgeError as error:
        _check_message(error)
        return "refused"
    try:
        record = run_plan(plan, recipe)
    except BulkedgeError as error:
        _check_message(error)
        return "planned"
    _check_record(record)
    if not record.summary.audited:
        return "planned"
    _repair(base, tuned, recipe)
    return "audited"


def _repair(base: Path, tuned: Path, recipe: Any) -> None:
    """A repaired copy that can be audited, or an error and no copy."""
    from rich.console import Console

    from bulkedge import BulkedgeError, Project, Scale, repair
    from bulkedge.report import print_repair

    for method in (Scale(0.5), Project(rounds=1)):
        with _folder() as place:
            out = Path(place) / "out"
            try:
                record = repair(base, tuned, out, method=method, recipe=recipe)
            except BulkedgeError as error:
                _check_message(error)
                assert not os.listdir(place)
                continue
            assert os.listdir(place) == ([] if record.output is None else ["out"])
            told = io.StringIO()
            print_repair(record, Console(file=told, width=160))
            _check_printable(told.getvalue())
            if record.after is not None:
                assert [row.name for row in record.after.matrices] == [
                    row.name for row in record.before.matrices
                ]


def _read(path: Path) -> None:
    """Read every tensor of a checkpoint."""
    from bulkedge import BulkedgeError
    from bulkedge.checkpoint import open_checkpoint, read_tensor

    try:
        infos = open_checkpoint(path).tensors.values()
    except BulkedgeError as error:
        _check_message(error)
        return
    for info in infos:
        try:
            assert tuple(read_tensor(info).shape) == info.shape
        except BulkedgeError as error:
            _check_message(error)


def _inspect(path: Path) -> None:
    """``bulkedge inspect``, both ways."""
    from bulkedge import BulkedgeError
    from bulkedge.cli import cli

    for more in ([], ["--json"]):
        told = io.StringIO()
        try:
            with contextlib.redirect_stdout(told):
                cli(["inspect", str(path), *more], standalone_mode=False)
        except BulkedgeError as error:
            _check_message(error)
        else:
            _check_printable(told.getvalue())
            if more:
                json.loads(told.getvalue())


def _check_message(error: Exception) -> None:
    from bulkedge._errors import printable

    assert 0 < len(str(error)) < LONGEST_MESSAGE, f"a message of {len(str(error))} characters"
    printable(str(error)).encode()


def _check_printable(text: str) -> None:
    bad = {c for c in text if c != "\n" and not c.isprintable()}
    assert not bad, f"{bad!r} printed"


def _check_record(record: Any) -> None:
    """It survives the disk, and every view of it is harmless."""
    from rich.console import Console

    from bulkedge import Record
    from bulkedge.report import print_record

    told = io.StringIO()
    print_record(record, Console(file=told, width=160))
    _check_printable(told.getvalue())
    assert Record.model_validate_json(record.to_json()) == record
    for matrix in record.matrices:
        assert matrix.status != "failed" or "Memory" not in (matrix.note or ""), matrix.note


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2])), indent=1))
