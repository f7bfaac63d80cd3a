"""The formats that adapters are stored in, and what lies at a path, in whichever form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from .adapter import Adapter
from .kohya import is_lora_file, open_lora_file
from .peft import is_adapter, open_adapter
from .read import Checkpoint, open_checkpoint

Place = TypeVar("Place")


@dataclass(frozen=True)
class AdapterFormat(Generic[Place]):
    """A format of adapters.

    Attributes:
        recognises: Whether what lies there is an adapter of this format, sound or damaged.
        open: Reads its headers.
    """

    recognises: Callable[[Place], bool]
    open: Callable[[Place], Adapter]


FOLDERS: tuple[AdapterFormat[Path], ...] = (AdapterFormat(is_adapter, open_adapter),)
"""Formats that are known by a file beside the weights, from the path alone."""

FILES: tuple[AdapterFormat[Checkpoint], ...] = (AdapterFormat(is_lora_file, open_lora_file),)
"""Formats that are known by the names of the tensors, from the opened file."""


def open_path(path: str | Path) -> Checkpoint | Adapter:
    """Read the headers of whatever lies at a path.

    Args:
        path: A checkpoint, a model folder, or an adapter.

    Returns:
        What it is; no tensor has been read.

    Raises:
        CheckpointError: If it cannot be read, or is none of them.
    """
    for folder in FOLDERS:
        if folder.recognises(Path(path)):
            return folder.open(Path(path))
    opened = open_checkpoint(path)
    file = next((format for format in FILES if format.recognises(opened)), None)
    return opened if file is None else file.open(opened)


def open_base(path: str | Path) -> Checkpoint | None:
    """Read the headers of a full model.

    Args:
        path: A checkpoint or a model folder.

    Returns:
        The checkpoint; None if an adapter lies there, sound or damaged.

    Raises:
        CheckpointError: If it cannot be read.
    """
    if any(folder.recognises(Path(path)) for folder in FOLDERS):
        return None
    opened = open_checkpoint(path)
    return None if any(file.recognises(opened) for file in FILES) else opened
