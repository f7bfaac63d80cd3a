"""The two inputs as files: which, with what content, and whether they stay as they are."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from bulkedge._errors import CheckpointError, OutputError, printable
from bulkedge.checkpoint import Adapter, Checkpoint
from bulkedge.checkpoint.header import open_regular
from bulkedge.checkpoint.identity import known_names
from bulkedge.comparison.plan import Comparison, Plan
from bulkedge.records.source import File, Inputs, Source

MAX_NAMED = 500  # characters of what an adapter calls its base
READERS = 4  # of files at once; hashing lets go of the interpreter
Stamps = dict[Path, tuple[int, int] | None]


class Watch:
    """The files of a plan: what they hold, and whether they stay as they are.

    Args:
        plan: The plan.
        known: Digests of files that another watch has read, as those of a base in common.

    Attributes:
        digests: SHA-256 of each file by its path.
        inputs: The same as the record holds it.

    Raises:
        CheckpointError: If a file cannot be read.
    """

    def __init__(self, plan: Plan, known: Mapping[Path, str] | None = None) -> None:
        self._files = plan.files
        self._before = stamps(self._files)
        read = {file: known[file] for file in self._files if known and file in known}
        self.digests = read | digests(file for file in self._files if file not in read)
        self.inputs = Inputs(
            base=source(plan.base, self.digests, named=isinstance(plan.tuned, Adapter)),
            tuned=source(plan.tuned, self.digests),
            moments=None if plan.moments is None else source_of_moments(plan.moments, self.digests),
        )

    def check(self) -> None:
        """Raise where a file has changed since.

        Raises:
            CheckpointError: If one has.
        """
        if stamps(self._files) != self._before:
            raise CheckpointError("an input file was changed during the audit; start again")


def keep_out_of_inputs(path: str | Path, plan: Plan) -> None:
    """Raise if a path to be written leads into an input, or replaces one.

    Args:
        path: A file or folder, which need not exist.
        plan: The plan with the inputs.

    Raises:
        OutputError: If it does.
    """
    more = () if plan.moments is None else (plan.moments,)
    keep_out(path, (plan.base.path, plan.tuned.path, *more), set(plan.files))


def keep_out(path: str | Path, sources: Iterable[Path], files: Iterable[Path] = ()) -> None:
    """The same for inputs of any kind.

    Args:
        path: A file or folder, which need not exist.
        sources: Files and folders.
        files: Files in them, which may be links to files elsewhere.

    Raises:
        OutputError: If it does.
    """
    try:
        target = Path(path).resolve()
    except (ValueError, OSError, RuntimeError):  # a NUL, a loop of links
        raise OutputError(f"{str(path)!r}: is no place that can be written") from None
    for source in sources:
        # an index stands for its folder
        folder = source.parent if source.name.endswith(".index.json") else source
        if target.is_relative_to(folder.resolve()):
            raise OutputError(f"{path}: lies inside the input {folder}; write elsewhere")
    for file in files:
        place = file.resolve()
        # a snapshot of the hub's cache is links into the folder of the model
        homes = [p for p in (place, *place.parents) if p.name.startswith("models--")]
        if any(target.is_relative_to(home) for home in (place, *homes)):
            raise OutputError(f"{path}: lies inside the input {file}; write elsewhere")


def digests(files: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of each file, each read once.

    Args:
        files: The files; a file named twice is read once.

    Returns:
        ``{file: digest}``.

    Raises:
        CheckpointError: If one cannot be read.
    """
    names = list(dict.fromkeys(files))
    stop = threading.Event()
    with ThreadPoolExecutor(min(READERS, max(1, len(names)))) as readers:
        try:
            return dict(
                zip(names, readers.map(lambda file: _sha256(file, stop), names), strict=True)
            )
        finally:
            stop.set()  # Ctrl-C does not wait for a file of many gigabytes


def source(
    opened: Checkpoint | Adapter, known: Mapping[Path, str], *, named: bool = False
) -> Source:
    """An input with the digests of its files, and with the names that it goes by if asked for."""
    rows = _rows(opened.files, known)
    wanted = opened.config.base_model_name_or_path if isinstance(opened, Adapter) else None
    told = printable(wanted[:MAX_NAMED]) if isinstance(wanted, str) and wanted else None
    names = known_names(opened) if named and isinstance(opened, Checkpoint) else []
    rounded = opened.quantised if isinstance(opened, Checkpoint) else None
    loaded = opened.base_class if isinstance(opened, Adapter) else None
    return Source(
        path=as_text(opened.path),
        kind=opened.kind,
        files=rows,
        trained_on=told,
        known_as=[printable(name[:MAX_NAMED]) for name in names],
        quantised=rounded,
        disagreements=list(opened.disagreements),
        contradictions=list(opened.contradictions) if isinstance(opened, Checkpoint) else [],
        base_class=None if loaded is None else loaded.name,
        labels=None if loaded is None else loaded.labels,
    )


def source_of_moments(file: Path, known: Mapping[Path, str]) -> Source:
    """A file of moments with its digest.

    Args:
        file: The file.
        known: Digests, by file.

    Returns:
        What the record says of it.
    """
    rows = _rows((file,), known)
    return Source(
        path=as_text(file),
        kind="file",
        files=rows,
        trained_on=None,
        known_as=[],
        quantised=None,
        disagreements=[],
        contradictions=[],
        base_class=None,
        labels=None,
    )


def contents(inputs: Inputs) -> list[Any]:
    """The inputs but for where they lie: machines may mount them in different places.

    Args:
        inputs: As a record has them.

    Returns:
        The kind and the files of each.
    """
    sources = (inputs.base, inputs.tuned, inputs.moments)
    return [None if source is None else (source.kind, source.files) for source in sources]


def _rows(files: Iterable[Path], known: Mapping[Path, str]) -> list[File]:
    """What the record says of files."""
    return [
        File(name=as_text(file.name), sha256=known[file], bytes=file.stat().st_size)
        for file in files
    ]


def stamps(files: Iterable[Path]) -> Stamps:
    """Size and time of last change of each file, None for one that is gone."""
    return {file: _stamp(file) for file in files}


def files_of(comparison: Comparison) -> list[Path]:
    """The files that the tensors of a comparison lie in."""
    return list(dict.fromkeys(_paths(comparison)))


def plain(value: Any, known: Mapping[Path, str]) -> Any:
    """A comparison as JSON values: a file by its content, a kind of object by its name.

    Args:
        value: A comparison, or a part of one.
        known: The digests of the files.

    Returns:
        The same, made of mappings, lists, text and numbers.

    Raises:
        TypeError: If a part has no such form.
    """
    if is_dataclass(value):
        parts = {field.name: plain(getattr(value, field.name), known) for field in fields(value)}
        return {"is": type(value).__name__, **parts}
    if isinstance(value, Path):
        return known.get(value, as_text(value))
    if isinstance(value, Mapping):
        return {str(name): plain(part, known) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part, known) for part in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"expected plain values in a comparison, got {type(value).__name__}")


def _paths(value: Any) -> Iterator[Path]:
    """Every path in a comparison, or in a part of one."""
    if isinstance(value, Path):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _paths(getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _paths(part)
    elif isinstance(value, Mapping):
        yield from _paths(list(value.values()))


def as_text(path: str | Path) -> str:
    """A path for JSON, which cannot hold bytes that are no text."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _sha256(path: Path, stop: threading.Event) -> str:
    """Digest of a file, read in pieces until asked to stop."""
    digest = hashlib.sha256()
    try:
        with open_regular(path)[0] as file:  # checked before, but a pipe may have come since
            while not stop.is_set() and (block := file.read(2**20)):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
