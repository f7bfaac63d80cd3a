"""The adapted matrices of a model.

An adapted matrix is a frozen base W0 and two factors: ``W = W0 + s·B·A``.  PEFT's LoRA layers are
found in a model; anything else that is of this form is given as :class:`AdaptedMatrix`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Union

from torch import nn

from bulkedge._errors import InputError
from bulkedge._globs import as_globs

from ._dora import DoraMatrix
from ._experts import ExpertMatrix, count_experts, parameter_name
from ._joint import JointMatrix
from ._lora import LoraMatrix, adapters_of, config_of, has_dora, lora_layers
from ._matrix import AdaptedMatrix
from ._relative import FROM_THE_BASE, RelativeLora
from ._select import members, select

Adapted = Union[nn.Module, Sequence[AdaptedMatrix]]  # noqa: UP007 — Python 3.10
"""A model that PEFT has wrapped, or adapted matrices."""


def adapted_matrices(
    model: Adapted,
    *,
    adapter: str | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
) -> list[AdaptedMatrix]:
    """The adapted matrices of a model.

    These are the linear, ``Conv1D``, embedding and convolution layers with a LoRA or a DoRA of
    PEFT, and the experts that ``target_parameters`` names, each of them a matrix.  If several
    adapters are active, the sum of their updates is one.  Only names are kept: each read or write
    finds the parameters that the model has at that time.

    Args:
        model: A model that PEFT has wrapped; or a sequence of matrices, which is filtered.
        adapter: Which adapter; all active ones together if None.
        include: Patterns (``*``, ``?``) of module names, or of the names of an audit, of which one
            must match.
        exclude: Patterns of the names of those that are left out.

    Returns:
        One entry per layer, in the order of the model.

    Raises:
        InputError: If there is none, one of them is not of the form ``W0 + s·B·A``, or two of them
            have the same name.
        RecipeError: If a pattern matches no layer.

    Example:
        >>> import torch
        >>> W0, A, B = torch.randn(6, 5), torch.randn(2, 5), torch.zeros(6, 2)
        >>> adapted_matrices([AdaptedMatrix("layer", W0, A, B)])[0].rank
        2
    """
    found: list[AdaptedMatrix]
    if not isinstance(model, nn.Module):
        found = select(members(model, "write"), lambda matrix: matrix.name, include, exclude)
    else:
        chosen = select(candidates(model, adapter), lambda named: named[0], include, exclude)
        found = [make() for _, make in chosen]
    if not found:
        problem = nothing_adapted(model, include, adapter)
        raise problem
    require_distinct([matrix.name for matrix in found])
    return found


def candidates(
    model: nn.Module, adapter: str | None, *, watched: bool = False
) -> list[tuple[str, Callable[[], AdaptedMatrix]]]:
    """The adapted matrices of a model by name, each as a function that makes it.

    Args:
        model: The model.
        adapter: Which adapter; all active ones together if None.
        watched: Whether they are to be watched alone: then those belong to them whose factors began
            with a part of the base.

    Returns:
        Names and functions, in the order of the model.
    """
    return [
        (name, functools.partial(_matrix, model, name, path, expert, adapter, watched))
        for name, path, expert in _named(model, adapter)
    ]


def nothing_adapted(model: object, include: str | Sequence[str], adapter: str | None) -> InputError:
    """The error where there is nothing to hold or to watch.

    Args:
        model: What the caller gave.
        include: The patterns.
        adapter: The adapter.

    Returns:
        The error.
    """
    return InputError(
        f"expected adapted layers, found none that match {', '.join(as_globs(include))}"
        + (f" with adapter {adapter!r}" if adapter else "")
        + _remedy(model)
    )


def _named(model: nn.Module, adapter: str | None) -> list[tuple[str, str, int | None]]:
    """What an adapter of LoRA has: the name of each matrix, the path of its layer, its expert."""
    found: list[tuple[str, str, int | None]] = []
    for path, layer in lora_layers(model):
        if not adapters_of(layer, adapter):
            continue
        own = parameter_name(path, layer)
        if own is None:
            found.append((path, path, None))
        elif (count := count_experts(layer)) == 1:
            found.append((own, path, 0))
        else:
            found += [(f"{own}[{i}]", path, i) for i in range(count)]
    return found


def _matrix(
    model: nn.Module,
    name: str,
    path: str,
    expert: int | None,
    adapter: str | None,
    watched: bool,
) -> AdaptedMatrix:
    """One matrix: of one adapter, or of all active ones."""
    layer = model.get_submodule(path)
    adapters = adapters_of(layer, adapter)
    joined = len(adapters) > 1

    def one(which: str) -> LoraMatrix:
        explicit = joined or adapter is not None
        if expert is not None:
            return ExpertMatrix(model, name, path, which, expert, is_explicit=explicit)
        kind = DoraMatrix if has_dora(layer, which) else LoraMatrix
        if watched and not joined and kind is LoraMatrix:
            init = getattr(config_of(model, path, which), "init_lora_weights", None)
            kind = RelativeLora if str(init).lower().startswith(FROM_THE_BASE) else LoraMatrix
        return kind(model, path, which, is_explicit=explicit)

    parts = [one(which) for which in adapters]
    return JointMatrix(parts) if joined else parts[0]


def _remedy(model: object) -> str:
    """What to do where no layer is adapted by LoRA."""
    kinds = {
        type(layer).__name__
        for layer in (model.modules() if isinstance(model, nn.Module) else ())
        if hasattr(layer, "get_base_layer") and hasattr(layer, "active_adapters")
    }
    if kinds:
        return (
            f"; its adapters are {', '.join(sorted(kinds))}, whose updates have no factors that "
            "could be held: use LoRA, or DoRA"
        )
    return "; wrap the model with peft.get_peft_model first"


def require_distinct(names: Sequence[str]) -> None:
    """InputError if two matrices have one name, by which each finds its threshold and its state.

    Args:
        names: All names.

    Raises:
        InputError: If so.
    """
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"expected adapted matrices, each with a name of its own, got two named {twice[0]!r}; "
            "rename one of them"
        )


def require_same_layers(expected: Iterable[str], saved: Iterable[str]) -> None:
    """InputError unless a saved state is of the layers that there are now, by name."""
    if odd := sorted(set(expected) ^ set(saved), key=str):
        raise InputError(f"expected a state of the same layers; only one side has {odd[0]}")
