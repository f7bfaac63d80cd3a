"""The command as a user types it, in this process: an import of torch is saved for each call."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

from bulkedge.cli import main


@dataclass(frozen=True)
class Ended:
    """What a finished process would have left, named as in ``subprocess``."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: Any, **environment: str) -> Ended:
    """``bulkedge ARGUMENTS``, with its entry point, its streams and its exit code."""
    out, err = (_Stream() for _ in range(2))
    with (
        mock.patch.object(sys, "argv", ["bulkedge", *map(str, arguments)]),
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
    assert isinstance(code, int), code
    return Ended(code, out.text(), err.text())


class _Stream(io.TextIOWrapper):
    """A pipe of UTF-8."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def text(self) -> str:
        """What was written."""
        self.flush()
        return self.buffer.getvalue().decode()
