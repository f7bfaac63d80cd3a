"""The adapted matrices of a model.

An adapted matrix is a frozen base W0 and two factors: ``W = W0 + s·B·A``.  PEFT's LoRA layers are
found in a model; anything else that is of this form is given as :class:`AdaptedMatrix`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Union

from torch import nn

from bulkedge._errors import InputError
from bulkedge._globs import as_globs

from ._lora import LoraMatrix, adapter_of, has_adapter, lora_layers
from ._matrix import AdaptedMatrix
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

    These are the linear, ``Conv1D``, embedding and convolution layers with a LoRA of PEFT.  Only
    their names are kept: each read or write finds the parameters that the model has at that time.

    Args:
        model: A model that PEFT has wrapped; or a sequence of matrices, which is filtered.
        adapter: Which adapter; the active one if None.
        include: Patterns (``*``, ``?``) of module names, of which one must match.
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
        with_it = [named for named in lora_layers(model) if has_adapter(named[1], adapter)]
        found = [
            LoraMatrix(
                model, name, adapter_of(name, layer, adapter), is_explicit=adapter is not None
            )
            for name, layer in select(with_it, lambda named: named[0], include, exclude)
        ]
    if not found:
        raise InputError(
            f"expected adapted layers, found none that match {', '.join(as_globs(include))}"
            + (f" with adapter {adapter!r}" if adapter else "")
            + "; wrap the model with peft.get_peft_model first"
        )
    _require_distinct([matrix.name for matrix in found])
    return found


def _require_distinct(names: Sequence[str]) -> None:
    """InputError if two matrices have one name, by which each finds its threshold and its state."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"expected adapted matrices, each with a name of its own, got two named {twice[0]!r}; "
            "rename one of them"
        )


def require_same_layers(expected: Iterable[str], saved: Iterable[str]) -> None:
    """InputError unless a saved state is of the layers that there are now, by name."""
    if odd := sorted(set(expected) ^ set(saved), key=str):
        raise InputError(f"expected a state of the same layers; only one side has {odd[0]}")
