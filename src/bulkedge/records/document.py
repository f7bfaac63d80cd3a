"""What every record is: rows that validate, written as JSON and read back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import ValidationError

from bulkedge._errors import CheckpointError
from bulkedge.checkpoint.header import read_regular

from .rows import Row

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_RECORD_BYTES = 2**30


class Document(Row):
    """A record that is a file of its own.

    Attributes:
        kind: What a message calls it.
        file_name: What it is called in the folder that it is written to.
    """

    kind: ClassVar[str]
    file_name: ClassVar[str]

    def to_json(self) -> str:
        """The record as indented JSON text with a final newline."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """Read a record back.

        Args:
            source: A file that :meth:`to_json` text was written to, or the text itself: a string
                that begins with ``{`` is taken for text.

        Returns:
            The record.

        Raises:
            CheckpointError: If the file is missing, or is not a record of this schema.
        """
        is_text = isinstance(source, str) and source.lstrip()[:1] == "{"
        name = "the text given" if is_text else str(source)
        try:
            text = None if is_text else read_regular(Path(source), MAX_RECORD_BYTES)
            return cls.model_validate_json(str(source) if text is None else text)
        except OSError as error:
            raise CheckpointError(
                f"{name}: cannot be read ({error.strerror}); give the file of a {cls.kind}"
            ) from None
        except ValidationError as error:
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
        parts = ", ".join(f"{len(found)} {name}" for name, found in lists.items())
        return f"<{self.kind}: {parts}; to_json() has all of it>"

    __str__ = __repr__
