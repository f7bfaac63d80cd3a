"""Hooks that sum up the inputs of layers while a model runs."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._globs import as_globs, check_globs, matches, unwrapped
from bulkedge._precision import full_precision

from ._inputs import input_rows, input_width, second_moment

DECODER = "decoder"
"""Component of the paths of a decoder's layers; beside an encoder, it has another mask."""
OWN = ("lora_", "modules_to_save.", "original_module.")
"""Parts of names of modules that an adapter has added to a model."""


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
    return name.removesuffix(".base_layer")


@dataclass
class _Sum:
    """A sum that layers with the same inputs share."""

    total: Tensor
    count: int = 0


@dataclass
class _Pass:
    """One call of the model: the distinct inputs, and which layers were called with which."""

    keep: Tensor | None = None
    seen: dict[int, tuple[weakref.ref[Tensor], int, int]] = field(default_factory=dict)
    parts: list[tuple[Tensor, int]] = field(default_factory=list)
    calls: dict[str, list[int]] = field(default_factory=dict)


class Collector:
    """Sums of ``x xᵀ`` over the inputs of a model's layers, while it is entered.

    Padding is left out by the ``attention_mask`` that the model is called with.  Layers that are
    called with the same tensor, such as the three projections of an attention, share one sum.

    Cost: for each distinct input one product with itself, ``rows · n²``, and n² numbers in float64
    on the device of the layer.

    Args:
        model: Any module, wrapped by PEFT or not.
        modules: Globs over the paths of layers.

    Attributes:
        widths: n of each layer that is watched, by its path.

    Raises:
        InputError: If there is no layer to watch.
        RecipeError: If a glob matches none.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with Collector(model) as collector, torch.no_grad():
        ...     _ = model(torch.eye(3))
        >>> total, count = collector.sums["0"]
        >>> count, total.diagonal().tolist()
        (3, [1.0, 1.0, 1.0])
    """

    def __init__(self, model: nn.Module, *, modules: str | Iterable[str] = "*") -> None:
        globs = as_globs(modules)
        found = {
            plain_name(name): layer
            for name, layer in model.named_modules()
            if input_width(layer) is not None and not any(part in f"{name}." for part in OWN)
        }
        if not found:
            raise InputError("expected a model with linear layers, got one without any")
        check_globs(globs, list(found), "layer with a weight", "see model.named_modules()")
        self.layers = {n: layer for n, layer in found.items() if matches((n,), globs)}
        self.widths = {name: input_width(layer) or 0 for name, layer in self.layers.items()}
        self._has_encoder = any("encoder" in name.split(".") for name in self.layers)
        self._model, self._handles = model, []
        self._sums: dict[str, _Sum] = {}
        self._pass = _Pass()

    @property
    def sums(self) -> dict[str, tuple[Tensor, int]]:
        """``Σ x xᵀ`` and the number of inputs, of each layer that was called."""
        return {name: (own.total, own.count) for name, own in self._sums.items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weight of each layer that is watched."""
        return {n: w for n, x in self.layers.items() if isinstance(w := x.weight, Tensor)}

    def __enter__(self) -> Collector:
        self._handles = [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(lambda *_: self._end()),
        ]
        for name, layer in self.layers.items():
            hook = _hook(self, name)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._end()  # of layers that were called without the model

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._end()
        self._pass.keep = _mask(model, args, kwargs)

    @torch.no_grad()
    def _called(self, name: str, x: Tensor) -> None:
        """Add the inputs of one call of a layer, unless another had the same."""
        known = self._pass.seen.get(id(x))
        version = 0 if x.is_inference() else x._version
        if known is None or known[0]() is not x or known[1] != version:
            # the mask is that of an encoder's text where there is one
            keep = None if self._has_encoder and DECODER in name.split(".") else self._pass.keep
            try:
                rows = input_rows(self.layers[name], x.detach(), keep)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            with full_precision(rows.device):
                part = second_moment(rows, self.widths[name])
            self._pass.parts.append((part, len(rows)))
            known = weakref.ref(x), version, len(self._pass.parts) - 1
            self._pass.seen[id(x)] = known
        self._pass.calls.setdefault(name, []).append(known[2])

    def _end(self) -> None:
        """Add what one call of the model has seen; layers with one history share a sum."""
        done, self._pass = self._pass, _Pass()
        groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
        for name, calls in done.calls.items():
            groups.setdefault((id(self._sums.get(name)), tuple(calls)), []).append(name)
        before = dict(self._sums)
        for (_, calls), names in groups.items():
            own = self._sum_of(names, before, done.parts[calls[0]][0])
            for part, count in (done.parts[i] for i in calls):
                own.total += part.to(own.total.device)
                own.count += count
            self._sums |= dict.fromkeys(names, own)

    @staticmethod
    def _sum_of(names: list[str], before: Mapping[str, _Sum], like: Tensor) -> _Sum:
        """A sum to add to: that of these layers, or a copy where others go on without them."""
        old = before.get(names[0])
        if old is None:
            return _Sum(torch.zeros_like(like))
        if all(name in names for name, own in before.items() if own is old):
            return old
        return _Sum(old.total.clone(), old.count)


def _hook(collector: Collector, name: str) -> Any:
    """A hook that passes on the first argument of a layer, however it was given."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None:
            collector._called(name, x)

    return hook


def _mask(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The attention mask ``(batch, length)`` that a model was called with, as booleans."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        try:
            bound = inspect.signature(model.forward).bind_partial(*args, **kwargs)
        except (TypeError, ValueError):
            return None
        mask = bound.arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    # one that is added to scores says what is kept by zeros: it is not one of ones and zeros
    plain = not mask.is_floating_point() or bool(((mask == 0) | (mask == 1)).all())
    return mask.bool() if plain else None
