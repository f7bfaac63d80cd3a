"""A PEFT LoRA adapter folder, as the updates that it makes to base tensors.

PEFT stores A as r×in and B as out×r; the update of a linear layer is ``s·B·A`` with s = α/r, or
α/√r under ``use_rslora`` (Hu et al., arXiv:2106.09685; Kalajdzievski, arXiv:2312.03732).  For an
embedding, ``(vocab, dim)``, it is the transpose, ``s·Aᵀ·Bᵀ``.  What an adapter holds besides, or
holds in a way that cannot be added to the base as a matrix, is listed with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from bulkedge._errors import AdapterError

from .adapter import Adapter, Unhandled
from .adapter_config import CONFIG, AdapterConfig, checked_config
from .experts import Wrapped
from .format import PART_OF_A_METHOD, WEIGHTS, AdapterFormat, Place, plain_name
from .header import FLOATING, TensorInfo
from .lora import CONVERT, FROM_THE_BASE, LoraFactors
from .of_base import OfBase, replaced_rows
from .update import StoredUpdate

LORA_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_[A-Za-z_]+)(\.default)?(?P<leaf>\.weight|\.bias)?"
)
REPLACED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
"""What some versions of PEFT leave in the name of a module that the adapter replaces."""
PAIRS = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})
MAGNITUDE = "lora_magnitude_vector"
DORA = "DoRA: each output is also scaled, the update is of full rank"
ONE_RANK = "MultiheadAttention: PEFT keeps one rank for in_proj and out_proj, and adds twice"
TWICE = "PEFT adds the update of out_proj twice, in training and in merging; judged once"
NOT_FROM_THE_BASE = "{} of bare parameters or of one module inside another: not handled; " + CONVERT
MAX_PARAMETERS = 64

K = TypeVar("K")
T = TypeVar("T")


def open_peft(place: Place) -> Adapter:
    """Read the configuration and the header of a PEFT LoRA adapter.

    Args:
        place: The adapter folder, or the ``adapter_model.safetensors`` in it.

    Returns:
        The adapter; no tensor has been read.

    Raises:
        AdapterError: If it is not a LoRA adapter, its base is not the model on disk, or a file is
            missing or bad.
    """
    config = checked_config(place.settings, place.folder / CONFIG, in_a_folder=True)
    return _sort(place, config)


def _sort(place: Place, config: AdapterConfig) -> Adapter:
    """Sort the stored tensors into updates, replacements and what is not handled."""
    factors, rows, lost = _replaced_rows(place)
    modules, tensors, unhandled = _by_kind(
        {k: v for k, v in place.tensors.items() if k not in rows}
    )
    unhandled += lost
    nested: dict[str, dict[int, dict[str, TensorInfo]]] = {}
    for path, parts in modules.items():
        module = _unwrapped(path)
        if config.initial and (_parameters(module, config) or ".base_layer." in path):
            reason = NOT_FROM_THE_BASE.format(FROM_THE_BASE[config.initial])
            unhandled += [Unhandled(info, f"{module}.weight", reason) for info in parts.values()]
        elif _parameters(module, config):
            _add(nested.setdefault(module, {}), path.count(".base_layer"), parts)
        elif isinstance(found := plain_factors(module, parts, config), str):
            unhandled += [Unhandled(info, f"{module}.weight", found) for info in parts.values()]
        else:
            # PEFT wraps one module inside another: out_proj of MultiheadAttention
            inside = ".base_layer." in path.removesuffix(".base_layer")
            found = replace(found.noted(TWICE), fixed=ONE_RANK) if inside else found
            _add(factors, f"{module}.weight", found)
    wrapped = tuple(
        Wrapped(module, tuple(layers[i] for i in sorted(layers)), _parameters(module, config))
        for module, layers in nested.items()
    )
    adapter = place.adapter(
        factors=factors,
        config=config,
        tensors=tensors,
        unhandled=tuple(unhandled),
        wrapped=wrapped,
    )
    if not config.initial:
        return adapter
    initialised = f"initialised by {FROM_THE_BASE[config.initial]}"
    return replace(adapter, origin=f"{adapter.origin}, {initialised}")


PEFT_LORA = AdapterFormat(claims=lambda place: place.configured, open=open_peft)
"""The format of PEFT's LoRA.  It claims every ``adapter_config.json``, and refuses other methods by
name."""


def _replaced_rows(place: Place) -> tuple[dict[str, StoredUpdate], set[str], list[Unhandled]]:
    """Trainable tokens beside a LoRA: updates by name, the names of all their tensors, the rest."""
    factors: dict[str, StoredUpdate] = {}
    names, lost = set[str](), list[Unhandled]()
    said = place.settings.get("trainable_token_indices")
    for key, info in place.tensors.items():
        module, found, _ = plain_name(key).partition(".token_adapter.")
        if not found:
            continue
        names.add(key)
        name, tokens = f"{_unwrapped(module)}.weight", said
        if isinstance(said, dict):
            tokens = next((said[k] for k in said if f".{name}".endswith(f".{k}.weight")), None)
        update = replaced_rows(info, tokens)
        if isinstance(update, str):
            lost.append(Unhandled(info, name, update))
        else:
            _add(factors, name, update)
    return factors, names, lost


def _by_kind(
    stored: Mapping[str, TensorInfo],
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo], list[Unhandled]]:
    """The parts of low-rank updates by module, full tensors by name, and what is neither."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, TensorInfo] = {}
    unhandled: list[Unhandled] = []
    for key, info in stored.items():
        name = plain_name(key)
        lora = LORA_KEY.fullmatch(name)
        if lora and lora["leaf"] != ".bias":
            _add(modules.setdefault(lora["module"], {}), lora["part"], info)
        elif lora:
            module = _unwrapped(lora["module"])
            unhandled.append(Unhandled(info, f"{module}.bias", "1-D tensor: not a matrix", True))
        elif (found := _unknown(name, info)) is not None:
            unhandled.append(found)
        else:
            _add(tensors, REPLACED.sub("", _unwrapped(name)), info)
    return modules, tensors, unhandled


def _unknown(name: str, info: TensorInfo) -> Unhandled | None:
    """A part of an adapter method that is not handled; None for any other tensor."""
    if PART_OF_A_METHOD.search(name):
        reason = "a part of an unknown adapter method"
        return Unhandled(info, _unwrapped(name), reason)
    return None


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
            f"expected at most {MAX_PARAMETERS}; correct it"
        )
    return tuple(found)


def _add(known: dict[K, T], name: K, value: T) -> None:
    """Put a value under its plain name, which only one may have."""
    if name in known:
        raise AdapterError(
            f"two tensors of {WEIGHTS} are the same part {name!r}: {_tensors(known[name])} and "
            f"{_tensors(value)}; keep one"
        )
    known[name] = value


def _tensors(part: Any) -> str:
    """The names of the tensors of a part, for a message."""
    infos: Iterable[TensorInfo] = part.infos if isinstance(part, LoraFactors | OfBase) else part
    if isinstance(part, TensorInfo | Mapping):
        infos = [part] if isinstance(part, TensorInfo) else part.values()
    return ", ".join(repr(info.name) for info in infos)


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
    if config.initial and len(A.shape) > 2:
        return NOT_FROM_THE_BASE.format(FROM_THE_BASE[config.initial])
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
    embedding = "lora_embedding_A" in parts  # whose initialisation is PEFT's usual one
    found = LoraFactors(
        A,
        B,
        config.scale(module, A.shape[0]),
        embedding=embedding,
        initial=None if embedding else config.initial,
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
