"""The singular values of many updates at once, each from an SVD of its r×r core.

With ``BᵀB = R_Bᵀ R_B`` and ``A Aᵀ = R_Aᵀ R_A`` the singular values of ``s·B·A`` are those of the
core ``s R_B R_Aᵀ = X Γ Yᵀ``.  Layers of one shape go through one batched decomposition: a hundred
layers of a model cost hardly more than one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._precision import exact

from ._matrix import AdaptedMatrix

RANK_TOLERANCE = 1e-14
"""Eigenvalues of a Gram matrix below this fraction of the largest are taken for zero."""


@dataclass(frozen=True)
class CoreSVD:
    """The SVD ``X Γ Yᵀ`` of the core of one update.

    Attributes:
        gamma: Singular values of ``s·B·A``, descending, shape ``(r,)``, float64.
        left: X, shape ``(r, r)``.
        right: Y, shape ``(r, r)``.
        root_B: R_B, shape ``(r, r)``.
        root_A: R_A, shape ``(r, r)``.
    """

    gamma: Tensor
    left: Tensor
    right: Tensor
    root_B: Tensor
    root_A: Tensor


def lowered(
    svds: Sequence[CoreSVD],
    B: Tensor,
    A: Tensor,
    aims: Sequence[float],
    changeable: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """The factors of several updates with ``γ_j → min(γ_j, aim)``; the singular vectors stay.

    Each factor takes half of the change, as a product with an r×r matrix close to the identity,
    so that the moments that an optimiser keeps for the factors stay nearly valid.  If only one
    may be changed, it takes all of it: ``s·B·A·V D Vᵀ = s·(B N)·A`` with ``A·V D Vᵀ = N A``,
    because V lies in the row space of A.

    Args:
        svds: Those of the updates, of one rank.
        B: The left factors, shape ``(k, m, r)``, float64.
        A: The right factors, shape ``(k, r, n)``, float64.
        aims: The strength to which larger spikes of each are lowered.
        changeable: Whether B and A may be changed; at least one must.

    Returns:
        B and A.
    """
    gamma, X, Y, root_B, root_A = (
        torch.stack([getattr(svd, name) for svd in svds])
        for name in ("gamma", "left", "right", "root_B", "root_A")
    )
    aim = gamma.new_tensor(aims)[:, None]
    part = torch.where(gamma > aim, aim / gamma, 1.0)
    weight = (part.sqrt() if all(changeable) else part)[:, None] - 1
    of_B = _inverse(root_B) @ (X * weight) @ (X.mT @ root_B)
    of_A = root_A.mT @ (Y * weight) @ (Y.mT @ _inverse(root_A).mT)
    if all(changeable):
        return B + B @ of_B, A + of_A @ A
    return (B + B @ of_A, A) if changeable[0] else (B, A + of_B @ A)


def core_svds(matrices: Sequence[AdaptedMatrix]) -> list[CoreSVD]:
    """The singular values of all updates, with what lowers them.

    Cost: O((m + n) r²) each for the Gram matrices, one batched decomposition for all of one shape.

    Args:
        matrices: The matrices.

    Returns:
        In the same order.

    Raises:
        InputError: If a factor is not finite.
    """
    found: dict[int, CoreSVD] = {}
    factors = [matrix.factors for matrix in matrices]
    groups = defaultdict(list)
    for i, (B, A) in enumerate(factors):
        groups[B.shape, A.shape, B.dtype, A.dtype, A.device].append(i)
    with torch.no_grad():
        for members in groups.values():
            B, A = (exact(torch.stack([factors[i][side] for i in members])) for side in (0, 1))
            names = [matrices[i].name for i in members]
            of_B, of_A = B.mT @ B, A @ A.mT
            _require_finite(names, of_B, of_A)
            root_B, root_A = _roots(of_B), _roots(of_A)
            scales = root_B.new_tensor([matrices[i].scale for i in members])
            small = scales[:, None, None] * (root_B @ root_A.mT)
            _require_finite(names, small)
            X, gamma, Yt = torch.linalg.svd(small)
            parts = zip(members, gamma, X, Yt.mT, root_B, root_A, strict=True)
            found |= {i: CoreSVD(*rest) for i, *rest in parts}
    return [found[i] for i in range(len(matrices))]


def inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """``X Yᵀ`` of each pair in float64; those of one shape in one product.

    Args:
        left: Each of shape ``(r, n)``.
        right: As many, each of the shape of its partner.

    Returns:
        Each of shape ``(r, r)``, in the same order.
    """

    def product(members: list[int]) -> Tensor:
        X, Y = (exact(torch.stack([x[i] for i in members])) for x in (left, right))
        return X @ Y.mT

    return _by_shape(left, product)


def column_grams(factors: Sequence[Tensor]) -> list[Tensor]:
    """``XᵀX`` of each in float64; those of one shape in one product.

    Args:
        factors: Each of shape ``(m, r)``.

    Returns:
        Each of shape ``(r, r)``, in the same order.
    """

    def product(members: list[int]) -> Tensor:
        X = exact(torch.stack([factors[i] for i in members]))
        return X.mT @ X

    return _by_shape(factors, product)


def _by_shape(factors: Sequence[Tensor], product: Callable[[list[int]], Tensor]) -> list[Tensor]:
    """What a function gives for all factors of one shape together, for each by itself."""
    groups: dict[object, list[int]] = defaultdict(list)
    for i, X in enumerate(factors):
        groups[X.shape, X.dtype, X.device].append(i)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        found |= zip(members, product(members), strict=True)
    return [found[i] for i in range(len(factors))]


def _require_finite(names: Sequence[str], *grams: Tensor) -> None:
    """InputError that names the first matrix with a factor that is not finite."""
    if all(math.isfinite(float(x.sum())) for x in grams):
        return
    finite = torch.stack([x.flatten(1).isfinite().all(dim=1) for x in grams]).all(dim=0)
    if not bool(finite.all()):  # or it was the sum alone
        name = names[int(finite.to(torch.uint8).argmin())]
        raise InputError(
            f"{name}: expected finite factors, got NaN or infinity; training has diverged: lower "
            "the learning rate, or go back to a checkpoint"
        )


def _roots(grams: Tensor) -> Tensor:
    """R with ``RᵀR`` the Gram matrix: ``Λ^½ Eᵀ``, with zero rows where an eigenvalue is zero."""
    values, vectors = torch.linalg.eigh(grams)
    counted = values > RANK_TOLERANCE * values[..., -1:]
    values = values.where(counted, torch.zeros_like(values))
    return values.sqrt()[..., None] * vectors.mT


def _inverse(root: Tensor) -> Tensor:
    """The pseudo-inverse of a root: its rows are orthogonal."""
    squares = root.square().sum(dim=-1)
    return root.mT * torch.where(squares > 0, 1 / squares, 0.0)[..., None, :]
