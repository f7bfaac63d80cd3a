"""Sums over the gradients of a loss by what layers put out: how much each output matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._precision import full_precision

from ._inputs import kept_rows, second_moment
from ._sums import Part, Sum, added

Keep = Callable[[str], tuple[Tensor | None, bool]]
"""Which positions are text, and whether the length is in front of the batch, of a layer."""


class Curvatures:
    """Sums of ``g gᵀ``, g the gradient of a loss by the outputs of a linear layer, one a token.

    What one call of the model adds is held until :meth:`settle`: a backward pass that was broken
    off leaves nothing.

    Cost: with the backward pass of the outputs, ``rows · m²`` for each layer of m outputs, and m²
    numbers in float64 on its device.

    Args:
        layers: The layers that are watched, by path.
        most: Layers of more outputs have no curvature.
        keep: What of a layer's rows is text.

    Attributes:
        sums: ``Σ g gᵀ`` and number of rows, by path.
    """

    def __init__(self, layers: Mapping[str, nn.Module], most: int, keep: Keep) -> None:
        self.layers = {n: x for n, x in layers.items() if (output_width(x) or most + 1) <= most}
        self.sums: dict[str, Sum] = {}
        self._keep = keep
        self._watched: set[str] = set()
        self._parts: dict[str, list[Part]] = {}

    @property
    def awaited(self) -> bool:
        """Whether a backward pass of the last call of the model may come, or has come."""
        return bool(self._watched)

    def hook(self, name: str) -> Callable[..., Tensor | None]:
        """A forward hook of a layer, which watches the gradient by its output."""

        def watch(_layer: nn.Module, _inputs: Any, y: object) -> Tensor | None:
            if not torch.is_grad_enabled() or not isinstance(y, Tensor):
                return None
            again = in_backward()
            if again and name not in self._watched:
                raise InputError(
                    f"{name}: gradient checkpointing runs this layer again in the backward pass; "
                    "turn it off, or checkpoint with use_reentrant=False"
                )
            leaf = not y.requires_grad
            y.requires_grad_()
            if not again:
                keep = self._keep(name)
                self._watched.add(name)
                y.register_hook(lambda g: self._add(name, g, *keep))
            return y.clone() if leaf else None  # a leaf must not be changed in place

        return watch

    @torch.no_grad()
    def _add(self, name: str, g: Tensor, keep: Tensor | None, time_first: bool) -> None:
        rows = kept_rows(g.detach(), keep, time_first)
        if not bool(rows.isfinite().all()):
            raise InputError(
                f"{name}: expected finite gradients, got NaN or infinity; run the model in float32"
            )
        with full_precision(rows.device):
            part = Part(second_moment(rows, rows.shape[1]), len(rows))
        self._parts.setdefault(name, []).append(part)

    def settle(self) -> None:
        """Add what the last call of the model had to the sums."""
        parts = self._parts
        self.drop()
        self.sums |= added(self.sums, parts)

    def drop(self) -> None:
        """Forget what the last call of the model had."""
        self._parts, self._watched = {}, set()

    def go_on_from(self, sums: Mapping[str, tuple[Tensor, int]]) -> None:
        """Start with sums that were collected before."""
        self.sums = {
            name: Sum(total.to(self.layers[name].weight.device), count)  # pyright: ignore
            for name, (total, count) in sums.items()
        }


def output_width(layer: nn.Module) -> int | None:
    """Number of outputs of a linear layer, GPT-2's too; None of other layers.

    Args:
        layer: A module.

    Returns:
        m.

    Example:
        >>> output_width(nn.Linear(2, 3)), output_width(nn.ReLU())
        (3, None)
    """
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if type(layer).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return weight.shape[1]
    return None


def in_backward() -> bool:
    """Whether autograd is at work: then gradient checkpointing runs layers a second time."""
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks
