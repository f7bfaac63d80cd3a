"""What a format of adapters is: what it claims of the places on a disk, and how it reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bulkedge._errors import AdapterError
from bulkedge._globs import unwrapped

from .adapter import Adapter
from .adapter_config import CONFIG
from .base_class import base_class
from .header import TensorInfo, read_header
from .hub import located
from .read import PICKLES, Checkpoint, confined, convert, open_checkpoint, read_json, weights_beside
from .targets import Targets
from .writer import by

WEIGHTS = "adapter_model.safetensors"
"""The name under which PEFT saves the weights of an adapter, beside its configuration."""

PREFIX = "base_model.model."
"""What PEFT puts before the names of modules in the adapters that it saves."""

PART_OF_A_METHOD = re.compile(
    r"(^|\.)((lora|hada|lokr|vera|oft|boft|ia3|hra|adalora|glora|fourierft)_|trainable_tokens_delta)"
)
"""What the names of tensors begin with that only methods of adapters have."""


def plain_name(name: str) -> str:
    """The name of a tensor of an adapter without what wrapped the model that it was trained on.

    Args:
        name: As it is stored.

    Returns:
        The name.

    Example:
        >>> plain_name("base_model.model.layers.0._orig_mod.q_proj.lora_A.weight")
        'layers.0.q_proj.lora_A.weight'
    """
    return unwrapped(name).removeprefix(PREFIX)


@dataclass(frozen=True)
class Place:
    """The content of a path, read as far as a format needs: only headers and small files.

    Attributes:
        path: What the caller named: a file, a model's folder, or an adapter's; of a model that was
            named by its id, its folder in the hub's cache.
    """

    path: str | Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", located(self.path))

    @property
    def folder(self) -> Path:
        """The folder of an adapter that PEFT saved, for the folder itself or the weights in it."""
        path = Path(self.path)
        return path.parent if path.name == WEIGHTS else path

    @property
    def configured(self) -> bool:
        """Whether there is an ``adapter_config.json``, intact or damaged."""
        # lexists: a pipe or a dangling link is an adapter that cannot be read, not a missing one
        return os.path.lexists(self.folder / CONFIG)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The content of ``adapter_config.json``; empty if there is none.

        Raises:
            CheckpointError: If it is damaged.
        """
        if not self.configured:
            return {}
        return read_json(confined(self.folder / CONFIG, self.folder))

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The stored tensors: of an adapter with a configuration those of its weights file.

        Raises:
            AdapterError: If the weights file is missing.
            CheckpointError: If they cannot be read.
        """
        if not self.configured:
            return self.checkpoint.tensors
        file = self.folder / WEIGHTS
        if not os.path.lexists(file):
            pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
            advice = f"found {pickles[0]!r}: {convert(WEIGHTS)}" if pickles else "save it again"
            raise AdapterError(f"{file}: no such file; {advice}")
        return read_header(confined(file, self.folder))[0]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The same as a full model, or as a file without a configuration.

        Raises:
            CheckpointError: If it is neither.
        """
        return open_checkpoint(self.path)

    def adapter(self, **parts: Any) -> Adapter:
        """What was read there, with its path, its files, and the version of PEFT that saved it.

        Args:
            parts: The fields of the adapter besides.

        Returns:
            The adapter.
        """
        if not self.configured:
            found = self.checkpoint
            return Adapter(found.path, found.files, beside=found.beside, **parts)
        files = (self.folder / WEIGHTS, self.folder / CONFIG)
        beside = weights_beside(self.folder, files[:1])
        if "peft_type" in self.settings:
            parts["targets"] = Targets(self.settings)
            parts["base_class"] = base_class(self.settings, self.tensors)
        parts.setdefault("origin", by("PEFT", self.settings.get("peft_version")))
        return Adapter(self.folder, files, beside=beside, **parts)


@dataclass(frozen=True)
class AdapterFormat:
    """A format of adapters.

    Attributes:
        claims: Whether the place holds an adapter of this format, intact or damaged.  It checks the
            settings, or the names and shapes of the tensors, and never claims what it cannot read.
        open: Reads its headers.
    """

    claims: Callable[[Place], bool]
    open: Callable[[Place], Adapter]
