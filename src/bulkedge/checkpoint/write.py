"""Files made from files: what is not changed is carried over byte for byte.

A tensor that keeps its shape is written over in a copy of its file; a file whose tensors change
shape is written anew, streamed.  A folder appears under its name only when all of it is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bulkedge._errors import CheckpointError, OutputError

from .elements import torch_dtypes, write_bytes
from .header import TensorInfo, open_regular, read_header
from .read import PICKLES, confined

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

CHUNK = 2**22
SOME_BYTES = 2**16
"""So much is written to see that a disk takes it."""
ALIGNMENT = 8
"""The header is padded to a multiple of this, so that tensors may be mapped."""


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when the block ends, and vanishes if it fails.

    Args:
        path: The folder to be; it must not exist.

    Yields:
        The folder to write into, beside ``path``.

    Raises:
        OutputError: If it cannot be made or named.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise OutputError(f"{path}: cannot be made ({error.strerror})") from None
    try:
        yield building
        _sync(building)
        building.chmod(0o777 & ~umask())
        building.rename(path)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Raise unless something can be written at a path, before the work that it is the result of.

    Args:
        path: A file or folder, which need not exist, nor the folder that it lies in.

    Raises:
        OutputError: If the nearest folder that exists takes no file, or its disk is full.
    """
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"{path}: {parent} is not a writable folder")
    try:  # rights alone do not show it: a superuser has all of them, also where no file can be
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"\0" * SOME_BYTES)
            file.flush()
    except OSError as error:
        raise OutputError(
            f"{path}: {parent} is not a writable folder ({error.strerror or error}); name another"
        ) from None


def copy_tree(source: Path, target: Path) -> list[str]:
    """Copy a folder's regular files, with what lies below it; pickles stay behind.

    Args:
        source: The folder.  Links inside it are followed where :func:`confined` does.
        target: An empty folder.

    Returns:
        What was left behind.

    Raises:
        CheckpointError: If a link leads out of the folder.
    """
    left = []
    for folder, below, names in os.walk(source, onerror=_unreadable):
        here = Path(folder)
        for name in sorted(below):
            place = (here / name).relative_to(source)
            if (here / name).is_symlink():  # os.walk does not descend into it
                left.append(str(place))
            else:
                (target / place).mkdir()
        for name in sorted(names):
            file = here / name
            place = file.relative_to(source)
            if file.suffix in PICKLES or not confined(file, source).is_file():
                left.append(str(place))
            else:
                copy_file(file, target / place)
    return left


def _unreadable(error: OSError) -> None:
    """A folder that cannot be listed must not be taken for an empty one."""
    raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}); change its mode")


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a regular file to a new one."""
    with open_regular(source)[0] as file, target.open("xb") as out:
        shutil.copyfileobj(file, out, CHUNK)


def rewrite(
    source: Path, target: Path, changed: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> None:
    """A safetensors file with some tensors of another, of any shape, the others as they are.

    Args:
        source: The file that there is.
        target: The file to be.
        changed: New tensors by name, in the dtypes to be stored.
        metadata: The strings of its header; those of ``source`` if None.
    """
    infos, old = read_header(source)
    spelled = {dtype: name for name, dtype in torch_dtypes().items()}
    header: dict[str, Any] = {}
    if strings := dict(old if metadata is None else metadata):
        header["__metadata__"] = strings
    in_order, end = sorted(infos.values(), key=lambda info: info.start), 0
    for info in in_order:
        dtype, shape, size = info.dtype, list(info.shape), info.nbytes
        if (tensor := changed.get(info.name)) is not None:
            dtype, shape = spelled[tensor.dtype], list(tensor.shape)
            size = tensor.numel() * tensor.element_size()
        header[info.name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open_regular(source)[0] as file, target.open("xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for info in in_order:
            if (tensor := changed.get(info.name)) is not None:
                write_bytes(out, tensor)
            else:
                _copy_bytes(file, out, info)


def _copy_bytes(file: BinaryIO, out: BinaryIO, info: TensorInfo) -> None:
    """The bytes of a stored tensor, in pieces."""
    file.seek(info.start)
    left = info.nbytes
    while left:
        block = file.read(min(CHUNK, left))
        if not block:
            raise OutputError(f"{info.file}: ended too early; it was changed meanwhile")
        out.write(block)
        left -= len(block)


def _sync(folder: Path) -> None:
    """Wait until every file below is on disk."""
    for here, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(here) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def umask() -> int:
    """The permissions that new files do not get; the system returns them only on a change."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
