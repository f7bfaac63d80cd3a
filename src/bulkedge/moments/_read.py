"""Texts from files: lines, JSON and Parquet."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bulkedge._errors import InputError, MissingExtraError, install

LINES_OF_JSON = (".jsonl", ".ndjson")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def read_texts(path: Path, column: str = "text") -> list[str]:
    """The texts of a file.

    Args:
        path: ``.jsonl`` or ``.ndjson`` (one object a line), ``.json`` (a list of objects or of
            strings), ``.parquet``, in letters of any case; any other name: one text a line.
        column: The field of the objects, or the column.

    Returns:
        The texts that are not empty.

    Raises:
        InputError: If the file cannot be read, has no such column, or no text in it.
        MissingExtraError: If Parquet is to be read without pyarrow.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "texts.jsonl"
        >>> _ = file.write_text('{"text": "to be"}')
        >>> read_texts(file)
        ['to be']
    """
    ending = path.suffix.lower()
    try:
        if ending == ".parquet":
            found = _column(path, column)
        elif ending == ".json":
            found = list(_list(path, column))
        else:
            found = list(_lines(path, column, ending in LINES_OF_JSON))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a file of texts"
        ) from None
    except UnicodeDecodeError:
        if ending in PACKED:
            raise InputError(
                f"{path}: compressed; unpack it first, such as `zcat FILE > texts.txt`"
            ) from None
        raise InputError(f"{path}: expected text in UTF-8; convert it first") from None
    texts = list(checked_texts((text for text in found if text is not None), str(path), column))
    if not texts:
        raise InputError(f"{path}: no text in it; give one text a line, or name the --column")
    return texts


def checked_texts(texts: Iterable[Any], source: str, column: str = "") -> Iterator[str]:
    """Texts without blanks around them, the empty ones left out.

    Args:
        texts: What should be texts.
        source: Where they are from, for a message.
        column: The field or column, likewise.

    Yields:
        Each text.

    Raises:
        InputError: If one is no text, or has half of a surrogate pair in it.
    """
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            where = f" in {column!r}" if column else ""
            raise InputError(f"{source}: expected text{where}, got {text!r:.40}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{source}: text {number} has half of a surrogate pair: {text!r:.40}; write the "
                "character itself"
            ) from None
        if text.strip():
            yield text.strip()


def _lines(path: Path, column: str, of_json: bool) -> Iterator[Any]:
    """One text a line, or one of the fields of an object a line."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not of_json:
                yield line
            elif line.strip():
                yield _field(line, column, f"{path}: line {number}")


def _field(line: str, column: str, where: str) -> Any:
    """A field of an object in JSON."""
    try:
        return json.loads(line)[column]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{where}: expected an object with a field {column!r}; name another with --column"
        ) from None


def _list(path: Path, column: str) -> Iterator[Any]:
    """The items of a list, or a field of each; of a file that is no JSON the lines."""
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        yield from _lines(path, column, of_json=True)
        return
    for number, item in enumerate(items if isinstance(items, list) else [items], start=1):
        if isinstance(item, dict) and column not in item:
            raise InputError(
                f"{path}: item {number}: expected an object with a field {column!r}; name another "
                "with --column"
            )
        yield item[column] if isinstance(item, dict) else item


def _column(path: Path, column: str) -> list[Any]:
    """A column of a Parquet file."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MissingExtraError(
            f"expected pyarrow for Parquet, found none; {install('parquet')}"
        ) from None
    try:
        return parquet.read_table(path, columns=[column])[column].to_pylist()
    except (KeyError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        why = str(error).splitlines()[0]
        raise InputError(f"{path}: column {column!r} cannot be read ({why:.100})") from None
