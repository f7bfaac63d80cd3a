"""PEFT's LoRA layers as adapted matrices that are found anew whenever they are used.

What happens to a model after something was built to watch it replaces its parameters or their
numbers: ``fully_shard``, ``load_state_dict(assign=True)``, a change of dtype, another module in
the place of one.  So nothing of a layer is kept but its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from bulkedge._errors import InputError

from ._matrix import AdaptedMatrix, require_in_memory

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module", "module")
"""Where wrappers of torch keep what they wrap."""
MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of PEFT that write into the base."""


class LoraMatrix(AdaptedMatrix):
    """A LoRA layer of a model, by its name.

    Args:
        model: What holds the layer.
        name: Of the layer in the model.
        adapter: Which of its adapters.
        asked: Whether the caller named the adapter; else it must stay the active one.

    Raises:
        InputError: If it is not of the form ``W0 + s·B·A`` with the W0 that was pretrained; or,
            when it is used later, if the layer or the adapter is gone or another one.
    """

    def __init__(self, model: nn.Module, name: str, adapter: str, *, asked: bool) -> None:
        self.name = name
        self.scaling = self._scaling
        self._model, self._adapter, self._asked = model, adapter, asked
        self._shapes: list[tuple[int, ...]] = []
        layer = self._layer()
        _require_unmoved(name, _config_of(model, name, adapter))
        if getattr(layer.get_base_layer(), "groups", 1) != 1:
            raise InputError(f"{name}: expected a convolution without groups; leave it out")
        self._shapes = [tuple(x.shape) for x in self.parameters]

    @property
    def base(self) -> Tensor:
        """W0, shape ``(m, n)``: a view of what the model holds, or a copy where that is packed."""
        layer = self._layer()
        module = layer.get_base_layer()
        base = _weight(self.name, module)
        if self._is_table(layer) or getattr(layer, "fan_in_fan_out", False):
            base = base.T
        base = require_in_memory(self.name, base.detach().flatten(1))
        if tuple(base.shape) != self.shape:
            raise InputError(
                f"{self.name}: expected a base of shape {self.shape}, that of its update, got "
                f"{tuple(base.shape)}"
            )
        return base

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        """B and A as they are trained; those of a convolution have more dimensions."""
        layer = self._layer()
        if self._is_table(layer):
            found = layer.lora_embedding_B[self._adapter], layer.lora_embedding_A[self._adapter]
        else:
            found = layer.lora_B[self._adapter].weight, layer.lora_A[self._adapter].weight
        shapes = [tuple(x.shape) for x in found]
        if self._shapes and shapes != self._shapes:
            raise self._lost(f"factors of shapes {shapes}, which were {self._shapes}")
        return found

    def settle(self) -> None:
        """Free the gathered copies in which FSDP2 leaves parameters after a forward pass.

        What is written into such a copy is lost with it.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        from torch.distributed.fsdp import FSDPModule

        path = self.name.split(".")
        for depth in range(len(path) + 1):
            module = self._model.get_submodule(".".join(path[:depth]))
            if isinstance(module, FSDPModule):
                module.reshard()

    @property
    def trained(self) -> tuple[bool, bool]:
        """Whether B and A may be changed: those that require a gradient."""
        B, A = (x.requires_grad for x in self.parameters)
        return B, A

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        B, A = (torch.Size(x) for x in self._shapes)
        return B[0], A[1:].numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products."""
        stored = self._layer().get_base_layer().weight.dtype
        return torch.float64 if stored is torch.float64 else torch.float32

    def _scaling(self) -> float:
        return self._layer().scaling[self._adapter]

    def _is_table(self, layer: Any) -> bool:
        """Whether it is an embedding, whose factors PEFT keeps as bare parameters."""
        return self._adapter in layer.lora_embedding_A

    def _layer(self) -> Any:
        """The layer as it is now; InputError if it is not the one that was found before."""
        layer: Any = _module(self._model, self.name)
        if layer is None:
            raise self._lost("no such module")
        if not _is_lora(layer):
            raise self._lost(f"a {type(layer).__name__} without LoRA factors")
        if self._adapter not in layer.scaling:
            raise self._lost(f"no adapter {self._adapter!r}, which was deleted")
        if not self._asked and (active := _active(layer)) != [self._adapter]:
            raise InputError(
                f"{self.name}: expected the adapter {self._adapter!r} to be the active one, got "
                f"{', '.join(active) or 'none'}; switch back before the step, or name the adapter "
                "that is meant with adapter="
            )
        if what := _other_than_plain(layer, self._adapter):
            raise InputError(
                f"{self.name}: expected W0 + s·B·A, got {what}; leave it out with modules="
            )
        return layer

    def _lost(self, found: str) -> InputError:
        """What was watched is not there any more."""
        return InputError(
            f"{self.name}: expected the LoRA layer that was found when this was built, got "
            f"{found}; build it again after the model is changed"
        )


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The LoRA layers of a model with their names; none where PEFT is not installed."""
    return [(name, layer) for name, layer in model.named_modules() if _is_lora(layer)]  # pyright: ignore


def adapter_of(name: str, layer: Any, adapter: str | None) -> str | None:
    """Which adapter of a layer is meant; None if the layer has no part of it."""
    if adapter is not None:
        return adapter if adapter in layer.scaling else None
    active = _active(layer)
    if len(active) > 1:
        raise InputError(f"{name}: {len(active)} adapters are active; name one with adapter=")
    return active[0] if active else None


def _is_lora(layer: nn.Module) -> bool:
    """Whether a module is one of PEFT's LoRA layers."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return False
    return isinstance(layer, LoraLayer)


def _active(layer: Any) -> list[str]:
    """The active adapters that a layer has."""
    return [known for known in layer.active_adapters if known in layer.scaling]


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """A module by its name, without wrappers put around it since; None if it is gone."""
    try:
        module: Any = model.get_submodule(name)  # wrappers on the way pass the name on
    except AttributeError:
        return None
    while not _is_lora(module):
        inner = (x for key in WRAPPED if (x := module._modules.get(key)) is not None)
        module = next(inner, None)
        if module is None:
            return model.get_submodule(name)
    return module


def _config_of(model: nn.Module, name: str, adapter: str) -> Any:
    """The configuration by which PEFT made an adapter: that of the nearest module that has one."""
    module: Any = model
    found = None
    for part in ("", *name.split(".")):
        module = getattr(module, part) if part else module
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            found = configs.get(adapter, found)
    if found is None:
        raise InputError(
            f"{name}: expected the configuration of the adapter {adapter!r}, which says how its "
            "factors began, got none; give the model that PEFT wrapped, not a part of it, and "
            "choose layers with modules="
        )
    return found


def _require_unmoved(name: str, config: Any) -> None:
    """InputError where the base is not the pretrained one."""
    init = str(getattr(config, "init_lora_weights", ""))
    if init.lower().startswith(MOVED_BASE):
        raise InputError(
            f"{name}: expected W0 + s·B·A, got init_lora_weights={init!r}, which moved the base; "
            "leave it out with modules="
        )


def _other_than_plain(layer: Any, adapter: str) -> str | None:
    """What the layer computes, if it is not ``W0 + s·B·A``."""
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if isinstance(layer, (MultiheadAttention, ParamWrapper)):
        return f"a {type(layer).__name__}, whose factors are of several matrices"
    if layer.merged:
        return "a merged adapter: unmerge it"
    if layer.use_dora.get(adapter):
        return "DoRA, whose rows are scaled as well"
    if variant is not None:
        return f"a LoRA variant ({type(variant).__name__})"
    return None


def _weight(name: str, module: nn.Module) -> Tensor:
    """The base weight, dequantised where it is packed."""
    weight: Any = module.weight
    require_in_memory(name, weight)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1:
        return weight
    from peft.utils.integrations import dequantize_module_weight

    try:
        return dequantize_module_weight(module)
    except Exception as error:
        raise InputError(f"{name}: the base weight cannot be dequantised ({error})") from error
