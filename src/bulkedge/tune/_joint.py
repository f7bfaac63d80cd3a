"""Several adapters that are active together: ``W = W0 + Σ_i s_i B_i A_i``.

Their sum is one update of rank ``Σ r_i``, with the factors ``[s_1 B_1, s_2 B_2, …]`` and ``A_1,
A_2, …`` one below the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import LinearMap

from ._lora import LoraMatrix, adapters_of
from ._matrix import SEVERAL, AdaptedMatrix, gathered


class JointMatrix(AdaptedMatrix):
    """The sum of the updates of all active adapters of a layer.

    Args:
        parts: The update of each adapter, of one layer.

    Raises:
        InputError: If some of the adapters are trained and others are frozen, or one of them is a
            DoRA; later, if other adapters are active.
    """

    form = SEVERAL

    def __init__(self, parts: Sequence[LoraMatrix]) -> None:
        self.parts = list(parts)
        first = self.parts[0]
        self.name, self.side = first.name, first.side
        self.scaling = lambda: 1.0  # the scales are in B
        self.names = [part._adapter for part in self.parts]
        if odd := [part._adapter for part in self.parts if part.form]:
            raise InputError(
                f"{self.name}: expected active adapters that add up, got {odd[0]!r}, a DoRA, "
                "beside others; activate one alone, or name it with adapter="
            )
        self.trained  # noqa: B018 — raises if they differ

    @property
    def base(self) -> Tensor:
        """W0, as :attr:`LoraMatrix.base`."""
        return self.parts[0].base

    def base_map(self) -> LinearMap:
        """W0 as a map, as :meth:`LoraMatrix.base_map`."""
        return self.parts[0].base_map()

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.parts[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which products are computed."""
        return self.parts[0].dtype

    @property
    def stored_dtype(self) -> torch.dtype:
        """See :attr:`AdaptedMatrix.stored_dtype`."""
        return self.parts[0].stored_dtype

    @property
    def bias_beside(self) -> str | None:
        """See :attr:`AdaptedMatrix.bias_beside`."""
        return next((part.bias_beside for part in self.parts if part.bias_beside), None)

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        """``[s_1 B_1, …]`` and the A one below the other: no views, but differentiable in all."""
        pairs = [[gathered(x.flatten(1)) for x in part.parameters] for part in self.parts]
        B = torch.cat([part.scale * B for part, (B, _) in zip(self.parts, pairs, strict=True)], 1)
        return B, torch.cat([A for _, A in pairs])

    @property
    def leaves(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The B of all adapters, and the A."""
        B, A = zip(*(part.parameters for part in self.parts), strict=True)
        return B, A

    @property
    def trained(self) -> tuple[bool, bool]:
        """Whether all B, and all A, may be changed."""
        found = [part.trained for part in self.parts]
        if len(set(found)) > 1:
            frozen = next(
                name for name, x in zip(self.names, found, strict=True) if x != max(found)
            )
            raise InputError(
                f"{self.name}: expected active adapters that are all trained, got {frozen!r} "
                "frozen beside others: their sum could not be held; name the trained one with "
                "adapter=, and its own update is held alone"
            )
        return found[0]

    def keep_lookups(self, keep: bool) -> None:
        """See :meth:`AdaptedMatrix.keep_lookups`."""
        for part in self.parts:
            part.keep_lookups(keep)

    def prepare_factors(self) -> None:
        """See :meth:`LoraMatrix.prepare_factors`."""
        self.check()
        for part in self.parts:
            part.prepare_factors()

    def check(self) -> None:
        """InputError unless the layer adds up the updates of these adapters, and of no others."""
        active = adapters_of(self.parts[0]._layer(), None)
        if set(active) != set(self.names):
            raise InputError(
                f"{self.name}: expected the adapters {', '.join(self.names)} to be active, got "
                f"{', '.join(active) or 'none'}; switch back before the step, or name the adapter "
                "that is meant with adapter="
            )
        for part in self.parts:
            part.check()

    def write(self, B: Tensor, A: Tensor) -> None:
        """See :meth:`AdaptedMatrix.write`; an adapter whose scale is zero stays as it is.

        Args:
            B: Shape ``(m, Σ r_i)``, with the scales.
            A: Shape ``(Σ r_i, n)``.
        """
        sizes = [part.rank for part in self.parts]
        pairs = zip(B.split(sizes, dim=1), A.split(sizes), strict=True)
        for part, (own_B, own_A) in zip(self.parts, pairs, strict=True):
            if scale := part.scale:
                part.write(own_B / scale, own_A)
