"""DoRA: ``W = D (W0 + s·B·A)``, ``D = diag(magnitude / ‖rows of W0 + s·B·A‖)``.

Its update ``W − W0 = D s·B·A + (D − 1) W0`` is not of low rank, but its products are cheap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import LinearMap, RowScaled, Sum
from bulkedge._precision import exact
from bulkedge.triplet import GolubKahan, singular_triplet

from ._lora import LoraMatrix, unsupported
from ._matrix import DORA, frozen_map, is_distributed

LEADING = 16
"""How many singular values of an update that is not of low rank are computed."""


class DoraMatrix(LoraMatrix):
    """A layer with a DoRA of PEFT.

    ``factors`` are those of ``s·B·A`` alone; the map, its strengths and its limit are those of the
    whole update ``W − W0``, which is what an audit judges.
    """

    form = DORA

    @property
    def magnitude(self) -> Tensor:
        """The trained norms of the rows, in the shape in which they are stored."""
        return self._layer().lora_magnitude_vector[self._adapter].weight

    def ratio(self) -> Tensor:
        """The diagonal of D, shape ``(m,)``, in float64.

        Cost: one product of the base with A, and one pass over it.

        Returns:
            The magnitude over the norms of the rows.
        """
        return self._over_norms(self.base)

    def tuned_map(self) -> LinearMap:
        """``D (W0 + s·B·A)`` as a map."""
        base = self.base
        with torch.no_grad():
            ratio = self._over_norms(base).to(base.device, self.dtype)
            inner = Sum([frozen_map(base, self.dtype), self.update_map()])
        return RowScaled(inner, ratio)

    def difference_map(self) -> LinearMap:
        """``W − W0`` as a map."""
        base = self.base
        with torch.no_grad():
            ratio = self._over_norms(base)
            D, less = (x.to(base.device, self.dtype) for x in (ratio, ratio - 1))
            scaled = RowScaled(self.update_map(), D)
        return Sum([scaled, RowScaled(frozen_map(base, self.dtype), less)])

    @property
    def strengths(self) -> Tensor:
        """The leading singular values of ``W − W0``."""
        found = singular_triplet(
            self.difference_map(),
            min(LEADING, *self.shape),
            solver=GolubKahan(rtol=1e-2),
            strict=False,
        )
        return exact(found.sigma)

    def write_scaled(self, part: float, factors: tuple[Tensor, Tensor], ratio: Tensor) -> None:
        """Write the update moved towards zero, from a state of factors and ratio.

        With part t, ``s·B·A → t·s·B·A`` and ``D → 1 + t (D − 1)``: at 0 the update is zero.

        Args:
            part: Between 0 and 1.
            factors: B and A.
            ratio: The diagonal of D.
        """
        B, A = factors
        trained = self.trained
        share = part**0.5 if all(trained) else part
        self.write(exact(B) * share, exact(A) * share)
        magnitude = self.magnitude
        if magnitude.requires_grad:
            norms = self._norms(self.base)  # of the factors as they were rounded
            new = norms * (1 + part * (ratio - 1))
            with torch.no_grad():
                magnitude.copy_(new.to(magnitude.dtype).reshape(magnitude.shape))

    def _over_norms(self, base: Tensor) -> Tensor:
        return exact(self.magnitude.detach()).flatten().to(base.device) / self._norms(base)

    def _norms(self, base: Tensor) -> Tensor:
        """``‖rows of W0 + s·B·A‖`` in float64; ``‖w‖² + 2⟨w, d⟩ + ‖d‖²`` for each."""
        if is_distributed(base) or any(is_distributed(x) for x in self.parameters):
            raise InputError(
                f"{self.name}: expected a DoRA in one piece, got parts that are spread over "
                "processes; leave it out with exclude=, or use LoRA"
            )
        B, A = self.factors
        base = base.to(self.dtype)
        squares = exact(torch.linalg.vector_norm(base, dim=1)).square()
        inner = exact(base @ A.to(self.dtype).mT)
        B, A = self.scale * exact(B), exact(A)
        mixed = (inner * B).sum(dim=1)
        own = ((B @ (A @ A.mT)) * B).sum(dim=1)
        return (squares + 2 * mixed + own).clamp_min(0).sqrt()

    def _unsupported(self, layer: Any) -> str | None:
        return unsupported(layer, self._adapter, with_dora=True)
