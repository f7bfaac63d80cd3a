"""Outputs of layers with wide inputs: the sketches of their inputs do not determine them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._precision import exact

from ._curvatures import in_backward
from ._inputs import Batch, for_each_text, kept_rows


class Powers:
    """Sums of ``‖W x‖²`` over the outputs of layers, their bias taken off.

    Args:
        batch: The texts that a layer runs on.
        time_first: The layers that have the length in front of the batch.

    Attributes:
        sums: By path.
    """

    def __init__(self, batch: Callable[[str], Batch], time_first: Mapping[str, bool]) -> None:
        self.sums: dict[str, float] = {}
        self._batch, self._time_first = batch, time_first
        self._parts: list[tuple[str, Tensor]] = []

    def hook(self, name: str) -> Callable[..., None]:
        """A forward hook of a layer."""

        def watch(layer: nn.Module, _inputs: Any, y: object) -> None:
            if in_backward():
                return
            if not isinstance(y, Tensor):
                raise InputError(
                    f"{name}: expected a layer that returns a tensor, got {type(y).__name__}; "
                    "leave it out, or raise exact_width above its inputs"
                )
            with torch.no_grad():
                out, bias = y.detach(), getattr(layer, "bias", None)
                if isinstance(layer, (nn.Conv1d, nn.Conv2d)):  # the channels last
                    out, keep = out.movedim(out.ndim - layer.weight.ndim + 1, -1), None
                else:
                    out, keep = for_each_text(layer, out, self._batch(name))
                out = out if bias is None else out - bias
                rows = kept_rows(out, keep, self._time_first.get(name, False)).float()
                self._parts.append((name, rows.square().sum()))

        return watch

    def settle(self) -> None:
        """Add what the last call of the model had to the sums."""
        parts, self._parts = self._parts, []
        for name, part in parts:
            self.sums[name] = self.sums.get(name, 0.0) + float(exact(part))

    def drop(self) -> None:
        """Forget what the last call of the model had."""
        self._parts = []
