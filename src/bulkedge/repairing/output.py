"""A repaired fine-tune on disk: a copy of the input with other numbers in some of its tensors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bulkedge.checkpoint import Adapter, Checkpoint, StoredMatrix, read_header
from bulkedge.checkpoint.adapter_config import CONFIG, AdapterConfig
from bulkedge.checkpoint.experts import RANK_MAJOR
from bulkedge.checkpoint.kohya import METADATA
from bulkedge.checkpoint.lora import alpha_of
from bulkedge.checkpoint.patterns import LITERAL
from bulkedge.checkpoint.read import read_json
from bulkedge.checkpoint.write import copy_file, copy_tree, rewrite

from .layers import Layer, Stored

MODEL_CONFIG = "config.json"
PATTERNS = ("rank_pattern", "alpha_pattern")
PART = re.compile(r"\[[^\[\]]*\]$")


@dataclass(frozen=True)
class Output:
    """A copy of an input, to be changed.

    Attributes:
        source: The input.
        folder: The copy's folder.
        left_behind: Files of the input that were not copied.
    """

    source: Checkpoint | Adapter
    folder: Path
    left_behind: tuple[str, ...] = ()

    @classmethod
    def copy(cls, source: Checkpoint | Adapter, folder: Path) -> Output:
        """Copy everything that is not a pickle.

        Args:
            source: The input: a file, or a folder with all that lies in it.
            folder: An empty folder.

        Returns:
            The copy.
        """
        if source.path.is_file() and not source.path.name.endswith(".index.json"):
            copy_file(source.path, folder / source.path.name)
            config = source.path.parent / MODEL_CONFIG
            if config.is_file():  # it says how the tensors are to be read
                copy_file(config, folder / MODEL_CONFIG)
            return cls(source, folder)
        root = source.path.parent if source.path.is_file() else source.path
        return cls(source, folder, tuple(copy_tree(root, folder)))

    @property
    def path(self) -> Path:
        """What stands for the copy as the input's path does for the input."""
        return self.folder / self.source.path.name if self.source.path.is_file() else self.folder

    def write_matrix(self, matrix: StoredMatrix, value: Tensor) -> None:
        """Write a full matrix over the one in the copy."""
        matrix.write(value, self.folder / matrix.info.file.name)

    def write_factors(self, layers: Mapping[str, tuple[Layer, Stored]]) -> None:
        """Write new factors, and their ranks where a configuration has them.

        Args:
            layers: By the key that PEFT's patterns know a weight by (:func:`key_of`).
        """
        (file, *_) = self.source.files
        copy = self.folder / file.name
        tensors: dict[str, Tensor] = {}
        grown: dict[str, tuple[Layer, int]] = {}
        for key, (layer, stored) in layers.items():
            tensors |= stored.tensors
            if stored.rank != layer.whole.rank:
                grown[key] = layer, stored.rank
        metadata = None
        if isinstance(self.source, Adapter) and grown:
            for layer, rank in grown.values():
                tensors |= layer.whole.alpha_for(rank)
            if any(file.name == CONFIG for file in self.source.files):
                _write_ranks(self.folder / CONFIG, grown, self.source.config)
            else:
                metadata = _metadata_with_ranks(copy, grown)
        before = copy.with_name(f".{copy.name}.before")
        copy.rename(before)
        rewrite(before, copy, tensors, metadata)
        shutil.copymode(before, copy)
        before.unlink()


def _write_ranks(
    path: Path, grown: Mapping[str, tuple[Layer, int]], settings: AdapterConfig
) -> None:
    """Put the new ranks into PEFT's patterns, in front: the first that matches counts."""
    config = read_json(path)
    ranks = {pattern_of(key): rank for key, (_, rank) in grown.items()}
    alphas = {
        pattern_of(key): _plain(alpha_of(layer.whole.scale, rank, rslora=settings.use_rslora))
        for key, (layer, rank) in grown.items()
    }
    for field, new in zip(PATTERNS, (ranks, alphas), strict=True):
        config[field] = in_front(new, config.get(field))
    stacks = [key for key, (layer, _) in grown.items() if layer.whole.experts > 1]
    stated = any(settings.layouts(key.rpartition(".")[2]) for key in stacks)
    if stacks and settings.by_unsloth and not stated:  # for rank one both layouts coincide
        config["lora_B_layout"] = RANK_MAJOR
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _metadata_with_ranks(file: Path, grown: Mapping[str, tuple[Layer, int]]) -> dict[str, str]:
    """The same in the metadata of a file by diffusers; nothing new where there is none."""
    _, metadata = read_header(file)
    if METADATA not in metadata:
        return metadata
    settings: dict[str, Any] = json.loads(metadata[METADATA])
    for key, (layer, rank) in grown.items():
        component = layer.whole.infos[0].name.partition(".")[0]
        if layer.whole.alpha_for(rank) or not any(k.startswith(f"{component}.") for k in settings):
            continue
        rslora = bool(settings.get(f"{component}.use_rslora"))
        values = (rank, _plain(alpha_of(layer.whole.scale, rank, rslora=rslora)))
        for field, value in zip(PATTERNS, values, strict=True):
            name = f"{component}.{field}"
            own = pattern_of(key.removeprefix(f"{component}."))
            settings[name] = in_front({own: value}, settings.get(name))
    return metadata | {METADATA: json.dumps(settings)}


def pattern_of(module: str) -> str:
    """A pattern that the whole path of one module matches, and nothing else.

    Args:
        module: The path.

    Returns:
        A key of ``rank_pattern`` and ``alpha_pattern``.
    """
    return LITERAL + re.escape(module)


def in_front(new: Mapping[str, float], old: Mapping[str, float] | None) -> dict[str, float]:
    """New patterns before the old ones; what an old one said of the same key is replaced.

    Args:
        new: The new ones.
        old: Those that are there, if any.

    Returns:
        Both.
    """
    return {**new, **{key: value for key, value in (old or {}).items() if key not in new}}


def _plain(value: float) -> float:
    """A whole number as an integer, as PEFT writes it."""
    return int(value) if value == int(value) else value


def key_of(name: str, source: Checkpoint | Adapter) -> str:
    """The key of PEFT's patterns for a weight: the path of its module, or a parameter's own name.

    Args:
        name: What an audit calls the weight.
        source: The fine-tune, whose ``target_parameters`` say what it updates as a bare parameter.

    Returns:
        ``layers.0.router.weight`` of such a parameter, else as :func:`module_of`.
    """
    owner, _, parameter = PART.sub("", name).rpartition(".")
    wrapped = source.wrapped if isinstance(source, Adapter) else ()
    if any(found.module == owner and parameter in found.parameters for found in wrapped):
        return f"{owner}.{parameter}"
    return module_of(name)


def module_of(name: str) -> str:
    """The path of a module, from what an audit calls its weight.

    Args:
        name: Such as ``layers.0.mlp.up_proj.weight`` or ``mlp.experts.down_proj[3]``.

    Returns:
        ``layers.0.mlp.up_proj``, ``mlp.experts.down_proj``.
    """
    return PART.sub("", name).removesuffix(".weight")
