"""Experts that PEFT adapts by ``target_parameters``, each of them a matrix.

One layer of PEFT has the factors of all E experts of a parameter ``(E, …, …)``:

    A  (E·r, in)   A.view(E, r, in)[e]            B  (out, r·E)   B.view(out, r, E)[:, :, e]

Both are views, so that what is written into one is in the model.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._linmap import LinearMap

from ._lora import LoraMatrix
from ._matrix import AdaptedMatrix, frozen_map, is_distributed

GATE_UP = "gate_up_proj"
"""The parameter that many checkpoints store as ``gate_proj`` and ``up_proj``: its two halves."""


class ExpertMatrix(LoraMatrix):
    """One expert of a parameter that PEFT adapts, or a bare parameter of two dimensions.

    Args:
        model: The model.
        name: The name of the matrix, ``….experts.gate_up_proj[3]``.
        path: The path of PEFT's layer.
        adapter: Which of its adapters.
        expert: Which expert.
        is_explicit: Whether the caller named the adapter.

    Raises:
        InputError: As :class:`LoraMatrix`; or if the factors are spread over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        path: str,
        adapter: str,
        expert: int,
        *,
        is_explicit: bool,
    ) -> None:
        self._expert = expert
        super().__init__(model, name, adapter, is_explicit=is_explicit, path=path)

    def base_map(self) -> LinearMap:
        """W0 as a map."""
        return AdaptedMatrix.base_map(self)

    @property
    def pieces(self) -> list[LinearMap]:
        """What a checkpoint may store apart of W0, and an audit then judges by itself."""
        if self.name.partition("[")[0].rpartition(".")[2] != GATE_UP:
            return []
        return [frozen_map(rows, self.dtype) for rows in self.base.chunk(2)]

    def _acting(self, layer: Any) -> Tensor:
        """See :meth:`LoraMatrix._acting`; PEFT says whether experts are stored as (in, out)."""
        stored = self._stored(layer)
        if stored.ndim == 2:
            return stored
        own = stored[self._expert]
        return own if layer._did_swap_in_out_features else own.T

    def _stored(self, layer: Any) -> Tensor:
        """All experts, as they are stored."""
        return layer.get_param()

    def _found(self, layer: Any) -> tuple[Tensor, Tensor]:
        """Views of the factors of this expert."""
        B, A = layer.lora_B[self._adapter].weight, layer.lora_A[self._adapter].weight
        if is_distributed(A) or is_distributed(B):
            raise InputError(
                f"{self.name}: expected the factors of experts in one piece, got parts of them "
                "that are spread over processes; leave the layer out with exclude=, or do not "
                "shard it"
            )
        count = layer.num_experts
        return (
            B.view(B.shape[0], -1, count)[:, :, self._expert],
            A.view(count, -1, A.shape[1])[self._expert],
        )


@functools.cache
def _param_wrapper() -> type | tuple[()]:
    """PEFT's class; no class where PEFT is not installed, or is older than it."""
    try:
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError:
        return ()
    return ParamWrapper


def parameter_name(path: str, layer: Any) -> str | None:
    """The name of the parameter that a layer of PEFT adapts; None if it adapts a module.

    Args:
        path: The path of the layer, with ``base_layer`` behind it for each layer around it.
        layer: The layer.

    Returns:
        Such as ``layers.0.mlp.experts.gate_up_proj``.
    """
    if not isinstance(layer, _param_wrapper()):
        return None
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return f"{path}.{layer.parameter_name}"  # pyright: ignore[reportAttributeAccessIssue]


def count_experts(layer: Any) -> int:
    """How many experts the parameter has that a layer of PEFT adapts."""
    return layer.num_experts
