"""The adapted matrices of a model: what everything here works on.

An adapted matrix is a frozen base W0 and two factors: ``W = W0 + s·B·A``.  PEFT's LoRA layers are
found in a model; anything else that is of this form is given as :class:`AdaptedMatrix`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, Union

import torch
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._globs import as_globs, check_globs, matches
from bulkedge._linmap import Dense, LinearMap, LowRank, Sum, Widened
from bulkedge.update import Factors, balanced

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of PEFT that write into the base."""


@dataclass(frozen=True)
class AdaptedMatrix:
    """A frozen base and the factors that are trained on top of it, ``W = W0 + s·B·A``.

    Attributes:
        name: Of the module, for messages and records.
        base: W0, shape ``(m, n)``: a view of what the model holds, or a copy where that is packed.
        A: Shape ``(r, n)``, a view of the trained parameter.
        B: Shape ``(m, r)``, a view of the trained parameter.
        scaling: What s is now: a schedule or a controller may move it.
    """

    name: str
    base: Tensor
    A: Tensor
    B: Tensor
    scaling: Callable[[], float] = field(default=lambda: 1.0, repr=False)

    def __post_init__(self) -> None:
        shapes = [tuple(x.shape) for x in (self.base, self.B, self.A)]
        fits = all(len(shape) == 2 for shape in shapes)
        if not fits or shapes[0] != (shapes[1][0], shapes[2][1]) or shapes[1][1] != shapes[2][0]:
            raise InputError(
                f"{self.name}: expected W0 (m, n), B (m, r), A (r, n), got {shapes[0]}, "
                f"{shapes[1]}, {shapes[2]}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.base.shape[0], self.base.shape[1]

    @property
    def rank(self) -> int:
        """The rank r of the factors."""
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        """The scale s as it is now."""
        return float(self.scaling())

    def base_map(self) -> LinearMap:
        """W0, with products in float32, or in float64 if it is stored so."""
        return frozen_map(self.base, self._dtype)

    def update_map(self) -> LowRank:
        """``s·B·A``, differentiable in both factors."""
        B, A = (_whole(x).to(self._dtype) for x in (self.B, self.A))
        return LowRank(B, A, self.scale)

    def tuned_map(self) -> LinearMap:
        """``W0 + s·B·A``, differentiable in both factors."""
        return Sum([self.base_map(), self.update_map()])

    def spikes(self) -> Factors:
        """The singular triplets of the update, in float64; O((m + n) r²)."""
        return balanced(*self.factors, self.scale, self.shape)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """B and A without their history, whole where they are spread over processes."""
        return _whole(self.B).detach(), _whole(self.A).detach()

    def write(self, B: Tensor, A: Tensor) -> None:
        """Put other numbers into the trained factors.

        Args:
            B: Shape ``(m, r)``.
            A: Shape ``(r, n)``.
        """
        with torch.no_grad():
            for parameter, value in ((self.B, B), (self.A, A)):
                _assign(parameter.detach(), value.to(parameter.dtype))

    @property
    def strengths(self) -> Tensor:
        """The singular values of the update, descending, float64, shape ``(≤ r,)``."""
        return self.spikes().gamma

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.base.dtype is torch.float64 else torch.float32


def frozen_map(weight: Tensor, dtype: torch.dtype) -> LinearMap:
    """A weight as a map with products in ``dtype``; one spread over processes stays so."""
    weight = weight.detach()
    if type(weight) is not Tensor and is_distributed(weight):
        from .sharded import sharded_map

        return sharded_map(weight, dtype)  # pyright: ignore[reportArgumentType]
    return Dense(weight) if weight.dtype == dtype else Widened(weight, dtype)


def is_distributed(x: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return hasattr(x, "full_tensor")


def _whole(x: Tensor) -> Tensor:
    """A thin tensor, gathered if it is spread over processes."""
    return x.full_tensor() if is_distributed(x) else x  # pyright: ignore


def _assign(target: Tensor, value: Tensor) -> None:
    """Write into a tensor, or each process its part of it."""
    if is_distributed(target):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = target.device_mesh, target.placements  # pyright: ignore
        value = distribute_tensor(value, mesh, placements)
    target.copy_(value)


Adapted = Union[nn.Module, Sequence[AdaptedMatrix]]  # noqa: UP007 — Python 3.10


def adapted_matrices(
    model: Adapted, *, adapter: str | None = None, modules: str | Sequence[str] = "*"
) -> list[AdaptedMatrix]:
    """The adapted matrices of a model.

    Linear, ``Conv1D``, embedding and convolution layers of PEFT's LoRA, as views: what is written
    into their factors is written into the model.

    Args:
        model: A model that PEFT has wrapped; or a sequence of matrices, which is filtered.
        adapter: Which adapter; the active one if None.
        modules: Patterns (``*``, ``?``) of module names, of which one must match.

    Returns:
        One entry a layer, in the order of the model.

    Raises:
        InputError: If there is none, or one of them is not of the form ``W0 + s·B·A``.
        RecipeError: If a pattern matches no layer.

    Example:
        >>> W0, A, B = torch.randn(6, 5), torch.randn(2, 5), torch.zeros(6, 2)
        >>> adapted_matrices([AdaptedMatrix("layer", W0, A, B)])[0].rank
        2
    """
    patterns = as_globs(modules)
    if not isinstance(model, nn.Module):
        found = chosen_by(patterns, model)
    else:
        configs = getattr(model, "peft_config", {})
        found = [
            _adapted(name, layer, chosen, configs.get(chosen))
            for name, layer in _chosen_layers(patterns, model)
            if (chosen := _adapter_of(name, layer, adapter)) is not None
        ]
    if not found:
        raise InputError(
            f"expected adapted layers, found none that match {', '.join(patterns)}"
            + (f" with adapter {adapter!r}" if adapter else "")
            + "; wrap the model with peft.get_peft_model first"
        )
    return chosen_by(patterns, found)


LAYERS = ("layer that can be held or watched", "print the names with model.named_modules()")
"""What patterns of modules are matched with, for messages."""


class Named(Protocol):
    """What has a name that a pattern may match."""

    @property
    def name(self) -> str:
        """The name."""
        ...


N = TypeVar("N", bound=Named)


def chosen_by(patterns: Sequence[str], candidates: Iterable[N]) -> list[N]:
    """Those whose name a pattern matches; RecipeError for a pattern that matches none."""
    named = list(candidates)
    if named:
        check_globs(patterns, [one.name for one in named], *LAYERS)
    return [one for one in named if matches((one.name,), patterns)]


def _chosen_layers(patterns: Sequence[str], model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The LoRA layers that the patterns choose; RecipeError for a pattern that chooses none."""
    layers = lora_layers(model)
    if layers:
        check_globs(patterns, [name for name, _ in layers], *LAYERS)
    return [(name, layer) for name, layer in layers if matches((name,), patterns)]


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The LoRA layers of a model with their names; none where PEFT is not installed."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return []
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]


def _adapter_of(name: str, layer: Any, adapter: str | None) -> str | None:
    """Which adapter of a layer is meant; None if the layer has no part of it."""
    if adapter is not None:
        return adapter if adapter in layer.scaling else None
    active = [known for known in layer.active_adapters if known in layer.scaling]
    if len(active) > 1:
        raise InputError(f"{name}: {len(active)} adapters are active; name one with adapter=")
    return active[0] if active else None


def _adapted(name: str, layer: Any, adapter: str, config: Any) -> AdaptedMatrix:
    """A PEFT layer as matrices; InputError where it computes something else."""
    if what := _other_than_plain(layer, adapter, config):
        raise InputError(f"{name}: expected W0 + s·B·A, got {what}; leave it out with modules=")

    def scaling() -> float:
        return layer.scaling[adapter]

    module = layer.get_base_layer()
    if adapter in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return AdaptedMatrix(name, module.weight.detach().T, A, B, scaling)
    base = _weight(name, module)
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if getattr(layer, "fan_in_fan_out", False):
        base = base.T
    if base.ndim > 2:
        if getattr(module, "groups", 1) != 1:
            raise InputError(f"{name}: expected a convolution without groups; leave it out")
        base, A, B = base.flatten(1), A.flatten(1), B.flatten(1)
    return AdaptedMatrix(name, base.detach(), A, B, scaling)


def _other_than_plain(layer: Any, adapter: str, config: Any) -> str | None:
    """What the layer computes, if it is not ``W0 + s·B·A`` with the W0 that was pretrained."""
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

    init = str(getattr(config, "init_lora_weights", ""))
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if isinstance(layer, (MultiheadAttention, ParamWrapper)):
        return f"a {type(layer).__name__}, whose factors are of several matrices"
    if layer.merged:
        return "a merged adapter: unmerge it"
    if layer.use_dora.get(adapter):
        return "DoRA, whose rows are scaled as well"
    if variant is not None:
        return f"a LoRA variant ({type(variant).__name__})"
    if init.startswith(MOVED_BASE):
        return f"init_lora_weights={init!r}, which moved the base"
    return None


def _weight(name: str, module: nn.Module) -> Tensor:
    """The base weight, dequantised where it is packed."""
    weight = module.weight
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1:
        return weight
    from peft.utils.integrations import dequantize_module_weight

    try:
        return dequantize_module_weight(module)
    except Exception as error:
        raise InputError(f"{name}: the base weight cannot be dequantised ({error})") from error
