"""PEFT's LoRA layers as adapted matrices that are looked up by name at every use.

A model may change after a holder was built on it: ``fully_shard``, ``load_state_dict(assign=True)``
and a change of dtype replace its parameters, and a module may be replaced by another one.  So a
:class:`LoraMatrix` keeps the name of its layer, and no parameter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from bulkedge._errors import InputError
from bulkedge._linmap import LinearMap

from ._matrix import AdaptedMatrix, product_dtype, require_in_memory
from ._strips import strips_of

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module", "module")
"""The attributes in which wrappers of torch keep the module that they wrap."""
CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of PEFT that write into the base weight."""


@dataclass
class _Kept:
    """What was found of a layer, while it is looked up once."""

    layer: Any = None
    parameters: tuple[Tensor, Tensor] | None = None
    is_checked: bool = False


class LoraMatrix(AdaptedMatrix):
    """A LoRA layer of a model, by its name.

    Args:
        model: The model with the layer.
        name: The name of the layer in the model.
        adapter: Which of its adapters.
        is_explicit: Whether the caller named the adapter; if not, it must stay the active one.
        path: The path of the layer in the model; ``name`` if None.

    Raises:
        InputError: If the layer does not compute ``W0 + s·B·A`` with the pretrained W0; or, at a
            later use, if the layer or the adapter is gone or replaced by one that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        adapter: str,
        *,
        is_explicit: bool,
        path: str | None = None,
    ) -> None:
        self.name, self.path = name, name if path is None else path
        self.scaling = self._scaling
        self._model, self._adapter, self._is_explicit = model, adapter, is_explicit
        self._shapes: list[tuple[int, ...]] = []
        self._kept: _Kept | None = None
        self.check()
        layer = self._layer()
        self._require_base(config_of(model, self.path, adapter))
        if getattr(layer.get_base_layer(), "groups", 1) != 1:
            raise InputError(f"{name}: expected a convolution without groups; leave it out")
        if self._is_table(layer):
            self.side = "right"
        self._shapes = [tuple(x.shape) for x in self.parameters]

    def _require_base(self, config: Any) -> None:
        """InputError if PEFT changed the base when it made the adapter."""
        init = str(getattr(config, "init_lora_weights", ""))
        if init.lower().startswith(CHANGE_BASE):
            raise InputError(
                f"{self.name}: expected W0 + s·B·A, got init_lora_weights={init!r}, which moved "
                "the base; initialise otherwise, or train without this and audit the result; "
                "exclude= leaves out single layers"
            )

    @property
    def base(self) -> Tensor:
        """W0, shape ``(m, n)``: a view of the weight in the model, or an unpacked copy of it."""
        self.check()
        base = require_in_memory(self.name, self._acting(self._layer()).detach())
        if tuple(base.shape) != self.shape:
            raise InputError(
                f"{self.name}: expected a base of shape {self.shape}, that of its update, got "
                f"{tuple(base.shape)}"
            )
        return base

    def base_map(self) -> LinearMap:
        """W0 as a map; of a large base that is packed some rows are unpacked at a time."""
        self.check()
        layer = self._layer()
        if not self._is_table(layer) and not getattr(layer, "fan_in_fan_out", False):
            strips = strips_of(layer.get_base_layer(), self.shape, self.dtype)
            if strips is not None:
                return strips
        return super().base_map()

    def _acting(self, layer: Any) -> Tensor:
        """The base weight as it acts on inputs, unpacked if it is packed."""
        base = _weight(self.name, layer.get_base_layer())
        if self._is_table(layer) or getattr(layer, "fan_in_fan_out", False):
            base = base.T
        return base.flatten(1)

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        """B and A in the shapes in which they are trained; convolutions have more dimensions."""
        kept = self._kept
        if kept is not None and kept.parameters is not None:
            return kept.parameters
        found = self._found(self._layer())
        shapes = [tuple(x.shape) for x in found]
        if self._shapes and shapes != self._shapes:
            raise self._changed(f"factors of shapes {shapes}, which were {self._shapes}")
        if kept is not None and not _has_processes():  # FSDP2 exchanges them when it gathers
            kept.parameters = found
        return found

    def keep_lookups(self, keep: bool) -> None:
        """See :meth:`AdaptedMatrix.keep_lookups`."""
        self._kept = _Kept() if keep else None

    def _found(self, layer: Any) -> tuple[Tensor, Tensor]:
        """B and A as the layer has them now."""
        if self._is_table(layer):
            return layer.lora_embedding_B[self._adapter], layer.lora_embedding_A[self._adapter]
        return layer.lora_B[self._adapter].weight, layer.lora_A[self._adapter].weight

    def prepare_factors(self) -> None:
        """Check that the layer computes ``W0 + s·B·A`` with this adapter, and free gathered copies.

        FSDP2 leaves gathered copies of parameters after a forward pass, and drops them later: a
        change that was written into such a copy would be lost.
        """
        self.check()
        if not _has_processes():
            return
        from torch.distributed.fsdp import FSDPModule

        path = self.path.split(".")
        for depth in range(len(path) + 1):
            module = self._model.get_submodule(".".join(path[:depth]))
            if isinstance(module, FSDPModule):
                module.reshard()

    @property
    def trained(self) -> tuple[bool, bool]:
        """Whether B and A may be changed, which is whether they require a gradient."""
        B, A = self.parameters
        return B.requires_grad, A.requires_grad

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        B, A = (torch.Size(x) for x in self._shapes)
        return B[0], A[1:].numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which products are computed."""
        return product_dtype(self._stored(self._layer()).dtype)

    @property
    def stored_dtype(self) -> torch.dtype:
        """See :attr:`AdaptedMatrix.stored_dtype`; float32 of a base that is packed."""
        stored = self._stored(self._layer()).dtype
        return stored if stored.is_floating_point and stored.itemsize > 1 else torch.float32

    @property
    def bias_beside(self) -> str | None:
        """See :attr:`AdaptedMatrix.bias_beside`."""
        layer = self._layer()
        factor = dict(layer.lora_B.items()).get(self._adapter)
        if getattr(factor, "bias", None) is not None:
            return "lora_bias=True"
        bias = getattr(layer.get_base_layer(), "bias", None)
        return "a bias that is trained" if bias is not None and bias.requires_grad else None

    def _stored(self, layer: Any) -> Tensor:
        """The base weight as it is stored, packed or not."""
        return layer.get_base_layer().weight

    def _scaling(self) -> float:
        """The scale as PEFT computed it: α/r, α/√r with rsLoRA, or what a caller set."""
        return self._layer().scaling[self._adapter]

    def _is_table(self, layer: Any) -> bool:
        """Whether the layer is an embedding, whose factors PEFT keeps as bare parameters."""
        return self._adapter in layer.lora_embedding_A

    def _layer(self) -> Any:
        """The present layer; InputError if it is gone, or has no such adapter any more."""
        if self._kept is not None and self._kept.layer is not None:
            return self._kept.layer
        layer: Any = _module(self._model, self.path)
        if layer is None:
            raise self._changed("no such module")
        if not _is_lora(layer):
            raise self._changed(f"a {type(layer).__name__} without LoRA factors")
        if self._adapter not in layer.scaling:
            raise self._changed(f"no adapter {self._adapter!r}, which was deleted")
        if self._kept is not None:
            self._kept.layer = layer
        return layer

    def check(self) -> None:
        """InputError unless the layer computes ``W0 + s·B·A`` with this adapter."""
        if self._kept is not None and self._kept.is_checked:
            return
        layer = self._layer()
        if not self._is_explicit and (active := adapters_of(layer, None)) != [self._adapter]:
            raise InputError(
                f"{self.name}: expected the adapter {self._adapter!r} to be the active one, got "
                f"{', '.join(active) or 'none'}; switch back before the step, or name the adapter "
                "that is meant with adapter="
            )
        if what := self._unsupported(layer):
            raise InputError(
                f"{self.name}: expected W0 + s·B·A, got {what}; leave it out with exclude="
            )
        if self._kept is not None:
            self._kept.is_checked = True

    def _unsupported(self, layer: Any) -> str | None:
        """What the layer computes if that is not ``W0 + s·B·A``; else None."""
        return unsupported(layer, self._adapter)

    def _changed(self, found: str) -> InputError:
        """The error for a layer that is not the one that was found at first."""
        return InputError(
            f"{self.name}: expected the LoRA layer that was found when this was built, got "
            f"{found}; build it again after the model is changed"
        )


def _has_processes() -> bool:
    """Whether several processes train together."""
    return distributed.is_available() and distributed.is_initialized()


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The LoRA layers of a model with their names; none where PEFT is not installed."""
    return [(name, layer) for name, layer in model.named_modules() if _is_lora(layer)]  # pyright: ignore


def adapters_of(layer: Any, adapter: str | None) -> list[str]:
    """The adapters of a layer that are meant: the one that is named, or all active ones."""
    known = [adapter] if adapter is not None else list(layer.active_adapters)
    return [name for name in known if name in layer.scaling]


@functools.cache
def _lora_layer() -> type | tuple[()]:
    """PEFT's class; no class where PEFT is not installed."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return ()
    return LoraLayer


def _is_lora(layer: object) -> bool:
    """Whether a module is one of PEFT's LoRA layers."""
    return isinstance(layer, _lora_layer())


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """A module by its name, without the wrappers around it; None if it is gone."""
    module: Any = model
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
    if _is_lora(module):
        return module
    try:
        named: Any = model.get_submodule(name)  # wrappers on the path pass attributes on
    except AttributeError:
        return None
    module = named
    while module is not None and not _is_lora(module):
        inner = (x for key in WRAPPED if (x := module._modules.get(key)) is not None)
        module = next(inner, None)
    return named if module is None else module


def config_of(model: nn.Module, name: str, adapter: str) -> Any:
    """The configuration of an adapter, from the nearest enclosing module that has one.

    Args:
        model: The model.
        name: The path of a layer.
        adapter: Which of its adapters.

    Returns:
        PEFT's configuration.

    Raises:
        InputError: If there is none.
    """
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
            "choose layers with exclude="
        )
    return found


def unsupported(layer: Any, adapter: str, *, with_dora: bool = False) -> str | None:
    """What a layer computes if that is not ``W0 + s·B·A``; else None.

    Args:
        layer: One of PEFT's.
        adapter: Which of its adapters.
        with_dora: Whether DoRA is no reason.

    Returns:
        What it is, for a message.
    """
    from peft.tuners.lora.layer import MultiheadAttention

    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if isinstance(layer, MultiheadAttention):
        return "a MultiheadAttention, whose factors are of several matrices"
    if hasattr(layer, "lora_E"):
        return "AdaLoRA, whose factors have singular values between them"
    if layer.merged:
        return "a merged adapter: unmerge it"
    if has_dora(layer, adapter):
        return None if with_dora else "DoRA, whose rows are scaled as well"
    if variant is not None:
        return f"a LoRA variant ({type(variant).__name__})"
    return None


def has_dora(layer: Any, adapter: str) -> bool:
    """Whether an adapter of a layer is a DoRA."""
    return bool(getattr(layer, "use_dora", {}).get(adapter))


def _weight(name: str, module: nn.Module) -> Tensor:
    """The base weight, dequantised if it is packed."""
    weight: Any = module.weight
    require_in_memory(name, weight)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1:
        return weight
    from peft.utils.integrations import dequantize_module_weight

    try:
        return dequantize_module_weight(module)
    except Exception as error:
        raise InputError(f"{name}: the base weight cannot be dequantised ({error})") from error
