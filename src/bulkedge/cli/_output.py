"""What the commands share: exit codes, streams, files, progress."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bulkedge._errors import OutputError

if TYPE_CHECKING:
    from bulkedge._audit import Record

CLEAN, FINDINGS, FAILURE, INTERRUPTED = 0, 1, 2, 130
RECORD_NAME = "record.json"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all; a link in its place is replaced, not followed."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None


@contextmanager
def show_progress(quiet: bool, total: int, doing: str = "auditing") -> Iterator[Any]:
    """A bar with the time left on stderr; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (doing, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda name, done, total: bar.update(task, completed=done)


def show(record: Record, options: dict[str, Any]) -> None:
    """The record on stdout, as JSON or as a table."""
    if options["as_json"]:
        text = record.to_json()
        if sys.stdout.isatty():  # names may hold characters that act on a terminal
            text = json.dumps(json.loads(text), indent=2) + "\n"
        click.echo(text, nl=False)
    else:
        from rich.console import Console

        from bulkedge.report import print_record

        console = Console()
        if not console.is_terminal:  # a pipe has no edge to fold at
            console = Console(width=160)
        print_record(record, console, brief=options["quiet"])
    sys.stdout.flush()  # a full disk must be noticed here, not at exit


def exit_code(record: Record, fail_on: str) -> int:
    """A linter's exit code; what could not be judged outranks what was."""
    from bulkedge.intruder import Verdict
    from bulkedge.report import findings

    if not record.summary.complete:
        return FAILURE
    if fail_on != "never" and findings(record, Verdict(fail_on)):
        return FINDINGS
    return CLEAN


def one_thread() -> None:
    """One thread a job, unless the user has said how many: two on a busy machine are slower."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
