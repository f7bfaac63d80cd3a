"""LoRA layers of PiSSA and OLoRA, whose factors began with a part of the base: watched, not held.

PEFT takes ``s·B0·A0`` off the base when it makes such an adapter, so that ``W = W_r + s·B·A`` with
``W_r = W0 − s·B0·A0``.  Before the first step the factors are B0 and A0.  A copy of them gives the
pretrained base back, and the update ``s·(B·A − B0·A0)``, of rank up to 2r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bulkedge._errors import InputError
from bulkedge._linmap import LinearMap, LowRank, Sum

from ._lora import LoraMatrix
from ._matrix import frozen_map, gathered, require_in_memory

FROM_THE_BASE = ("pissa", "olora")
"""How the initialisations begin that leave nothing of the base along B0."""
ALONG = 1e-4
"""How much of it may be left, relative to what was taken; some units of a coarser dtype."""


class RelativeLora(LoraMatrix):
    """A LoRA layer by its name, relative to the base before PEFT took a part of it.

    It keeps a copy of the factors that it finds, r·(m + n) numbers.

    Args:
        model: The model with the layer.
        name: The name of the layer in the model.
        adapter: Which of its adapters.
        is_explicit: Whether the caller named the adapter; if not, it must stay the active one.

    Raises:
        InputError: As of :class:`LoraMatrix`; or if the factors have been trained already.
    """

    def __init__(self, model: nn.Module, name: str, adapter: str, *, is_explicit: bool) -> None:
        super().__init__(model, name, adapter, is_explicit=is_explicit)
        B, A = (gathered(x.detach().flatten(1)).clone() for x in super().in_memory())
        self._initial, self._initial_scale = (B, A), self.scale
        self._require_untrained()

    def _require_base(self, config: Any) -> None:
        """The base was changed, but what was taken off it is known."""
        self._is_olora = str(config.init_lora_weights).lower() == "olora"

    @property
    def base(self) -> Tensor:
        """W0, shape ``(m, n)``: a copy, from what is left of it and what was taken."""
        left = super().base
        return left + self._taken(left.dtype).to_dense()

    def base_map(self) -> LinearMap:
        """W0 as a map."""
        return Sum([self._left(), self._taken(self.dtype)])

    def tuned_map(self) -> LinearMap:
        """``W_r + s·B·A`` as a map."""
        B, A = (gathered(x.flatten(1)).to(self.dtype) for x in super().in_memory())
        return Sum([self._left(), LowRank(B, A, self.scale)])

    def _left(self) -> LinearMap:
        """What is left of the base, W_r, as a map."""
        return frozen_map(super().base, self.dtype)

    def in_memory(self) -> tuple[Tensor, Tensor]:
        """``[B, −B0]`` and ``[A; A0]``, whose product is the update over s."""
        B, A = (gathered(x.flatten(1)) for x in super().in_memory())
        B0, A0 = (x.to(B.device, B.dtype) for x in self._initial)
        share = self._initial_scale / self.scale if self.scale else 0.0
        return torch.cat([B, -share * B0], dim=1), torch.cat([A, A0])

    def _taken(self, dtype: torch.dtype) -> LowRank:
        """``s·B0·A0``, where the parameters are now."""
        device = require_in_memory(self.name, self.parameters[0]).device
        B0, A0 = (x.to(device, dtype) for x in self._initial)
        return LowRank(B0, A0, self._initial_scale)

    def _require_untrained(self) -> None:
        """See that B and A are what the initialisation takes: trained factors are not.

        PiSSA takes the best part of rank r, and leaves nothing along B0.  OLoRA takes ``s·Q·R``,
        where Q is orthonormal and R is ``Qᵀ·W0``.

        Raises:
            InputError: If they are not.
        """
        with torch.no_grad():
            taken = self._taken(self.dtype)
            if self._is_olora:
                part = LowRank(taken.B, taken.A, 1.0)
                off = self.base_map().rmatmat(taken.B) - taken.A.mT
            else:
                along = torch.linalg.qr(taken.B)[0]
                part, off = taken, self._left().rmatmat(along)
            far = float(torch.linalg.norm(off)) / max(part.norm_bound(), 1e-30)
        if far > max(ALONG, 4 * torch.finfo(self.stored_dtype).eps):
            raise InputError(
                f"{self.name}: expected the factors with which PiSSA or OLoRA begins, got trained "
                "ones, from which the pretrained base is not known; watch a run from its first "
                "step, or train without the monitor and audit what is saved"
            )
