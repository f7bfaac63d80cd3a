"""Locks on files and folders: what one command writes, no other replaces meanwhile.

The locks are the kernel's (``flock``), on the journal and on the folder itself: they end with the
process that holds them, however it ends, and leave no file behind.  Where they are not to be had,
on Windows and on some network file systems, commands go without.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bulkedge._errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

JOURNAL_NAME = "journal.jsonl"

_held: set[tuple[int, int]] = set()
"""The folders that this process holds: a second lock of its own would be in its way."""


def lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file or folder until it is closed.

    Args:
        descriptor: It.
        shared: Whether others may have a shared lock, too.

    Returns:
        False where another process holds it; True also where there are no locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def hold(folder: Path | None) -> Iterator[None]:
    """Keep other commands out of a folder while the block runs.

    Args:
        folder: It is made; nothing is done for None.

    Yields:
        Nothing.

    Raises:
        OutputError: If another process writes into it, or it cannot be made.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror})") from None
    descriptor, place = _open(folder), _place(folder)
    try:
        if not (descriptor is None or lock(descriptor)) or _is_locked(folder / JOURNAL_NAME):
            raise OutputError(_in_use(folder))
        _held.add(place)
        try:
            yield
        finally:
            _held.discard(place)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def refuse_held(folder: Path) -> None:
    """Raise if another process writes into a folder; the folder is left as it is.

    Args:
        folder: The folder of a file to be written.

    Raises:
        OutputError: If it does.
    """
    if not folder.is_dir() or _place(folder) in _held:
        return
    if _is_locked(folder) or _is_locked(folder / JOURNAL_NAME):
        raise OutputError(_in_use(folder))


def _in_use(folder: Path) -> str:
    return (
        f"{folder}: another bulkedge command is writing into it; wait until it has finished, or "
        "give another folder"
    )


def _is_locked(path: Path) -> bool:
    """Whether another process holds a file or a folder; one that is not there is free."""
    descriptor = _open(path)
    if descriptor is None:
        return False
    try:
        return not lock(descriptor, shared=True)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int | None:
    """A file or folder to lock, None where it cannot be opened: then nothing holds it."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        return os.open(path, flags)
    except OSError:
        return None


def _place(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
