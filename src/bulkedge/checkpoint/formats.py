"""The formats that adapters are stored in, and what lies at a path, in whichever form."""

from __future__ import annotations

from pathlib import Path

from bulkedge._errors import AdapterError, CheckpointError

from .adapter import Adapter
from .format import AdapterFormat, Place
from .gguf_lora import GGUF_LORA
from .kohya import LORA_FILE
from .mlx import MLX
from .peft import PEFT_LORA
from .peft_of_base import PEFT_OF_BASE
from .peft_other import PEFT_OTHER
from .read import Checkpoint

FORMATS = (GGUF_LORA, MLX, PEFT_OTHER, PEFT_OF_BASE, PEFT_LORA, LORA_FILE)
"""All formats.  The first that claims a place reads it; a new one stands before the last two:
PEFT's claims every folder with a configuration, and kohya's all factors without weights."""


def format_of(place: Place) -> AdapterFormat | None:
    """The format of an adapter.

    Args:
        place: Where it lies.

    Returns:
        The format; None of a full model.

    Raises:
        CheckpointError: If what lies there cannot be read, and is no damaged adapter.
    """
    return next((format for format in FORMATS if _claims(format, place)), None)


def _claims(format: AdapterFormat, place: Place) -> bool:
    """Whether a format claims a place; a damaged adapter is left to the format that says so."""
    try:
        return format.claims(place)
    except CheckpointError:
        if place.configured:
            return False
        raise


def open_path(path: str | Path) -> Checkpoint | Adapter:
    """Read the headers of a checkpoint or an adapter.

    Args:
        path: A checkpoint, a model folder, or an adapter.

    Returns:
        What it is; no tensor has been read.

    Raises:
        CheckpointError: If it cannot be read, or is none of them.
    """
    found = format_of(place := Place(path))
    return place.checkpoint if found is None else found.open(place)


def open_adapter(path: str | Path) -> Adapter:
    """Read the headers of an adapter, in whichever format it is.

    Args:
        path: The adapter's folder, the weights in it, or a file without a configuration.

    Returns:
        The adapter; no tensor has been read.

    Raises:
        AdapterError: If the path holds no adapter.
        CheckpointError: If it cannot be read.
    """
    opened = open_path(path)
    if not isinstance(opened, Adapter):
        raise AdapterError(f"{path}: a full model, expected an adapter; open_checkpoint() reads it")
    return opened


def open_base(path: str | Path) -> Checkpoint | None:
    """Read the headers of a full model.

    Args:
        path: A checkpoint or a model folder.

    Returns:
        The checkpoint; None if the path holds an adapter, intact or damaged.

    Raises:
        CheckpointError: If it cannot be read.
    """
    place = Place(path)
    return place.checkpoint if format_of(place) is None else None


def is_adapter(path: str | Path) -> bool:
    """Whether ``path`` is a folder with an ``adapter_config.json``, or the weights in one.

    Args:
        path: The folder or the file.

    Returns:
        Whether it is; for a file without a configuration use :func:`open_path`.
    """
    return Place(path).configured
