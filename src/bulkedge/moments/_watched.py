"""Which layers of a model have inputs to be measured, and what they are called without wrappers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._globs import unwrapped

from ._inputs import input_width

ADDITIVE = (
    "peft.tuners.lora.",
    "peft.tuners.adalora.",
    "peft.tuners.loha.",
    "peft.tuners.lokr.",
    f"{__name__.partition('.')[0]}.",  # methods of this library
)
"""Where the adapters are defined whose ``get_delta_weight`` is what they add."""


def plain_name(name: str) -> str:
    """The path of a layer in the model that was wrapped by PEFT or a training library.

    Args:
        name: Such as ``base_model.model.encoder.0.query.base_layer``.

    Returns:
        ``encoder.0.query``.

    Example:
        >>> plain_name("base_model.model.encoder.0.query.base_layer")
        'encoder.0.query'
    """
    name = unwrapped(name).removeprefix("module.").removeprefix("base_model.model.")
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return "" if name == "base_layer" else name


def watched(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with inputs, those that an adapter has added left out.

    Args:
        model: Any module, wrapped or not.

    Returns:
        Layers by their plain paths; two that would have one keep their full ones.

    Raises:
        InputError: If there is none, or the model was compiled.

    Example:
        >>> list(watched(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
        ['0']
    """
    added = tuple(_added(model))
    full = {
        name: layer
        for name, layer in model.named_modules()
        if input_width(layer) is not None and not f"{name}.".startswith(added)
    }
    if not full:
        raise InputError("expected a model with linear layers, got one without any")
    shared = Counter(map(plain_name, full))
    return {(n if shared[plain_name(n)] > 1 else plain_name(n)): x for n, x in full.items()}


def unmeasured(model: nn.Module) -> list[str]:
    """The weights that no layer of a model applies to inputs which could be measured.

    Args:
        model: Any module.

    Returns:
        Names of parameters of two or more dimensions: stacked experts, the fused projection of
        ``nn.MultiheadAttention``, convolutions in groups.

    Example:
        >>> unmeasured(nn.MultiheadAttention(2, 1))
        ['in_proj_weight']
    """
    layers = (name for name, layer in model.named_modules() if input_width(layer) is not None)
    known = (*_added(model), *(f"{name}." if name else "" for name in layers))
    weights = model.named_parameters()
    return [name for name, weight in weights if weight.ndim > 1 and not name.startswith(known)]


def weight_in_use(model: nn.Module, layer: nn.Module) -> Tensor | None:
    """The weight that a layer of a model runs with, what an active adapter adds included.

    Args:
        model: Any module, wrapped by PEFT or not.
        layer: A layer of it.

    Returns:
        Shaped like the layer's weight; None of an adapter that does more than add to it.
    """
    weight = cast("Tensor", layer.weight)
    wrapper = next((x for x in model.modules() if getattr(x, "base_layer", None) is layer), None)
    if wrapper is None or getattr(wrapper, "merged", False):
        return weight
    if getattr(wrapper, "disable_adapters", False):
        return weight
    wrapper = cast("Any", wrapper)
    tables = [getattr(wrapper, name, {}) for name in getattr(wrapper, "adapter_layer_names", ())]
    active = [x for x in getattr(wrapper, "active_adapters", ()) if any(x in t for t in tables)]
    if not type(wrapper).__module__.startswith(ADDITIVE):
        return None
    for adapter in active:
        if getattr(wrapper, "use_dora", {}).get(adapter):
            return None
        added = wrapper.get_delta_weight(adapter)
        if added.shape != weight.shape:
            return None
        weight = weight + added.to(weight)
    return weight


def check_weight(name: str, weight: object) -> None:
    """Raise unless the numbers of a weight are at hand.

    Args:
        name: Of its layer.
        weight: It.

    Raises:
        InputError: If it is packed, or on the meta device.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise InputError(f"{name}: its weight is packed; load the model unquantised to measure it")
    if weight.is_meta:
        raise InputError(
            f"{name}: its weight is on the meta device; load the model onto devices that hold it"
        )


def _added(model: nn.Module) -> Iterator[str]:
    """The prefixes of modules that PEFT has put beside those of the model."""
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule":
            raise InputError(
                "expected a model before torch.compile, which drops hooks; give the original one"
            )
        below = {child for child, _ in module.named_children()}
        # by class: a module of one's own may have children of these names
        if not any(kind.__module__.startswith("peft.") for kind in type(module).__mro__):
            continue
        added = below if "modules_to_save" in below else below - {"base_layer"}
        if "base_layer" in below or "modules_to_save" in below:
            yield from (f"{name}.{child}." if name else f"{child}." for child in added)
