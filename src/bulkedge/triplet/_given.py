"""The leading triplet that somebody has found already, with its derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._implicit import gradient_by_rule
from ._small_rule import nothing_around


class GivenTriplet(torch.autograd.Function):
    """σ, u and v of one matrix in reverse mode: ``Ā = ξ u vᵀ`` is all that a loss of σ takes."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, found: tuple[Tensor, ...], A: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, for the graph.

        Args:
            ctx: As torch gives it.
            found: σ of shape ``(1,)``, u ``(m, 1)``, v ``(n, 1)``, residual and gap ``(1,)``, near
                values ``(b,)`` and vectors ``(min(m, n), b)``.
            A: The matrix.

        Returns:
            σ, u and v.
        """
        sigma, u, v, *evidence = found
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sigma, u, v, *evidence, A)
        return sigma, u, v

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, xi: Tensor | None, phi: Tensor | None, psi: Tensor | None
    ) -> tuple[None, Tensor | None]:
        """By the general rule, whose derivative may be asked for."""
        known = ctx.saved_tensors
        if phi is None and psi is None:
            if xi is None:
                return None, None
            if not torch.is_grad_enabled() and nothing_around(xi):
                return None, torch.outer(known[1][:, 0] * xi, known[2][:, 0])
        return None, gradient_by_rule(1, known, (xi, phi, psi))
