"""Which fine-tunes have to be merged into the model first, and for what."""

from __future__ import annotations

from bulkedge._errors import printable
from bulkedge.checkpoint.adapter_config import CONFIG
from bulkedge.checkpoint.peft import DORA
from bulkedge.records import Record

FULL = ("file", "folder", "sharded")
"""What a record calls inputs that are no adapters."""
SCALED = ("lora", "loha", "lokr", "adalora")
"""Methods of which α is a factor in front of the whole update."""
MERGED = "merged"
"""The folder of the merged model in commands."""


def is_full(record: Record) -> bool:
    """Whether the fine-tune is a checkpoint of its own.

    Args:
        record: An audit.

    Returns:
        Whether it is.
    """
    return record.inputs.tuned.kind in FULL


def is_of_factors(record: Record) -> bool:
    """Whether it is a LoRA or a DoRA, in whose factors a repair can store a correction.

    Args:
        record: An audit.

    Returns:
        Whether it is.
    """
    return record.inputs.tuned.kind == "lora"


def has_settings(record: Record) -> bool:
    """Whether it is an adapter with PEFT's configuration, in which its α is.

    Args:
        record: An audit.

    Returns:
        Whether it is.
    """
    return any(file.name == CONFIG for file in record.inputs.tuned.files)


def to_be_merged(record: Record) -> str | None:
    """What adapter it is, if protect and rescale change it only once it is merged.

    Args:
        record: An audit.

    Returns:
        Its method; None of a plain LoRA and of a checkpoint.
    """
    if is_full(record):
        return None
    if not is_of_factors(record):
        return record.inputs.tuned.kind
    changed = [matrix for matrix in record.matrices if matrix.status == "audited"]
    return "DoRA" if any(DORA in (matrix.note or "") for matrix in changed) else None


def not_scaled(record: Record) -> str | None:
    """What of an adapter its α does not scale.

    Args:
        record: An audit.

    Returns:
        What it is; None where α scales all of it, and of a checkpoint.
    """
    if is_full(record):
        return None
    method = to_be_merged(record)
    if method is not None and method not in SCALED:
        return method
    beside = any(m.status == "audited" and m.update == "dense" for m in record.matrices)
    return "weights stored in full beside it" if beside else None


def merged(record: Record) -> Record:
    """The record as that of the merged model, for commands.

    Args:
        record: An audit.

    Returns:
        The same with another path.
    """
    source = record.inputs.tuned.model_copy(update={"path": MERGED, "kind": "folder"})
    inputs = record.inputs.model_copy(update={"tuned": source})
    matrices = [m.model_copy(update={"read_only": None}) for m in record.matrices]
    return record.model_copy(update={"inputs": inputs, "matrices": matrices})


def merge_line(adapter: str) -> str:
    """How PEFT merges an adapter, as a line of Python.

    Args:
        adapter: Its path.

    Returns:
        The line; ``model`` is the base as the adapter's user loads it.
    """
    return (
        f"PeftModel.from_pretrained(model, {printable(adapter)!r}).merge_and_unload()"
        f'.save_pretrained("{MERGED}")'
    )
