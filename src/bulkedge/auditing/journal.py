"""The journal of an audit or a budget: each row as soon as it is finished, one line of JSON.

A line is one write to a file that is only appended to, and it is on disk before the next matrix
begins: a kill at any moment loses the matrices in hand, no more.  Each line carries a key, a digest
of everything that its row depends on; only rows whose key is asked for are ever taken.  It also has
a digest of the row itself: a line that was edited, or damaged on the disk, is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol

from pydantic import ValidationError
from typing_extensions import TypeVar

from bulkedge import __version__
from bulkedge._errors import CheckpointError, OutputError, count
from bulkedge.comparison.plan import Comparison
from bulkedge.records.budget import BudgetRecord, MatrixBudget
from bulkedge.records.document import MAX_RECORD_BYTES, Document
from bulkedge.records.recipe import Recipe
from bulkedge.records.record import SCHEMA_VERSION, Record
from bulkedge.records.rows import Matrix
from bulkedge.records.source import Inputs

from .inputs import plain
from .lock import JOURNAL_NAME, lock

if TYPE_CHECKING:
    from typing_extensions import Self


class Row(Protocol):
    """What a journal keeps: a row of a record, which is tried again if its status is ``failed``."""

    @property
    def status(self) -> str:
        """Of the computation."""
        ...

    def model_dump_json(self) -> str:
        """The row as JSON on one line."""
        ...

    @classmethod
    def model_validate(cls, obj: Any) -> Self:
        """The row of some JSON values."""
        ...


R = TypeVar("R", bound=Row, default=Matrix)
D = TypeVar("D", bound=Document)

MOST_DAMAGED = 100
"""So many lines are looked at for one that can be read."""
HOLDERS: Mapping[type[Document], type[Row]] = {Record: Matrix, BudgetRecord: MatrixBudget}
"""The records whose rows are kept under the same name of a journal."""


def row_keys(
    comparisons: Sequence[Comparison],
    recipe: Recipe,
    inputs: Inputs,
    known: Mapping[Path, str],
) -> list[str]:
    """A digest of everything that each row depends on, the inputs by their content.

    Args:
        comparisons: What the rows are of.
        recipe: How they are computed.
        inputs: The two inputs with the digests of all their files.
        known: The digests by path.

    Returns:
        One key a comparison, 64 hexadecimal digits.
    """
    import torch

    common = {
        "schema": SCHEMA_VERSION,
        "bulkedge": __version__,
        "torch": torch.__version__,
        "recipe": recipe.model_dump(mode="json"),
        "inputs": [
            None if source is None else [file.sha256 for file in source.files]
            for source in (inputs.base, inputs.tuned, inputs.moments)
        ],
    }
    return [digest(common | {"comparison": plain(c, known)}) for c in comparisons]


@contextmanager
def open_journal(path: str | os.PathLike[str] | None, *, resume: bool) -> Iterator[Journal | None]:
    """The journal at ``path``, closed at the end; None without a path."""
    if path is None:
        yield None
        return
    with Journal(path, resume=resume) as journal:
        yield journal


def refuse_other_kind(folder: Path, kind: type[Document]) -> None:
    """Raise if a folder holds the record, or the journal, of a command of another kind.

    Args:
        folder: The folder.
        kind: The record that is to be written there.

    Raises:
        OutputError: If it does, and none of this kind.
    """
    if kind not in HOLDERS or not folder.is_dir() or (folder / kind.file_name).is_file():
        return
    journal = folder / JOURNAL_NAME
    for other, rows in HOLDERS.items():
        if other is kind:
            continue
        record = folder / other.file_name
        if record.is_file() or _is_of(journal, rows):
            found = record if record.is_file() else journal
            raise OutputError(
                f"{folder}: holds the {found.name} of `{other.made_by}`, "
                "which would lose its journal; give another folder"
            )


def finished_record(file: Path, kind: type[D]) -> D | None:
    """The record of a run that has ended, beside its journal.

    Args:
        file: Where it would be.
        kind: What it would be.

    Returns:
        The record; None where there is none, or a damaged one, with which nothing is lost.
    """
    if not file.is_file():
        return None
    try:
        return kind.from_json(file)
    except CheckpointError:
        return None


def _is_of(journal: Path, kind: type[Row]) -> bool:
    """Whether the first whole row of a journal is of a kind; False where it cannot be read."""
    try:
        with open(journal, "rb") as file:
            for line in islice(file, MOST_DAMAGED):
                if _parse(line, kind)[1] is not None:
                    return True
    except OSError:
        return False
    return False


class Journal(Generic[R]):
    """Rows on disk; a context manager that holds the file, and its lock, until it is left.

    Args:
        path: The file; its folder is made.
        resume: Whether to resume from what is there; else a new file takes its place.
        kind: The class of the rows.

    Attributes:
        path: The file.
        notes: What a reader should know of what was found there.

    Raises:
        OutputError: If the file cannot be written, is no regular file or too large to be a journal,
            or another audit writes it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resume: bool = False,
        kind: type[R] = Matrix,  # pyright: ignore[reportArgumentType]
    ) -> None:
        self.path, self.kind = Path(path), kind
        self.notes: list[str] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open(self.path, resume)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            self._lines = self._read() if resume else []
        except BaseException:
            os.close(self._file)
            raise

    def take(self, keys: Sequence[str]) -> dict[int, R]:
        """The rows that are there, by the position of their key; failed ones are tried again.

        Args:
            keys: From :func:`row_keys`.

        Returns:
            ``{position: row}``.
        """
        positions = {key: i for i, key in enumerate(keys)}
        rows: dict[int, R] = {}
        others = damaged = 0
        for line in self._lines:
            key, row = _parse(line, self.kind)
            if key is not None and key not in positions:
                self._refuse_other_rows(line, row)
                others += 1
            elif key is None or row is None:
                damaged += 1
            elif row.status != "failed":
                rows[positions[key]] = row
        if damaged:
            self.notes.append(f"{damaged} damaged lines ignored")
        if others:
            self.notes.append(
                f"{count(others, 'row')} of other inputs, recipes or versions ignored"
            )
        self.notes.append(f"{len(rows)} of {count(len(keys), 'matrix', 'matrices')} taken from it")
        return rows

    def _refuse_other_rows(self, line: bytes, row: R | None) -> None:
        """Raise for a line of a command of another kind: two of them share no journal."""
        if row is not None or self.kind not in HOLDERS.values():
            return
        for record, kind in HOLDERS.items():
            if kind is not self.kind and _parse(line, kind)[1] is not None:
                raise OutputError(
                    f"{self.path}: is the journal of `{record.made_by}`; give another file"
                )

    def append(self, key: str, row: R) -> None:
        """Write one row: one line, one write, on disk when this returns.

        Args:
            key: Its key.
            row: The row.

        Raises:
            OutputError: If the disk is full.
        """
        text = row.model_dump_json()
        line = f'{{"key":"{key}","sha256":"{digest(json.loads(text))}","row":{text}}}\n'.encode()
        try:
            written = os.write(self._file, line)
            os.fsync(self._file)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror})") from None
        if written != len(line):
            raise OutputError(f"{self.path}: cannot be written (the disk is full)")

    def __enter__(self) -> Journal[R]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def _read(self) -> list[bytes]:
        """The whole lines; what a kill or a full disk has cut short is cut off."""
        size = os.fstat(self._file).st_size
        if size > MAX_RECORD_BYTES:
            raise OutputError(
                f"{self.path}: has {size} bytes, expected at most {MAX_RECORD_BYTES} of a journal; "
                "remove it, or give another folder"
            )
        with open(os.dup(self._file), "rb") as file:
            file.seek(0)
            content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._file, whole)
            self.notes.append("a last line cut short was dropped")
        return content[:whole].splitlines()


def _open(path: Path, resume: bool) -> int:
    """The locked file to append to, never through a link; a new one unless it is resumed."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    if resume:
        return _open_locked(path, flags)
    # a new file, not the old one emptied: a link may lead to that, or an audit may write it
    old = _open_locked(path, os.O_RDONLY) if path.is_file() and not path.is_symlink() else None
    try:
        path.unlink(missing_ok=True)
        return _open_locked(path, flags | os.O_EXCL)
    except FileExistsError:
        raise _in_use(path) from None
    finally:
        if old is not None:
            os.close(old)


def _open_locked(path: Path, flags: int) -> int:
    """An open regular file that no other process has, and that still has this name."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    file = os.open(path, flags, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OutputError(f"{path}: expected a journal, got no regular file; remove it")
        if not lock(file) or not os.path.samestat(os.fstat(file), os.lstat(path)):
            raise _in_use(path)
    except BaseException:
        os.close(file)
        raise
    return file


def _in_use(path: Path) -> OutputError:
    return OutputError(f"{path}: another audit is writing it; give another folder")


def _parse(line: bytes, kind: type[R]) -> tuple[str | None, R | None]:
    """Key and row of a line, None for what is no such thing."""
    try:
        content = json.loads(line)
        key = content["key"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, None
    if not isinstance(key, str):
        return None, None
    try:
        row = content.get("row")
        whole = isinstance(row, dict) and content.get("sha256") == digest(row)
        return key, kind.model_validate(row) if whole else None
    except (ValidationError, ValueError, RecursionError):
        return key, None


def digest(content: dict[str, Any]) -> str:
    """A digest of plain values, 64 hexadecimal digits."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
