"""A PEFT LoRA adapter folder, as the updates that it makes to base tensors.

PEFT stores A as r×in and B as out×r; the update of a linear layer is ``s·B·A`` with s = α/r, or
α/√r under ``use_rslora`` (Hu et al., arXiv:2106.09685; Kalajdzievski, arXiv:2312.03732).  For an
embedding, ``(vocab, dim)``, it is the transpose, ``s·Aᵀ·Bᵀ``.  What an adapter holds besides, or
holds in a way that cannot be added to the base as a matrix, is listed with the reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from bulkedge._errors import AdapterError
from bulkedge._globs import unwrapped

from .adapter import Adapter, Unhandled
from .adapter_config import CONFIG, AdapterConfig, checked_config
from .experts import Wrapped
from .header import FLOATING, TensorInfo, read_header
from .lora import LoraFactors
from .read import PICKLES, confined, convert, read_json, weights_beside

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_[A-Za-z_]+)(\.default)?(?P<leaf>\.weight|\.bias)?"
)
PART_OF_A_METHOD = re.compile(r"(^|\.)(lora|hada|lokr|vera|oft|boft|ia3|hra|adalora|glora)_")
PAIRS = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})
MAGNITUDE = "lora_magnitude_vector"
DORA = "DoRA: each output is scaled besides, the update is of full rank"
TWICE = "PEFT adds the update of out_proj twice, in training and in merging; judged once"
MAX_PARAMETERS = 64

K = TypeVar("K")
T = TypeVar("T")


def is_adapter(path: str | Path) -> bool:
    """Whether ``path`` is an adapter folder, or the weights in one."""
    # a pipe, or a link that leads nowhere, is no missing file; False for an impossible name
    return os.path.lexists(_folder(Path(path)) / CONFIG)


def open_adapter(path: str | Path) -> Adapter:
    """Read the configuration and the header of a PEFT LoRA adapter.

    Args:
        path: The adapter folder, or the ``adapter_model.safetensors`` in it.

    Returns:
        The adapter; no tensor has been read.

    Raises:
        AdapterError: If it is not a LoRA adapter, its base is not the model on disk, or a file is
            missing or bad.
    """
    folder = _folder(Path(path))
    config = checked_config(read_json(confined(folder / CONFIG, folder)), folder / CONFIG)
    file = folder / WEIGHTS
    if not os.path.lexists(file):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        advice = f"found {pickles[0]!r}: {convert(WEIGHTS)}" if pickles else "save it again"
        raise AdapterError(f"{file}: no such file; {advice}")
    tensors, _ = read_header(confined(file, folder))
    adapter = _sort(folder, file, config, tensors)
    return replace(adapter, beside=weights_beside(folder, (file,)))


def _folder(path: Path) -> Path:
    """The adapter's folder, for the folder itself or the weights in it."""
    return path.parent if path.name == WEIGHTS else path


def _sort(
    folder: Path, file: Path, config: AdapterConfig, stored: Mapping[str, TensorInfo]
) -> Adapter:
    """Sort the stored tensors into updates, replacements and what is not handled."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, TensorInfo] = {}
    unhandled: list[Unhandled] = []
    for key, info in stored.items():
        name = unwrapped(key).removeprefix(PREFIX)
        lora = LORA_KEY.fullmatch(name)
        if lora and lora["leaf"] != ".bias":
            _add(modules.setdefault(lora["module"], {}), lora["part"], info)
        elif lora:
            module = _unwrapped(lora["module"])
            unhandled.append(Unhandled(info, f"{module}.bias", "1-D tensor: not a matrix", True))
        elif ".token_adapter." in name:
            module = _unwrapped(name.partition(".token_adapter.")[0])
            reason = "trainable tokens: not handled yet"
            unhandled.append(Unhandled(info, f"{module}.weight", reason))
        elif PART_OF_A_METHOD.search(name):
            reason = "a part of an adapter method that is not known here"
            unhandled.append(Unhandled(info, _unwrapped(name), reason))
        else:
            _add(tensors, _unwrapped(name), info)
    factors: dict[str, LoraFactors] = {}
    nested: dict[str, dict[int, dict[str, TensorInfo]]] = {}
    for wrapped, parts in modules.items():
        module = _unwrapped(wrapped)
        if _parameters(module, config):
            depth = wrapped.count(".base_layer")
            _add(nested.setdefault(module, {}), depth, parts)
        elif isinstance(found := plain_factors(module, parts, config), str):
            unhandled += [Unhandled(info, f"{module}.weight", found) for info in parts.values()]
        else:
            # the one module that PEFT wraps inside another: out_proj of MultiheadAttention
            inside = ".base_layer." in wrapped.removesuffix(".base_layer")
            _add(factors, f"{module}.weight", found.noted(TWICE) if inside else found)
    return Adapter(
        folder,
        (file, folder / CONFIG),
        factors,
        config,
        tensors,
        tuple(unhandled),
        tuple(
            Wrapped(module, tuple(layers[i] for i in sorted(layers)), _parameters(module, config))
            for module, layers in nested.items()
        ),
    )


def plain_factors(
    module: str, parts: Mapping[str, TensorInfo], config: AdapterConfig
) -> LoraFactors | str:
    """The factors of a layer's weight.

    Args:
        module: The layer.
        parts: What is stored of it.
        config: The adapter's configuration.

    Returns:
        The factors, or why they cannot be handled.
    """
    return _problem(module, parts, config) or _factors(module, parts, config)


def _parameters(module: str, config: AdapterConfig) -> tuple[str, ...]:
    """The parameters that ``target_parameters`` names in a module of this path, once each."""
    parts = module.split(".")
    owners = [".".join(parts[i:]) for i in range(len(parts) + 1)]
    found = dict.fromkeys(name for owner in owners for name in config.owned.get(owner, ()))
    if len(found) > MAX_PARAMETERS:
        raise AdapterError(
            f"{CONFIG}: target_parameters names {len(found)} parameters of {module!r:.100}, "
            f"expected at most {MAX_PARAMETERS}; mend it"
        )
    return tuple(found)


def _add(known: dict[K, T], name: K, value: T) -> None:
    """Put a value under its plain name, which only one may have."""
    if name in known:
        raise AdapterError(
            f"two tensors of {WEIGHTS} are the same part {name!r}: {known[name]} and {value}; "
            "keep one"
        )
    known[name] = value


def _unwrapped(name: str) -> str:
    """A name without the ``base_layer`` that PEFT puts between a module and its parameters."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _problem(module: str, parts: Mapping[str, TensorInfo], config: AdapterConfig) -> str | None:
    """Why the update of a module cannot be handled, None if it can."""
    if set(parts) - {MAGNITUDE} not in PAIRS:
        return _no_pair(parts)
    A, B = _pair(parts)
    if not _fit_together(A.shape, B.shape):
        return f"factors that do not fit together: A {A.shape}, B {B.shape}"
    if config.use_dora != (MAGNITUDE in parts):
        return f"{CONFIG} and the file disagree on a magnitude: DoRA or not is in doubt"
    if MAGNITUDE in parts and parts[MAGNITUDE].size != B.shape[0]:
        return f"a magnitude of shape {parts[MAGNITUDE].shape} for {B.shape[0]} outputs"
    if strange := {info.dtype for info in parts.values()} - set(FLOATING):
        return f"{', '.join(sorted(strange))} tensor: not a floating-point weight"
    rank = config.ranks.value(module, config.r)
    if rank != A.shape[0]:
        return (
            f"factors of rank {A.shape[0]} where {CONFIG} says {rank:g}: their scale is in doubt; "
            "correct r there, or take the configuration that was saved with these factors"
        )
    return None


def _no_pair(parts: Mapping[str, TensorInfo]) -> str:
    """What to say of parts that are not one pair of factors."""
    found = f"expected one pair of factors A and B, found {', '.join(sorted(parts))}"
    for pair in PAIRS:
        if len(missing := pair - set(parts)) == 1 and set(parts) - {MAGNITUDE} < pair:
            return (
                f"{found}: {missing.pop()} is missing beside it; save the adapter again, or leave "
                "this layer out with --exclude"
            )
    return found


def _factors(module: str, parts: Mapping[str, TensorInfo], config: AdapterConfig) -> LoraFactors:
    """The factors of a module with their scale, by PEFT's rules."""
    A, B = _pair(parts)
    found = LoraFactors(
        A,
        B,
        config.scale(module, A.shape[0]),
        embedding="lora_embedding_A" in parts,
        fan_in_fan_out=config.fan_in_fan_out,
        magnitude=parts.get(MAGNITUDE),
        note=DORA if MAGNITUDE in parts else None,
    )
    return found.noted(*config.conflicts(module))


def _pair(parts: Mapping[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo]:
    """A and B."""
    A, B = (parts[name] for name in sorted(parts) if name != MAGNITUDE)
    return A, B


def _fit_together(A: tuple[int, ...], B: tuple[int, ...]) -> bool:
    """Whether A can be ``(r, in, …)`` and B ``(out, r)``, a kernel of size one of a convolution."""
    alike = 2 <= len(A) == len(B) <= 5
    return alike and A[0] == B[1] > 0 and all(size == 1 for size in B[2:])
