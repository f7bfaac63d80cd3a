"""What every record is: rows that validate, written as JSON and read back."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

from bulkedge._errors import CheckpointError, InputError
from bulkedge.checkpoint.header import read_regular

from .frame import frame_of
from .row import Row

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_RECORD_BYTES = 2**30
NAMED = 10
"""So many of a folder's subfolders are named in a message."""


class Document(Row):
    """A record that is a file of its own.

    Attributes:
        kind: What a message calls it.
        file_name: What it is called in the folder that it is written to.
        made_by: The command that writes such a folder.
        rows_in: The field with the rows that a data frame has.
    """

    kind: ClassVar[str]
    file_name: ClassVar[str]
    made_by: ClassVar[str]
    rows_in: ClassVar[str] = "matrices"

    def to_json(self) -> str:
        """The record as indented JSON text with a final newline."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Self:
        """Read a record back.

        Args:
            source: A file that :meth:`to_json` text was written to, the output folder of the
                command that holds it, or the text itself: a string that begins with ``{`` is taken
                for text.

        Returns:
            The record.

        Raises:
            CheckpointError: If the file is missing, or is not a record of this schema.
            InputError: If ``source`` is neither a path nor a text, or is empty.
        """
        if not isinstance(source, (str, os.PathLike)) or not str(source).strip():
            what = "an empty text" if isinstance(source, str) else type(source).__name__
            raise InputError(f"expected the path of a {cls.kind}, or its JSON text, got {what}")
        is_text = isinstance(source, str) and source.lstrip()[:1] == "{"
        file = Path() if is_text else file_of(source, (cls,))
        name = "the text given" if is_text else str(file)
        try:
            text = (
                str(source).encode("utf-8", "surrogatepass")
                if is_text
                else read_regular(file, MAX_RECORD_BYTES)
            )
        except OSError as error:
            raise CheckpointError(
                f"{name}: cannot be read ({error.strerror}); give the file of a {cls.kind}"
            ) from None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            if told := _what_else(text, cls):
                what, remedy = told
                raise CheckpointError(f"{name}: is {what}, not a {cls.kind}; {remedy}") from None
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise CheckpointError(
                f"{name}: not a {cls.kind} of schema {cls.model_fields['schema_version'].default} "
                f"({f'{place}: ' if place else ''}{first['msg']})"
            ) from None

    def __repr__(self) -> str:
        """A line: the whole record would fill a screen many times over."""
        lists = {
            name: found
            for name in type(self).model_fields
            if isinstance(found := getattr(self, name), list)
        }
        parts = ", ".join(f"{len(found)} in {name}" for name, found in lists.items())
        return f"<{self.kind}: {self._in_brief()}{parts}; to_pandas(), to_json()>"

    def to_pandas(self) -> Any:
        """The rows of the record as a data frame: its matrices, or the points of a frontier.

        Returns:
            A ``pandas.DataFrame`` of every field that is a single value; the fields of a part are
            named after it, such as ``bulk_edge``.

        Raises:
            MissingExtraError: Without pandas.

        Example:
            >>> budget.to_pandas().nsmallest(3, "top_k_threshold")  # doctest: +SKIP
        """
        return frame_of(getattr(self, self.rows_in))

    def _in_brief(self) -> str:
        """What comes first in the line, with a semicolon behind it; empty by default."""
        return ""

    __str__ = __repr__


def file_of(place: str | os.PathLike[str], kinds: Sequence[type[Document]]) -> Path:
    """The file of a record, given itself or the folder that holds it.

    Args:
        place: A file, which need not exist, or a folder.
        kinds: Which records may be meant, the first that is there first.

    Returns:
        The file.

    Raises:
        CheckpointError: If it is a folder that holds none.
    """
    folder = Path(place)
    if not folder.is_dir():
        return folder
    for kind in kinds:
        if os.path.lexists(file := folder / kind.file_name):  # a broken link is named when read
            return file
    if inner := _subfolders(folder, kinds):
        more = f" and {len(inner) - NAMED} more" if len(inner) > NAMED else ""
        names = ", ".join(path.name for path in inner[:NAMED])
        raise CheckpointError(
            f"{folder}: holds the records of several runs, in {names}{more}; give one of these "
            f"folders, such as {inner[0]}"
        )
    raise CheckpointError(f"{folder}: holds no {kinds[0].file_name}{_instead(folder, kinds[0])}")


def _instead(folder: Path, kind: type[Document]) -> str:
    """What a folder holds in place of a record, and what to do."""
    for other in Document.__subclasses__():
        if (folder / other.file_name).is_file():
            return (
                f", but a {other.file_name}, which {other.__name__}.from_json reads; give the "
                f"output folder of `{kind.made_by}`"
            )
    return f"; run `{kind.made_by}` first, then give its output folder"


def _what_else(content: bytes, kind: type[Document]) -> tuple[str, str] | None:
    """What a file is that is no record of this kind, and what reads it; None if nobody knows."""
    if content[8:9] == b"{" and content[:1] != b"{":
        return "a file of tensors, such as weights or moments", "`--moments` takes moments"
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    names = set(found) if isinstance(found, dict) else set[str]()
    for other in Document.__subclasses__():
        needed = {name for name, field in other.model_fields.items() if field.is_required()}
        if other is not kind and needed and needed <= names:
            return f"a {other.kind}", f"{other.__name__}.from_json reads it in Python"
    if {"first", "second", "matrices"} <= names:
        return "a comparison", "`bulkedge compare` prints it from the two records"
    return None


def _subfolders(folder: Path, kinds: Sequence[type[Document]]) -> list[Path]:
    """The folders in a folder that hold a record."""
    names = [kind.file_name for kind in kinds]
    with suppress(OSError):
        return sorted(p for p in folder.iterdir() if any((p / n).is_file() for n in names))
    return []
