"""The adapted matrices of a model: what everything here works on.

An adapted matrix is a frozen base W0 and two factors: ``W = W0 + s·B·A``.  PEFT's LoRA layers are
found in a model; anything else that is of this form is given as :class:`AdaptedMatrix`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

from torch import nn

from bulkedge._errors import InputError
from bulkedge._globs import as_globs

from ._chosen import chosen
from ._lora import LoraMatrix, adapter_of, lora_layers
from ._matrix import AdaptedMatrix, frozen_map, is_distributed

__all__ = ["Adapted", "AdaptedMatrix", "adapted_matrices", "frozen_map", "is_distributed"]

Adapted = Union[nn.Module, Sequence[AdaptedMatrix]]  # noqa: UP007 — Python 3.10


def adapted_matrices(
    model: Adapted, *, adapter: str | None = None, modules: str | Sequence[str] = "*"
) -> list[AdaptedMatrix]:
    """The adapted matrices of a model.

    Linear, ``Conv1D``, embedding and convolution layers of PEFT's LoRA, by name: what is read and
    what is written are the parameters that the model has at that time.

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
        >>> import torch
        >>> W0, A, B = torch.randn(6, 5), torch.randn(2, 5), torch.zeros(6, 2)
        >>> adapted_matrices([AdaptedMatrix("layer", W0, A, B)])[0].rank
        2
    """
    found: list[AdaptedMatrix]
    if not isinstance(model, nn.Module):
        found = list(model)
    else:
        found = [
            LoraMatrix(model, name, one, asked=adapter is not None)
            for name, layer in chosen(modules, lora_layers(model), lambda named: named[0])
            if (one := adapter_of(name, layer, adapter)) is not None
        ]
    if not found:
        raise InputError(
            f"expected adapted layers, found none that match {', '.join(as_globs(modules))}"
            + (f" with adapter {adapter!r}" if adapter else "")
            + "; wrap the model with peft.get_peft_model first"
        )
    return chosen(modules, found, lambda matrix: matrix.name)
