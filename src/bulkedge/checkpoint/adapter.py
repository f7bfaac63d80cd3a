"""A PEFT LoRA adapter folder, as the updates that it makes to base tensors.

PEFT stores A as r×in and B as out×r; the update of a linear layer is ``s·B·A`` with s = α/r, or
α/√r under ``use_rslora`` (Hu et al., arXiv:2106.09685; Kalajdzievski, arXiv:2312.03732).  For an
embedding, ``(vocab, dim)``, it is the transpose, ``s·Aᵀ·Bᵀ``.  What an adapter holds besides, or
holds in a way that cannot be added to the base as a matrix, is listed with the reason.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bulkedge._errors import AdapterError, problems
from bulkedge._globs import unwrapped

from .experts import BY_UNSLOTH, Wrapped
from .factors import LoraFactors
from .header import EMPTY, FLOATING, TensorInfo, read_header
from .patterns import Patterns
from .read import PICKLES, confined, convert, read_json, weights_beside

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LORA_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_[A-Za-z_]+)(\.default)?(?P<leaf>\.weight|\.bias)?"
)
# what some versions of PEFT leave in the name of a module that the adapter replaces
REPLACED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
PART_OF_A_METHOD = re.compile(r"(^|\.)(lora|hada|lokr|vera|oft|boft|ia3|hra|adalora|glora)_")
PAIRS = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})
MAGNITUDE = "lora_magnitude_vector"
DORA = "DoRA: each output is scaled besides, the update is of full rank"
TWICE = "PEFT adds the update of out_proj twice, in training and in merging; judged once"
# initialisations that also change the base: the file is then relative to a base nobody stores
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# variants of which W0 + s·B·A is not the tuned weight, by the field that asks for them
NOT_A_SUM = {
    "kasa_config": "KaSA, which truncates the base",
    "layer_replication": "layer_replication, which changes the layers",
    "use_qalora": "QALoRA, which pools the inputs",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "alora_invocation_tokens": "aLoRA, which acts on some tokens only",
    "arrow_config": "Arrow, which mixes adapters by input",
}

MAX_PARAMETERS = 64

K = TypeVar("K")
T = TypeVar("T")
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class AdapterConfig(BaseModel):
    """The fields of ``adapter_config.json`` that say what the update is; others are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    peft_type: str
    r: Annotated[int, Field(ge=1, le=2**20, strict=True)] = 8
    lora_alpha: Number = 8
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, Number] | None = None
    alpha_pattern: dict[str, Number] | None = None
    init_lora_weights: Any = True
    target_parameters: list[str] | None = None
    lora_B_layout: Any = None
    unsloth_fused_expert_lora: Any = None
    auto_mapping: Any = None
    ensure_weight_tying: bool = False
    peft_version: str | None = None
    base_model_name_or_path: Any = None

    @cached_property
    def owned(self) -> dict[str, list[str]]:
        """What ``target_parameters`` names, by the path of the module, empty for any."""
        found: dict[str, list[str]] = {}
        for target in self.target_parameters or ():
            owner, _, parameter = target.rpartition(".")
            found.setdefault(owner, []).append(parameter)
        return found

    @cached_property
    def ranks(self) -> Patterns:
        """The ranks of modules that differ from ``r``."""
        return Patterns(self.rank_pattern or {}, f"{CONFIG}: rank_pattern")

    @cached_property
    def alphas(self) -> Patterns:
        """The alphas of modules that differ from ``lora_alpha``."""
        return Patterns(self.alpha_pattern or {}, f"{CONFIG}: alpha_pattern")

    def layouts(self, parameter: str) -> set[str]:
        """What is said of how B of experts is laid out: nothing, one thing, or several."""
        detail = self.unsloth_fused_expert_lora
        entries = detail.get("parameters") if isinstance(detail, dict) else None
        entry = entries.get(parameter) if isinstance(entries, dict) else None
        own = entry.get("lora_B_layout") if isinstance(entry, dict) else None
        found = (layout for layout in (self.lora_B_layout, own) if layout is not None)
        return {said if isinstance(said, str) else type(said).__name__ for said in found}

    @property
    def by_unsloth(self) -> bool:
        """Whether Unsloth wrote it, or trained it most likely."""
        mapping = self.auto_mapping if isinstance(self.auto_mapping, dict) else {}
        base = self.base_model_name_or_path
        fixed = mapping.get("unsloth_fixed") or self.unsloth_fused_expert_lora is not None
        return bool(fixed) or (isinstance(base, str) and bool(BY_UNSLOTH.search(base)))

    def scale(self, module: str, rank: int) -> float:
        """The number in front of ``B A``, by PEFT's rules."""
        alpha = self.alphas.value(module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def conflicts(self, module: str) -> list[str]:
        """Where two patterns say different things of a module."""
        found = (patterns.conflict(module) for patterns in (self.ranks, self.alphas))
        return [conflict for conflict in found if conflict]


@dataclass(frozen=True)
class Unhandled:
    """A stored tensor that is neither an update nor a replacement.

    Attributes:
        info: The tensor.
        name: What the base tensor would be called.
        reason: Why it is left out; of an empty tensor, whatever was said, that it is damaged.
        harmless: Whether nothing of the update of a weight is lost with it.
    """

    info: TensorInfo
    name: str
    reason: str
    harmless: bool = False

    def __post_init__(self) -> None:
        if self.info.empty:
            object.__setattr__(self, "reason", EMPTY)
            object.__setattr__(self, "harmless", False)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        path: Its folder.
        files: Its weights, and the configuration that has their scale.
        config: The checked part of its configuration.
        factors: Low-rank updates, by the name that the base tensor would have in the tuned model.
        tensors: Full tensors that replace the base's, by name: trained heads, embeddings.
        unhandled: Everything else, with the reason.
        wrapped: Updates of bare parameters, experts above all: which parameter is not told by
            name, and to be found from the base.
        flattened: Whether the names have underscores for dots, as kohya's scripts write them.
        beside: Weights files and indexes in the same folder that are no part of it.
    """

    path: Path
    files: tuple[Path, ...]
    config: AdapterConfig
    factors: Mapping[str, LoraFactors]
    tensors: Mapping[str, TensorInfo]
    unhandled: tuple[Unhandled, ...]
    wrapped: tuple[Wrapped, ...] = ()
    flattened: bool = False
    beside: tuple[str, ...] = ()
    kind = "lora"


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


def checked_config(content: Mapping[str, Any], source: Path | str) -> AdapterConfig:
    """A configuration, once it is known to say how an unchanged base is updated.

    Args:
        content: Its fields.
        source: Where they come from, for a message.

    Returns:
        The configuration.

    Raises:
        AdapterError: If a field is wrong, or the update is not ``s·B·A`` of that base.
    """
    try:
        config = AdapterConfig.model_validate(content)
    except ValidationError as error:
        raise AdapterError(f"{source}: {problems(error)}; save it again with PEFT") from None
    if config.peft_type != "LORA":
        raise AdapterError(
            f"{source}: a {config.peft_type!r:.40} adapter; only LORA is handled, merge it into "
            "the model and audit the merged checkpoint"
        )
    init = str(config.init_lora_weights).lower()
    if init.startswith(CHANGES_THE_BASE):
        raise AdapterError(
            f"{source}: initialised by {init!r:.40}, which changes the base weights too; save it "
            "with path_initial_model_for_weight_conversion, or audit the merged checkpoint"
        )
    for field, variant in NOT_A_SUM.items():
        if content.get(field):
            raise AdapterError(
                f"{source}: {field} is set: {variant}; its update is no matrix added to the base"
            )
    return config


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
            _add(tensors, REPLACED.sub("", _unwrapped(name)), info)
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
        config,
        factors,
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
            f"two tensors of {WEIGHTS} are the same part {name!r}: {_tensors(known[name])} and "
            f"{_tensors(value)}; keep one"
        )
    known[name] = value


def _tensors(part: Any) -> str:
    """The names of the tensors of a part, for a message."""
    if isinstance(part, TensorInfo):
        return repr(part.name)
    infos = part.values() if isinstance(part, Mapping) else part.infos
    return ", ".join(repr(info.name) for info in infos)


def _unwrapped(name: str) -> str:
    """A name without the ``base_layer`` that PEFT puts between a module and its parameters."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _problem(module: str, parts: Mapping[str, TensorInfo], config: AdapterConfig) -> str | None:
    """Why the update of a module cannot be handled, None if it can."""
    if set(parts) - {MAGNITUDE} not in PAIRS:
        return f"expected one pair of factors A and B, found {', '.join(sorted(parts))}"
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
        return f"factors of rank {A.shape[0]} where {CONFIG} says {rank:g}: their scale is in doubt"
    return None


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
