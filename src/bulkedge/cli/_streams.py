"""The standard streams of the command line: a reader that has left, and a disk that is full.

What a command has found, and written into files, must not depend on who reads its output.  So a
write to a standard stream never raises; what went wrong is reported once the command has ended.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from typing_extensions import override

STREAMS = ("stdout", "stderr")


class Guarded(io.FileIO):
    """An open descriptor that drops what is written to it from the first error on.

    Args:
        descriptor: It; it stays open.

    Attributes:
        full: Why nothing can be written, where somebody should know: a closed pipe is none, as the
            reader has left on purpose.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.full: str | None = None
        self._dropped = False

    @override
    def write(self, data: object, /) -> int:
        """Write bytes, or drop them.

        Args:
            data: The bytes.

        Returns:
            How many there are; fewer if the descriptor takes fewer at a time.
        """
        view = memoryview(data)  # pyright: ignore[reportArgumentType]
        if not self._dropped:
            try:
                return super().write(view)
            except BrokenPipeError:
                self._dropped = True
            except OSError as error:
                self._dropped, self.full = True, error.strerror
        return view.nbytes


@contextmanager
def guarded() -> Iterator[Guarded | None]:
    """Guard both standard streams while the block runs.

    Yields:
        What guards stdout; None where it is no file, as in a test or a notebook.
    """
    before = {name: getattr(sys, name) for name in STREAMS}
    found: list[Guarded | None] = []
    for name, stream in before.items():
        guard = _guard(stream)
        found.append(guard)
        if guard is not None:
            setattr(sys, name, _text(guard, stream))
        elif stream is None:  # it was closed before this process began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield found[0]
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def _guard(stream: TextIO | None) -> Guarded | None:
    """A guard of the descriptor that a stream writes to; None where it writes to none."""
    file = getattr(stream, "buffer", None)
    if type(file) is io.BufferedWriter:  # else PYTHONUNBUFFERED is set, or it is a stream of a test
        file = file.raw
    return Guarded(file.fileno()) if type(file) is io.FileIO else None


def _text(guard: Guarded, like: TextIO) -> io.TextIOWrapper:
    """Text for a guarded descriptor; a terminal that cannot show σ gets an escape."""
    return io.TextIOWrapper(
        io.BufferedWriter(guard),
        encoding=like.encoding,
        errors="backslashreplace",
        line_buffering=like is sys.stderr or guard.isatty(),
    )
