"""How far a command is, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def show_progress(quiet: bool, total: int, doing: str = "auditing") -> Iterator[Any]:
    """A bar with the time left on stderr; nothing without a terminal."""
    with show_phases(quiet) as bar:
        yield bar and (lambda name, done, total_=total: bar(doing, name, done, total_))


@contextmanager
def show_phases(quiet: bool) -> Iterator[Any]:
    """The same for several things that are done one after the other."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    left = (TimeRemainingColumn(), TextColumn("left", style="progress.remaining"))
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), *left)
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(doing: str, name: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = bar.add_task(doing, total=total)
            bar.update(tasks[doing], completed=done, total=total)

        yield advance
