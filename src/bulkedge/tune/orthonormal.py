"""LoRA with orthonormal factors: all spikes of one strength."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bulkedge._errors import InputError
from bulkedge._fields import check_values, one_of

from ._layers import Adapted, adapted_matrices
from .clip import after_step

Retraction = Literal["qr", "polar"]


class OrthonormalFactors:
    """Keep ``BᵀB = A Aᵀ = I`` by a retraction after each step; then every spike is s.

    The factors stay plain parameters of a plain LoRA: files, merging and serving are PEFT's own.
    What norm the update has is s alone, ``α/r``, or ``α/√r`` with ``use_rslora``; below θ_c of the
    layer no generic spike can separate.  It does not begin at zero: begin with a small s.

    Cost: two thin QR or polar decompositions a layer and step, O((m + n) r²).

    Args:
        model: A model wrapped by PEFT, or adapted matrices; the factors are replaced at once.
        method: ``"qr"`` orthonormalises column by column; ``"polar"`` takes the nearest
            orthonormal factor, ``U Vᵀ`` of ``U Σ Vᵀ``, which disturbs an optimiser least.
        adapter: Which adapter; the active one if None.
        modules: Patterns of module names.
        generator: Source of the first factors.

    Raises:
        InputError: If the rank exceeds a side of a matrix.

    References:
        Absil, Mahony, Sepulchre, Optimization Algorithms on Matrix Manifolds, 2008, section 4.1.1.

    Example:
        >>> from bulkedge.tune import AdaptedMatrix
        >>> W0, B, A = torch.zeros(50, 40), torch.zeros(50, 3), torch.randn(3, 40)
        >>> _ = OrthonormalFactors([AdaptedMatrix("layer", W0, A, B, lambda: 0.5)])
        >>> [round(float(gamma), 4) for gamma in torch.linalg.svdvals(0.5 * B @ A)[:4]]
        [0.5, 0.5, 0.5, 0.0]
    """

    def __init__(
        self,
        model: Adapted,
        *,
        method: Retraction = "polar",
        adapter: str | None = None,
        modules: str | Sequence[str] = "*",
        generator: torch.Generator | None = None,
    ) -> None:
        check_values(self, method=(method, one_of("qr", "polar")))
        self.method: Retraction = method
        self.matrices = adapted_matrices(model, adapter=adapter, modules=modules)
        for matrix in self.matrices:
            if matrix.rank > min(matrix.shape):
                raise InputError(
                    f"{matrix.name}: expected a rank of at most {min(matrix.shape)}, the shorter "
                    f"side, got {matrix.rank}"
                )
            B, A = matrix.factors
            if not bool(B.any()):  # PEFT's: nothing to orthonormalise
                matrix.write(torch.randn(B.shape, generator=generator).to(B), A)
        self.step()

    def step(self) -> None:
        """Retract all factors now."""
        for matrix in self.matrices:
            B, A = matrix.factors
            matrix.write(orthonormal(B, self.method), orthonormal(A.mT, self.method).mT)

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Do so after each step of an optimiser; ``handle.remove()`` ends it."""
        return after_step(optimizer, self.step)


def orthonormal(X: Tensor, method: Retraction) -> Tensor:
    """An orthonormal matrix near X with its columns' span.

    Args:
        X: Shape ``(m, r)``, of full rank.
        method: ``"qr"``: the Q of ``X = Q R`` with a positive diagonal; ``"polar"``: the nearest.

    Returns:
        Shape and dtype of X.
    """
    wide = X.float() if X.dtype in (torch.float16, torch.bfloat16) else X
    Q, R = torch.linalg.qr(wide)
    if method == "polar":
        U, _, Vt = torch.linalg.svd(R)
        return (Q @ (U @ Vt)).to(X.dtype)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R)
    return (Q * sign).to(X.dtype)
