"""Hooks that sum up the inputs of layers while a model runs."""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bulkedge._errors import InputError, RecipeError
from bulkedge._globs import as_globs, check_globs, matches
from bulkedge._precision import full_precision

from ._curvatures import Curvatures, in_backward
from ._indices import Lookups, computes_indices
from ._inputs import (
    Batch,
    for_each_text,
    input_kind,
    input_rows,
    input_width,
    is_time_first,
    second_moment,
)
from ._layer import sample
from ._powers import Powers
from ._stream import EXACT_WIDTH, products, random_columns, stream_columns
from ._sums import Part, Sum, added
from ._watched import check_weight, unmeasured, watched, weight_in_use

DECODER = "decoder"
"""Component of the paths of a decoder's layers; beside an encoder, it has another mask."""


@dataclass
class _Pass:
    """What is under way: calls of the model, the distinct inputs, and which layers had which.

    A call of the model counts when it has ended well: one that failed, out of memory, is run again.
    """

    batches: list[Batch] = field(default_factory=list)
    raised: BaseException | None = None
    seen: dict[tuple[object, ...], tuple[weakref.ref[Tensor], int, Part]] = field(
        default_factory=dict
    )
    calls: dict[str, list[Part]] = field(default_factory=dict)


class Collector:
    """Sums of ``x xᵀ`` over the inputs of a model's layers, while it is entered.

    Padding is left out by the ``attention_mask`` that the model is called with.  Layers that are
    called with the same tensor, such as the three projections of an attention, share one sum.
    Layers that gradient checkpointing runs again in a backward pass count once, and a call of the
    model that raises does not count.

    Cost: for each distinct input one product with itself, ``rows · n²``, and n² numbers in float64
    on the device of the layer, half as many again while the model runs.  An input wider than
    ``exact_width`` costs ``2 · rows · n · k`` and n·k numbers, ``k = 3 · rank + 32``.

    Args:
        model: Any module, wrapped by PEFT or not.
        include: Globs over the paths of layers.
        exclude: Globs over those that are left out.
        rank: Number of eigenvectors that are kept of an input wider than ``exact_width``; 1024 if
            None.
        exact_width: The largest width that is summed up as a matrix.
        curvatures: Whether gradients by the outputs of linear layers are summed up, too, in the
            backward pass that follows a call.

    Attributes:
        widths: n of each layer that is watched, by its path.
        counted: Number of calls of the model in the sums.
        whole: Whether no addition to the sums is in progress.
        curvatures: Sums over these gradients.
        powers: Sums over the outputs of layers whose inputs are wider than ``exact_width``.
        unmeasured: Names of weights that are of no layer with inputs, such as stacked experts.

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

    def __init__(
        self,
        model: nn.Module,
        *,
        include: str | Iterable[str] = "*",
        exclude: str | Iterable[str] = (),
        rank: int | None = None,
        exact_width: int = EXACT_WIDTH,
        curvatures: bool = False,
    ) -> None:
        if rank is not None and rank < 1:
            raise InputError(f"expected rank ≥ 1, got {rank}")
        self.unmeasured = unmeasured(model)
        self.layers = _chosen(watched(model), as_globs(include), as_globs(exclude))
        self.widths = {name: input_width(layer) or 0 for name, layer in self.layers.items()}
        self._columns = {
            name: stream_columns(self.widths[name], rank, exact_width)
            for name, layer in self.layers.items()
            if not isinstance(layer, nn.Embedding)
        }
        self._has_encoder = any("encoder" in name.split(".") for name in self.layers)
        self._model, self._handles = model, []
        self.counted, self.whole = 0, True
        self._ended = 0  # calls that have ended, and not been counted
        self._shared: dict[str, Sum] = {}
        self._pass = _Pass()
        self._orders: dict[str, bool] = {}
        self._guessed: set[str] = set()
        self._matrices: dict[tuple[int, torch.device], Tensor] = {}
        self.powers = Powers(self._batch, self._orders)
        self.curvatures = Curvatures(self.layers, exact_width if curvatures else 0, self._text_rows)

    @property
    def sums(self) -> dict[str, tuple[Tensor, int]]:
        """``Σ x xᵀ`` and the number of inputs, of each layer that was called.

        Of an input wider than ``exact_width`` the products that a sketch is made of.
        """
        known = self._shared.items()  # an expert may have been called with no tokens
        return {name: (own.total, own.count) for name, own in known if own.count}

    def go_on_from(self, sums: Mapping[str, tuple[Tensor, int]]) -> None:
        """Start with sums over inputs that were collected before.

        Args:
            sums: As :attr:`sums` gives them; tensors that are one object stay shared.
        """
        shared: dict[int, Sum] = {}
        for name, (total, count) in sums.items():
            if id(total) not in shared:
                shared[id(total)] = Sum(total.to(self.weights[name].device), count)
            self._shared[name] = shared[id(total)]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weight of each layer that is watched."""
        return {n: w for n, x in self.layers.items() if isinstance(w := x.weight, Tensor)}

    @torch.no_grad()
    def samples_in_use(self) -> dict[str, Tensor]:
        """Entries of the weight that each layer runs with; none of one that is not known."""
        found = {n: weight_in_use(self._model, layer) for n, layer in self.layers.items()}
        return {name: sample(weight) for name, weight in found.items() if weight is not None}

    def __enter__(self) -> Collector:
        self._pass = _Pass()
        self._handles = [
            self._model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._model.register_forward_hook(lambda *_: self._end_call(), always_call=True),
        ]
        for name, layer in self.layers.items():
            self._handles += _watch(self, name, layer)
            if self._columns.get(name):
                self._handles.append(layer.register_forward_hook(self.powers.hook(name)))
            if name in self.curvatures.layers:
                self._handles.append(layer.register_forward_hook(self.curvatures.hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if not self._pass.batches:  # else the model was stopped half-way
            self.settle()
        self._pass, self._matrices = _Pass(), {}
        if unsure := sorted(self._guessed - self._orders.keys()):
            warnings.warn(
                f"{unsure[0]}: each batch had as many texts as tokens; if this model has the "
                "length before the batch, padding was counted: run batches of another size",
                stacklevel=3,
            )

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if in_backward():
            return
        if not self._pass.batches:
            self.settle()
            self._pass.raised = sys.exc_info()[1]
        self._pass.batches.append(_batch(model, args, kwargs))

    def _end_call(self) -> None:
        if in_backward() or not self._pass.batches:
            return
        self._pass.batches.pop()
        if self._pass.batches:
            return  # a call within a call
        if sys.exc_info()[1] is not self._pass.raised:
            self._drop()
        elif not self.curvatures.awaited:
            self._count(calls=1)
        else:
            self._ended = 1

    def settle(self) -> None:
        """Count the last call, of which no more is to come: its backward pass has ended.

        The next call, and the end of the collection, do so themselves.
        """
        self._count(calls=self._ended)

    def _drop(self) -> None:
        """Forget a call that has failed."""
        self._pass, self._ended = _Pass(), 0
        self.curvatures.drop()
        self.powers.drop()

    def _text_rows(self, name: str) -> tuple[Tensor | None, bool]:
        """Which rows of a layer are text, while it runs; and whether its length comes first."""
        return self._batch(name).keep, self._orders.get(name, False)

    def _batch(self, name: str) -> Batch:
        """The texts that a layer runs on."""
        batch = self._pass.batches[-1] if self._pass.batches else Batch()
        unmasked = self._has_encoder and DECODER in name.split(".")
        return replace(batch, keep=None) if unmasked else batch

    @torch.inference_mode(False)  # whatever the model runs in: sums are changed in place
    @torch.no_grad()
    def _called(self, name: str, x: Tensor) -> None:
        """Note the inputs of one call of a layer, unless another had the same."""
        if in_backward():
            return
        if not self._pass.batches and name in self._pass.calls:
            self.settle()  # called again without the model: what it had is not kept in memory
        batch = self._batch(name)  # that of an encoder's text where there is one
        key = id(x), batch.keep is None, *input_kind(self.layers[name])
        known = self._pass.seen.get(key)
        version = 0 if x.is_inference() else x._version
        if known is None or known[0]() is not x or known[1] != version:
            part = self._part(name, *for_each_text(self.layers[name], x.detach(), batch))
            known = self._pass.seen[key] = weakref.ref(x), version, part
        self._pass.calls.setdefault(name, []).append(known[2])

    def _part(self, name: str, x: Tensor, keep: Tensor | None) -> Part:
        """What an input adds to the sum of a layer."""
        layer, width = self.layers[name], self.widths[name]
        try:
            rows = input_rows(layer, x, keep, time_first=self._time_first(name, x, keep))
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        with full_precision(rows.device):
            if columns := self._columns.get(name):
                return Part(products(rows, self._matrix(width, columns, rows.device)), len(rows))
            return Part(second_moment(rows, width), len(rows))

    def _matrix(self, width: int, columns: int, device: torch.device) -> Tensor:
        """The fixed random matrix of a width, drawn once for each device."""
        key = width, device
        if key not in self._matrices:
            self._matrices[key] = random_columns(width, columns).to(device)
        return self._matrices[key]

    def _time_first(self, name: str, x: Tensor, keep: Tensor | None) -> bool:
        """Whether the length is before the batch; if a shape does not show it, other calls do."""
        shape = (x[..., None] if isinstance(self.layers[name], nn.Embedding) else x).shape
        order = is_time_first(shape, keep)
        if order is not None:
            self._orders[name] = order
            if order and name in self._guessed:
                raise InputError(
                    f"{name}: the length is in front of the batch, and an earlier batch had as "
                    "many texts as tokens; start again with another batch first"
                )
        elif keep is not None and shape[:2] == keep.shape and not torch.equal(keep, keep.mT):
            self._guessed |= {name} - self._orders.keys()
        return self._orders.get(name, False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _count(self, calls: int = 0) -> None:
        """Add what has been seen to the sums."""
        seen, self._pass.calls, self._pass.seen = self._pass.calls, {}, {}
        self.whole = False  # until all of it is: an interruption may come at any moment
        self._shared |= added(self._shared, seen)
        self.curvatures.settle()
        self.powers.settle()
        self.counted, self._ended = self.counted + calls, 0
        self.whole = True


def _chosen(
    found: Mapping[str, nn.Module], include: list[str], exclude: list[str]
) -> dict[str, nn.Module]:
    """The layers of some names."""
    check_globs(
        (*include, *exclude), list(found), "layer with a weight", "see model.named_modules()"
    )
    chosen = {
        name: layer
        for name, layer in found.items()
        if matches((name,), include) and not matches((name,), exclude)
    }
    if not chosen:
        raise RecipeError(f"exclude leaves out all {len(found)} layers")
    for name, layer in chosen.items():
        check_weight(name, layer.weight)
    return chosen


def _watch(collector: Collector, name: str, layer: nn.Module) -> list[Any]:
    """Hooks that pass on what a layer is called with, or what an embedding looks up."""
    own, lookups = computes_indices(layer), list[Lookups]()

    def called(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if getattr(layer, "_is_replica", False):  # so torch marks them
            raise InputError(
                f"{name}: runs in a copy by nn.DataParallel, which splits the mask; run the model "
                "on one device, or with device_map"
            )
        if own:
            lookups.append(Lookups(layer).__enter__())
            return
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None:
            collector._called(name, x)

    def ended(*_: object) -> None:
        if lookups:
            (lookup := lookups.pop()).__exit__(None, None, None)
            for indices in lookup.found:
                collector._called(name, indices)

    handles = [layer.register_forward_pre_hook(called, with_kwargs=True)]
    if own:
        handles.append(layer.register_forward_hook(ended, always_call=True))
    return handles


def _batch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
    """The texts that a model was called with."""
    try:
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        bound = kwargs
    # a wrapper takes what it passes on as *args and **kwargs
    keep = _mask(kwargs.get("attention_mask", bound.get("attention_mask")))
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1]
    if not tensors:
        return Batch(keep)
    texts = len(tensors[0] if keep is None else keep)
    return Batch(keep, texts, tuple({x.shape[1] for x in tensors if len(x) == texts}))


def _mask(mask: object) -> Tensor | None:
    """The attention mask ``(batch, length)`` of a call as booleans; None of one of another kind."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    # one that is added to scores says what is kept by zeros: it is not one of ones and zeros
    plain = not mask.is_floating_point() or bool(((mask == 0) | (mask == 1)).all())
    return mask.bool() if plain else None
