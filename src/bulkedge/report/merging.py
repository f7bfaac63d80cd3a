"""Which fine-tunes have to be merged into the model first, for what, and how."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from bulkedge._errors import printable
from bulkedge.checkpoint import Adapter
from bulkedge.checkpoint.adapter_config import CONFIG
from bulkedge.checkpoint.format import WEIGHTS
from bulkedge.checkpoint.lora import FROM_THE_BASE, RELATIVE
from bulkedge.checkpoint.peft import DORA
from bulkedge.records import Record

FULL = ("file", "folder", "sharded")
"""What a record calls inputs that are no adapters."""
SCALED = ("lora", "loha", "lokr", "adalora")
"""Methods of which α is a factor in front of the whole update."""
MERGED = "merged"
"""The folder of the merged model in commands."""
BESIDE = "weights stored in full beside it"
"""What α does not scale: ``modules_to_save``."""
UNKNOWN_CLASS = "model is the base, loaded by the class that the adapter was trained with"
"""What a line of Python needs that it cannot say itself."""


@dataclass(frozen=True)
class Merge:
    """How an adapter is merged into its base.

    Attributes:
        line: For a shell, or a line of Python; None of an adapter that PEFT does not load.
        needs: What to know before it is run; None if it can be run as it is.
    """

    line: str | None
    needs: str | None

    @property
    def note(self) -> str:
        """What it needs, to be put behind a sentence; empty if it can be run as it is."""
        return f" ({self.needs})" if self.needs else ""

    def lines(self, told: str) -> list[str]:
        """A line of words for a terminal, with what it needs, and the command if there is one."""
        return [f"next: {told}{self.note}", *([f"  {self.line}"] if self.line else [])]


ELSEWHERE = Merge(None, "by the program that it was made with")
"""Of an adapter that PEFT does not load."""


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
    return record.inputs.tuned.kind == "lora" and _initialised(record) is None


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
    if record.inputs.tuned.kind != "lora":
        return record.inputs.tuned.kind
    changed = [matrix for matrix in record.matrices if matrix.status == "audited"]
    has_dora = any(DORA in (matrix.note or "") for matrix in changed)
    return "DoRA" if has_dora else _initialised(record)


def adapter_to_be_merged(adapter: Adapter) -> str | None:
    """The same of an adapter that has not been audited.

    Args:
        adapter: It.

    Returns:
        Its method; None of a plain LoRA.
    """
    if adapter.kind != "lora":
        return adapter.method
    if (initial := adapter.config.initial) is not None:
        return FROM_THE_BASE[initial]
    known = (getattr(update, "magnitude", None) for update in adapter.factors.values())
    return None if all(magnitude is None for magnitude in known) else "DoRA"


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
    return BESIDE if beside else None


def adapter_not_scaled(adapter: Adapter, beside: bool) -> str | None:
    """The same of an adapter that has not been audited.

    Args:
        adapter: It.
        beside: Whether weights of the base are stored in full beside it.

    Returns:
        What it is; None where α scales all of it.
    """
    method = adapter_to_be_merged(adapter)
    if method is not None and method.lower() not in SCALED:
        return method
    return BESIDE if beside else None


def merged(record: Record, name: str = MERGED) -> Record:
    """The record as that of the merged model, for commands.

    Args:
        record: An audit.
        name: The folder of the merged model.

    Returns:
        The same with another path.
    """
    source = record.inputs.tuned.model_copy(update={"path": name, "kind": "folder"})
    inputs = record.inputs.model_copy(update={"tuned": source})
    matrices = [m.model_copy(update={"read_only": None}) for m in record.matrices]
    return record.model_copy(update={"inputs": inputs, "matrices": matrices})


def merge(record: Record, name: str = MERGED) -> Merge:
    """How PEFT merges the adapter of a record.

    Args:
        record: An audit.
        name: The folder to be written.

    Returns:
        The line, and what it needs.
    """
    base, tuned = record.inputs.base, record.inputs.tuned
    if all(file.name != WEIGHTS for file in tuned.files):
        return ELSEWHERE
    folder = None if base.kind == "file" else base.path
    return merge_line(folder, tuned.path, tuned.base_class, tuned.labels, name)


def merge_adapter(base: str, adapter: Adapter, name: str) -> Merge:
    """How PEFT merges an adapter that has not been audited.

    Args:
        base: The folder of its base.
        adapter: It.
        name: The folder to be written.

    Returns:
        The line, and what it needs.
    """
    if all(file.name != WEIGHTS for file in adapter.files):
        return ELSEWHERE
    loaded = adapter.base_class
    known = (None, None) if loaded is None else (loaded.name, loaded.labels)
    return merge_line(base, str(adapter.path), *known, name)


def merge_line(
    base: str | None, adapter: str, base_class: str | None, labels: int | None, name: str = MERGED
) -> Merge:
    """How PEFT merges an adapter.

    Args:
        base: The folder of its base; None where there is only a file.
        adapter: Its path.
        base_class: The class of transformers that loads the base; None if unknown.
        labels: How many labels its head has; None without one.
        name: The folder to be written.

    Returns:
        A command for a shell; a line of Python, in which ``model`` is the base, where it is not
        known how the base is loaded.

    Example:
        >>> merge_line(None, "tuned", None, None).line
        'PeftModel.from_pretrained(model, "tuned").merge_and_unload().save_pretrained("merged")'
    """
    merging = "PeftModel.from_pretrained({}, {}).merge_and_unload().save_pretrained({})"
    if base is None or base_class is None:
        return Merge(merging.format("model", _quoted(adapter), _quoted(name)), UNKNOWN_CLASS)
    sized = "" if labels is None else f", num_labels={labels}"
    model = f"{base_class}.from_pretrained({_quoted(base)}{sized})"
    imports = f"from peft import PeftModel; from transformers import {base_class}"
    lines = f"{imports}; {merging.format(model, _quoted(adapter), _quoted(name))}"
    return Merge(f"python -c {shlex.quote(lines)}", None)


def _quoted(path: str) -> str:
    """A path as a literal of Python, in the quotation marks that a shell's leave alone."""
    text = repr(printable(path))
    return f'"{text[1:-1]}"' if text[0] == "'" and '"' not in text else text


def _initialised(record: Record) -> str | None:
    """The initialisation that the factors are relative to, such as ``PiSSA``; None of any other."""
    reasons = [matrix.read_only or "" for matrix in record.matrices]
    return next(
        (
            method
            for method in FROM_THE_BASE.values()
            if any(reason.startswith(RELATIVE.format(method)) for reason in reasons)
        ),
        None,
    )
