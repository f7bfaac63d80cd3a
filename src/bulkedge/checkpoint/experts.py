"""Updates of bare parameters, as PEFT stores them for ``target_parameters``.

Such an update is named after the module that holds the parameter, not after the parameter; of two
in one module, the outer one has the module's name and the inner one ``base_layer`` behind it.  PEFT
wraps a module's parameters in the order they were registered, the first innermost.  Which is
which follows from shapes, else from the order in which transformers registers them.

PEFT took the stored ``(experts, p, q)`` for ``(experts, in, out)`` until 0.19.0, and takes it for
``(experts, out, in)`` since 0.19.1, unless the module says that it is transposed.  0.19.0 alone
took it for ``(experts, out, in)`` where the module says so.

Column j of B belongs to expert ``j % E`` in PEFT.  Unsloth trained with ``j // r`` for a while, and
later began to write into the configuration which of the two holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import permutations

from .adapter_config import AdapterConfig
from .header import FLOATING, TensorInfo
from .lora import LoraFactors
from .update import StoredUpdate

Shape = tuple[int, ...]

REGISTERED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""The order in which transformers registers the parameters of experts."""

FLIPPED_BEFORE = (0, 19, 1)
"""The first version of PEFT that takes a stack for ``(experts, out, in)``."""
INVERTED = (0, 19, 0)
"""The version that does so where a model says the opposite, and nowhere else."""

SAY_TRANSPOSED = ("aria", "gpt_oss", "openai_privacy_filter")
"""Models whose experts are marked for PEFT as stored ``(in, out)``."""

MAX_NESTED = 5
GROUPED, RANK_MAJOR = "grouped_by_expert", "rank_major"
SAY_LAYOUT = (
    f'put "lora_B_layout": "{GROUPED}" (column j belongs to expert j // r) or "{RANK_MAJOR}" '
    "(j % experts, as PEFT reads it) into adapter_config.json, or merge the adapter where it was "
    "trained and audit the merged checkpoint"
)


@dataclass(frozen=True)
class Wrapped:
    """The stored factors of a module of which PEFT may have updated bare parameters.

    Attributes:
        module: Its path.
        layers: The factors, outermost first: ``{"lora_A": …, "lora_B": …}``.
        parameters: What ``target_parameters`` names in a module of that path.
    """

    module: str
    layers: tuple[Mapping[str, TensorInfo], ...]
    parameters: tuple[str, ...]

    @property
    def infos(self) -> list[TensorInfo]:
        """All stored tensors."""
        return [info for layer in self.layers for info in layer.values()]

    def may_fit(self, shape: Shape) -> bool:
        """Whether one of the layers can be the update of a parameter of that shape."""
        return any(_flips(layer, shape) for layer in self.layers)


@dataclass(frozen=True)
class Target:
    """A parameter of the base.

    Attributes:
        shape: Its shape.
        transposed: Whether it holds ``(in, out)``.
    """

    shape: Shape
    transposed: bool


def assign(
    wrapped: Wrapped, targets: Mapping[str, Target], config: AdapterConfig, model_type: str
) -> Mapping[str, StoredUpdate] | str:
    """Which layer of factors updates which parameter of a module, and how.

    Args:
        wrapped: The factors.
        targets: The module's parameters that ``target_parameters`` names, by their name.
        config: The adapter's configuration.
        model_type: The base's, empty if it is not known.

    Returns:
        The factors by parameter, or why they are ambiguous.
    """
    if len(targets) != len(wrapped.layers) or len(targets) > MAX_NESTED:
        return (
            f"{len(wrapped.layers)} pairs of factors for {len(targets)} parameters "
            f"({', '.join(targets) or 'none of target_parameters'}): it is ambiguous which is which"
        )
    fitting = [
        dict(zip(order, wrapped.layers, strict=True))
        for order in permutations(targets)
        if all(
            _flips(layer, targets[name].shape)
            for name, layer in zip(order, wrapped.layers, strict=True)
        )
    ]
    if len(fitting) > 1:
        fitting = [found for found in fitting if _as_registered(list(found))]
    if len(fitting) != 1:
        shapes = ", ".join(f"{name} {target.shape}" for name, target in targets.items())
        return f"factors that do not show which parameter they update: {shapes}"
    return _factors_of(wrapped, fitting[0], targets, config, model_type)


def _factors_of(
    wrapped: Wrapped,
    found: Mapping[str, Mapping[str, TensorInfo]],
    targets: Mapping[str, Target],
    config: AdapterConfig,
    model_type: str,
) -> dict[str, LoraFactors] | str:
    """The factors of each parameter with their scale, by PEFT's rules."""
    result = {}
    for name, layer in found.items():
        key, target = f"{wrapped.module}.{name}", targets[name]
        A, B = layer["lora_A"], layer["lora_B"]
        if strange := {A.dtype, B.dtype} - set(FLOATING):
            return f"{', '.join(sorted(strange))} tensor: not a floating-point weight"
        experts = target.shape[0] if len(target.shape) == 3 else 0
        rank = A.shape[0] // (experts or 1)
        if config.ranks.value(key, config.r) != rank:
            return f"factors of rank {rank} an expert, another one is configured: scale in doubt"
        flipped = _flipped(layer, target, config.peft_version, model_type)
        update = LoraFactors(A, B, config.scale(key, rank), experts=experts, flipped=flipped)
        grouped = _grouped(name, update, config)
        if isinstance(grouped, str):
            return grouped
        result[name] = replace(update, grouped=grouped).noted(*config.conflicts(key))
    return result


def _grouped(name: str, update: LoraFactors, config: AdapterConfig) -> bool | str:
    """Whether B holds one expert after the other; or why that is ambiguous."""
    stated = config.layouts(name)
    if stated == {GROUPED}:
        return True
    matters = update.experts > 1 and update.rank > 1  # otherwise both layouts coincide
    if not matters or stated == {RANK_MAJOR}:
        return False
    if stated:
        found = ", ".join(sorted(f"{layout!r:.40}" for layout in stated))
        return f"adapter_config.json gives the layout of lora_B of {name} as {found}; {SAY_LAYOUT}"
    if config.by_unsloth:
        return (
            f"the layout of lora_B of {name} is ambiguous: the adapter is by Unsloth, which has "
            f"used two, and adapter_config.json does not say which; {SAY_LAYOUT}"
        )
    return False


def _flips(layer: Mapping[str, TensorInfo], shape: Shape) -> set[bool]:
    """In which ways factors can be the update of a parameter: as ``B A``, as its transpose."""
    if set(layer) != {"lora_A", "lora_B"} or not 2 <= len(shape) <= 3:
        return set()
    A, B = layer["lora_A"].shape, layer["lora_B"].shape
    experts = shape[0] if len(shape) == 3 else 1
    if len(A) != 2 or len(B) != 2 or A[0] != B[1] or A[0] == 0 or experts == 0 or A[0] % experts:
        return set()
    p, q = shape[-2:]
    straight, flipped = (B[0], A[1]) == (p, q), (A[1], B[0]) == (p, q)
    ways = {False} if straight else set()
    # PEFT has taken only stacks for (in, out)
    return ways | {True} if flipped and len(shape) == 3 else ways


def _flipped(
    layer: Mapping[str, TensorInfo], target: Target, version: str | None, model_type: str
) -> bool:
    """Whether the update of the matrix as ``(out, in)`` is the transpose of ``B A``."""
    ways = _flips(layer, target.shape)
    as_stored = next(iter(ways))
    if len(ways) == 2:  # a square matrix fits both ways: the version of PEFT decides
        said, by = model_type.startswith(SAY_TRANSPOSED), _version(version)
        as_stored = not said if by == INVERTED else by < FLIPPED_BEFORE or said
    return as_stored != target.transposed


def _version(text: str | None) -> tuple[int, ...]:
    """The three numbers of a version; zeros of one so old that it did not write it."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", text or "")
    return tuple(int(number or 0) for number in found.groups()) if found else (0, 0, 0)


def _as_registered(outermost_first: list[str]) -> bool:
    """Whether parameters are nested in the order in which transformers registers them."""
    if not set(outermost_first) <= set(REGISTERED):
        return False
    places = [REGISTERED.index(name) for name in outermost_first]
    return places == sorted(places, reverse=True)
