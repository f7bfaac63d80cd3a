"""What a layer multiplies its weight with, as rows of one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bulkedge._errors import InputError
from bulkedge._precision import exact

CHUNK = 4096
"""Rows whose products are summed up in float32."""


@dataclass(frozen=True)
class Batch:
    """What a call of a model says of its texts.

    Attributes:
        keep: Which positions are text and not padding, shape ``(batch, length)``; None for all.
        texts: How many there are; 1 if that is not known.
        lengths: The lengths that they may have, of an encoder's and of a decoder's text.
    """

    keep: Tensor | None = None
    texts: int = 1
    lengths: tuple[int, ...] = ()


def input_width(layer: nn.Module) -> int | None:
    """The length n of the inputs of a layer whose weight acts as ``(out, n)``.

    Args:
        layer: A module.

    Returns:
        Its input features; of a convolution those of an unfolded patch; the vocabulary of an
        embedding; None for a module that is none of these, or a convolution in groups.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return None
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return None if layer.groups > 1 else weight[0].numel()
    if isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D":
        return weight.shape[0]  # GPT-2's layer of this name stores (in, out)
    return layer.in_features if isinstance(layer, nn.Linear) else None


def input_kind(layer: nn.Module) -> tuple[object, ...]:
    """What a layer makes of a tensor before it multiplies: two of one kind make the same of it.

    Args:
        layer: A module with an :func:`input_width`.

    Returns:
        Something to compare.

    Example:
        >>> input_kind(nn.Linear(2, 3)) == input_kind(nn.Linear(2, 5))
        True
    """
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        pads = tuple(layer._reversed_padding_repeated_twice)
        shape = layer.kernel_size, layer.stride, layer.dilation
        return "patches", *shape, pads, layer.padding_mode
    return "indices" if isinstance(layer, nn.Embedding) else "rows", input_width(layer)


def acting(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight of a layer as it acts on its inputs.

    Args:
        layer: A module with an :func:`input_width`.
        weight: Its weight.

    Returns:
        Shape ``(m, n)``; of an embedding as it is stored, one row per index.
    """
    return weight.mT if type(layer).__name__ == "Conv1D" else weight.flatten(1)


def for_each_text(layer: nn.Module, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """An input that the texts of a batch have in common, such as positions, once for each of them.

    Args:
        layer: A module with an :func:`input_width`.
        x: What it was called with, or what it returned.
        batch: What the model was called with.

    Returns:
        ``x``, of an index without a batch too, and what of it is text: pairs of positions where
        ``x`` has the index of each pair.

    Example:
        >>> batch = Batch(torch.tensor([[True, True], [True, False], [True, False]]), 3, (2,))
        >>> for_each_text(nn.Embedding(2, 1), torch.tensor([[0, 1]]), batch)[0].shape
        torch.Size([3, 2])
    """
    keep, texts, indices = batch.keep, batch.texts, isinstance(layer, nn.Embedding)
    rows = x.shape if indices else x.shape[:-1]
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)) or _is_of_texts(rows, keep):
        return x, keep
    if len(rows) == 2 and rows[0] == 1 and rows[1] in batch.lengths:
        return x.expand(texts, *x.shape[1:]), keep
    if len(rows) == 2 and rows[1] == 1 and rows[0] in batch.lengths:
        return x.expand(x.shape[0], texts, *x.shape[2:]), keep
    if not indices or texts in rows:
        return x, keep
    if len(rows) == 1 and rows[0] in batch.lengths:
        return x.expand(texts, *rows), keep
    if len(rows) == 2 and rows[0] == rows[1] and rows[0] in batch.lengths:  # distances
        pairs = None if keep is None else keep[:, :, None] & keep[:, None, :]
        return x.expand(texts, *rows), pairs
    return x, keep


def _is_of_texts(rows: torch.Size, keep: Tensor | None) -> bool:
    """Whether inputs have a row for each position of each text."""
    return keep is not None and rows.numel() == keep.numel()


def input_rows(
    layer: nn.Module, x: Tensor, keep: Tensor | None, *, time_first: bool = False
) -> Tensor:
    """The inputs of one call, one row each.

    Args:
        layer: A module with an :func:`input_width`.
        x: What it was called with.
        keep: Which positions are text and not padding, shape ``(batch, length)``; None for all.
        time_first: Whether the length is in front of the batch in ``x``.

    Returns:
        Shape ``(rows, n)``; of an embedding the indices, shape ``(rows,)``.

    Raises:
        InputError: If a row is not finite.
    """
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        rows = _patches(layer, x)
    elif isinstance(layer, nn.Embedding):
        return kept_rows(x[..., None], keep, time_first)[:, 0]
    else:
        rows = kept_rows(x, keep, time_first)
    if not bool(rows.isfinite().all()):
        raise InputError("expected finite inputs, got NaN or infinity; run the model in float32")
    return rows


def kept_rows(x: Tensor, keep: Tensor | None, time_first: bool) -> Tensor:
    """The rows of a block, those of padding left out where its shape says which they are.

    Args:
        x: Shape ``(…, n)``.
        keep: As of :func:`input_rows`.
        time_first: Likewise.

    Returns:
        Shape ``(rows, n)``.
    """
    rows = x.reshape(-1, x.shape[-1])
    if keep is None or keep.numel() != len(rows):
        return rows  # a pooled state, or tokens that a router has chosen
    keep = keep.mT if time_first else keep
    return rows[keep.reshape(-1).to(rows.device)]


def is_time_first(shape: torch.Size, keep: Tensor | None) -> bool | None:
    """Whether inputs have the length in front of the batch, by the shape of the mask.

    Args:
        shape: Of the inputs; of an embedding with one more dimension.
        keep: The mask, shape ``(batch, length)``.

    Returns:
        None if the shapes do not show it: no mask, one of which every order is the same, or as
        many texts as tokens.
    """
    if keep is None or len(shape) != 3 or shape[0] * shape[1] != keep.numel():
        return None
    if keep.shape[0] == keep.shape[1]:
        return None
    return shape[:2] != keep.shape


def _patches(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """The patches that a convolution multiplies its kernel with."""
    dims = layer.weight.ndim - 2
    if x.ndim == dims + 1:
        x = x[None]
    pads = layer._reversed_padding_repeated_twice  # what "same" means in numbers, too
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, pads, mode=mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if dims == 1:
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    patches = functional.unfold(x, kernel, dilation=dilation, stride=stride)
    return patches.mT.reshape(-1, patches.shape[1])


def second_moment(rows: Tensor, width: int) -> Tensor:
    """``Σ x xᵀ`` of rows; for indices how often each occurs.

    Args:
        rows: From :func:`input_rows`.
        width: n.

    Returns:
        Shape ``(n, n)``, or ``(n,)`` for indices: float32 of up to 4096 rows, else float64.
    """
    if rows.ndim == 1:
        return torch.bincount(rows, minlength=width)
    if len(rows) <= CHUNK:
        rows = rows.float()
        return rows.mT @ rows
    total = exact(torch.zeros(width, width, device=rows.device))
    for part in rows.split(CHUNK):
        part = part.float()
        total += (part.mT @ part).to(total.device)
    return total
