"""Stored lines, one cell or intervention each, and which process works on which job."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import where

Line = dict[str, Any]


class Store:
    """Files of JSON lines in a folder, which several processes append to.

    Args:
        folder: Where they lie.
        claims: Where processes say what they work on: no result.
    """

    def __init__(self, folder: Path, claims: Path) -> None:
        self.folder, self.claims = folder, claims
        folder.mkdir(parents=True, exist_ok=True)
        claims.mkdir(parents=True, exist_ok=True)

    def lines(self, name: str) -> list[Line]:
        """All of a file; a last line that was cut short is left out."""
        path = self.folder / f"{name}.jsonl"
        found = []
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    found.append(json.loads(line))
        return found

    def append(self, name: str, line: Line) -> None:
        """Add one line by one write, with the commit and the machine."""
        text = json.dumps(line | {"where": where()}, ensure_ascii=False) + "\n"
        path = self.folder / f"{name}.jsonl"
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":  # one was cut short
                os.ftruncate(handle, _last_end(handle, size))
            os.write(handle, text.encode())
        finally:
            os.close(handle)

    @contextmanager
    def claim(self, job: str) -> Iterator[bool]:
        """Whether this process may work on a job: no other does.

        The lock ends with the process, however that ends.
        """
        path = self.claims / job.replace("/", "_")
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            yield False
            return
        try:
            yield True
        finally:
            os.close(handle)


def _last_end(handle: int, size: int) -> int:
    """Where the last whole line ends."""
    return os.pread(handle, size, 0).rfind(b"\n") + 1
