"""The folder of a frontier: whose points are in it, and what is finished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bulkedge._errors import CheckpointError, OutputError
from bulkedge.auditing import JOURNAL_NAME
from bulkedge.auditing.journal import Journal
from bulkedge.checkpoint.header import read_regular
from bulkedge.records.frontier import Measured

from .points import Point

INPUTS = "inputs.json"
"""The file that says which inputs the copies in a folder are made of."""
POINTS = "points.jsonl"
"""The journal of the evaluations: a line for each, as soon as it is finished."""
LOGS = "logs"
"""The folder of what the evaluations have printed."""
MOST = 2**20


class Folder:
    """A folder of copies, and of their numbers.

    Args:
        path: It; it need not exist.

    Raises:
        OutputError: If it is a file, or holds something that is no frontier.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if os.path.lexists(path) and not path.is_dir():
            raise OutputError(f"{path}: is a file; give a folder")
        used = path.is_dir() and any(path.iterdir())
        if used and not (path / INPUTS).is_file():
            raise OutputError(f"{path}: exists, and is not a frontier to resume; give another")

    @property
    def audit_journal(self) -> Path:
        """Where the audit of the input is kept."""
        return self.path / JOURNAL_NAME

    def claim(self, inputs: dict[str, Any]) -> None:
        """Say whose points the folder has; once said, it holds no others.

        Args:
            inputs: Everything that a copy depends on, but for its method.

        Raises:
            OutputError: If the points there are of other inputs, or it cannot be written.
        """
        file = self.path / INPUTS
        text = json.dumps(inputs, indent=2) + "\n"
        if not file.exists():
            write(file, text)
            return
        try:
            known = json.loads(read_regular(file, MOST))
        except (OSError, ValueError, CheckpointError):
            raise OutputError(f"{file}: damaged; give another folder") from None
        there = known if isinstance(known, dict) else {}
        if others := [name for name in inputs if there.get(name) != inputs[name]]:
            raise OutputError(
                f"{self.path}: holds points of another {others[0]}; give another folder, or remove "
                "this one"
            )

    def sweep(self, points: list[Point]) -> None:
        """Remove what a run that was killed has left half-written.

        Args:
            points: Whose copies these may be.
        """
        for point in points:
            for left in self.path.glob(f".{point.name}.*"):
                shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def journal(self) -> Iterator[Journal[Measured]]:
        """The journal of the evaluations, held while the block runs."""
        with Journal(self.path / POINTS, resume=True, kind=Measured) as book:
            yield book

    def log(self, name: str) -> Path:
        """Where the evaluation of a point prints, without an ending."""
        return self.path / LOGS / name


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Args:
        path: The file; one that exists is replaced.
        text: Its content.

    Raises:
        OutputError: If it cannot be written.
    """
    building = path.with_name(f".{path.name}.part")
    try:
        building.write_text(text, encoding="utf-8")
        os.replace(building, path)
    except OSError as error:
        building.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
