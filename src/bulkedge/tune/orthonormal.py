"""LoRA with orthonormal factors: all spikes of one strength."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import check_values, instance, one_of, optional
from bulkedge._precision import exact

from ._layers import Adapted, AdaptedMatrix
from .holder import AdapterHolder

Retraction = Literal["qr", "polar"]
ROUNDING = 2
"""The error allowed in the Gram matrix of a frozen orthonormal factor, in units of eps of its
dtype; rounding each entry of the factor by half an eps causes an error of about one eps."""


class OrthonormalFactors(AdapterHolder):
    """Keep ``BᵀB = A Aᵀ = I`` by a retraction after each step, so that every spike equals s.

    The factors stay plain parameters of a plain LoRA: files, merging and serving are PEFT's own.
    The norm of the update is the scale s that PEFT gives the layer (``α/r``, or ``α/√r`` with
    ``use_rslora``); if s is below θ_c of the layer, no generic spike makes an outlier.  The update
    does not begin at zero: begin with a small s.

    A layer is found by its name at each step.  A frozen factor stays as it is, and must be
    orthonormal: that of LoRA-FA is, if it is frozen after this holder was built.

    Cost: two thin QR or polar decompositions a layer and step, O((m + n) r²).

    Args:
        model: A model wrapped by PEFT, or adapted matrices; the factors are replaced at once.
        method: ``"qr"`` orthonormalises column by column; ``"polar"`` takes the nearest
            orthonormal factor, ``U Vᵀ`` of ``U Σ Vᵀ``, which disturbs an optimiser least.
        adapter: Which adapter; the active one if None.
        include: Patterns of module names.
        exclude: Patterns of the names of those that are left out.
        generator: Source of the first factors.

    Raises:
        InputError: If the rank exceeds a side of a matrix; and, at each step, if a factor is not
            finite, or frozen and not orthonormal, or a layer is gone or another one.

    References:
        Absil, Mahony, Sepulchre, Optimization Algorithms on Matrix Manifolds, 2008, section 4.1.1.

    Example:
        >>> from bulkedge.tune import AdaptedMatrix
        >>> W0, B, A = torch.zeros(50, 40), torch.zeros(50, 3), torch.randn(3, 40)
        >>> _ = OrthonormalFactors([AdaptedMatrix("layer", W0, A, B, lambda: 0.5)])
        >>> [round(float(gamma), 4) for gamma in torch.linalg.svdvals(0.5 * B @ A)[:4]]
        [0.5, 0.5, 0.5, 0.0]
    """

    takes = ()

    def __init__(
        self,
        model: Adapted,
        *,
        method: Retraction = "polar",
        adapter: str | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        source = optional(instance(torch.Generator, "a torch.Generator"))
        check_values(self, method=(method, one_of("qr", "polar")), generator=(generator, source))
        super().__init__(model, adapter=adapter, include=include, exclude=exclude)
        self.method: Retraction = method
        for matrix in self.matrices:
            if matrix.rank > min(matrix.shape):
                raise InputError(
                    f"{matrix.name}: expected a rank of at most {min(matrix.shape)}, the shorter "
                    f"side, got {matrix.rank}"
                )
            B, A = (_nonzero(x, generator) for x in matrix.factors)
            matrix.write(B, A)
        self.step()

    def step(self) -> None:
        """Retract all factors now."""
        for matrix in self.matrices:
            B, A = (self._retracted(matrix, x) for x in _columns(matrix))
            matrix.write(B, A.mT)
            _require_orthonormal(matrix)

    def on_attach(self) -> None:
        """Nothing: the factors have been orthonormal since this was built."""

    def _retracted(self, matrix: AdaptedMatrix, X: Tensor) -> Tensor:
        """The retraction of a factor; InputError if it is not finite."""
        if not bool(X.isfinite().all()):
            raise InputError(
                f"{matrix.name}: expected finite factors, got NaN or infinity; training has "
                "diverged: lower the learning rate, or go back to a checkpoint"
            )
        return orthonormal(X, self.method)


def _columns(matrix: AdaptedMatrix) -> tuple[Tensor, Tensor]:
    """The two matrices that are to have orthonormal columns: B and Aᵀ."""
    B, A = matrix.factors
    return B, A.mT


def _nonzero(X: Tensor, generator: torch.Generator | None) -> Tensor:
    """The factor, or random numbers in place of the zeros with which PEFT begins one of the two."""
    return X if bool(X.any()) else torch.randn(X.shape, generator=generator).to(X)


def _require_orthonormal(matrix: AdaptedMatrix) -> None:
    """InputError if a factor is frozen, and so was not written, and is not orthonormal."""
    for which, X, trained in zip("BA", _columns(matrix), matrix.trained, strict=True):
        if trained:
            continue
        gram = (x := exact(X)).mT @ x
        error = float((gram - torch.eye(len(gram)).to(gram)).abs().max())
        if not error <= ROUNDING * torch.finfo(X.dtype).eps:
            raise InputError(
                f"{matrix.name}: expected {which} to be trained, or orthonormal, got a frozen one "
                f"that is off by {error:.2g}; freeze it after OrthonormalFactors was built, or "
                "train it"
            )


def orthonormal(X: Tensor, method: Retraction) -> Tensor:
    """A matrix near X with orthonormal columns of the same span.

    Args:
        X: Shape ``(m, r)``, of full rank.
        method: ``"qr"``: the Q of ``X = Q R`` with a positive diagonal; ``"polar"``: the nearest.

    Returns:
        Shape and dtype of X.
    """
    # float64, which neither autocast nor TF32 rounds to fewer digits
    Q, R = torch.linalg.qr(exact(X))
    if method == "polar":
        U, _, Vt = torch.linalg.svd(R)
        return (Q @ (U @ Vt)).to(X.dtype)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R)
    return (Q * sign).to(X.dtype)
