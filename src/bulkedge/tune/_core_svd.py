"""The singular values of many updates at once, each from r×r matrices.

With ``BᵀB = R_Bᵀ R_B`` and ``A Aᵀ = R_Aᵀ R_A`` the singular values of ``s·B·A`` are those of the
core ``s R_B R_Aᵀ = X Γ Yᵀ``, and the roots of the eigenvalues of ``s² R_A BᵀB R_Aᵀ = Y Γ² Yᵀ``. The
second takes half of the time, and says enough of most updates; how much, it says too. Layers of one
rank go through one batched decomposition: a hundred layers of a model cost hardly more than one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._precision import exact

from ._matrix import AdaptedMatrix

EPS = torch.finfo(torch.float64).eps
RANK_TOLERANCE = 1e-14
"""Eigenvalues of a Gram matrix below this fraction of the largest are taken for zero."""
ROUNDING = 16
"""The rounding of an eigenvalue of an r×r matrix, in r²·eps of its largest: an upper bound."""


@dataclass(frozen=True)
class Cores:
    """The singular values of k updates of one rank, and the r×r matrices that lower them.

    Attributes:
        members: Which of all updates they are.
        gamma: Singular values of ``s·B·A``, descending, shape ``(k, r)``, float64.
        heads: The largest of each.
        bounds: No singular value of an update exceeds its bound, whatever was rounded.
        bases: P and Q for B, P and Q for A, each of shape ``(k, r, r)``: with D diagonal
            ``B (1 + P D Q) A``, with those of B or those of A, has the singular values
            ``γ_j (1 + D_jj)``, and the same vectors.
    """

    members: list[int]
    gamma: Tensor
    heads: list[float]
    bounds: list[float]
    bases: tuple[Tensor, Tensor, Tensor, Tensor]

    def changes(
        self, places: list[int], aims: Sequence[float], changeable: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """N and M with which ``B (1 + N)`` and ``(1 + M) A`` have ``γ_j → min(γ_j, aim)``.

        Each factor takes half of the change, as a product with an r×r matrix close to the identity,
        so that the moments that an optimiser keeps for the factors stay nearly valid.  If only one
        may be changed, it takes all of it.

        Args:
            places: Which of the k updates.
            aims: The strength to which larger spikes of each of them are lowered.
            changeable: Whether B and A may be changed; at least one must.

        Returns:
            N and M, each of shape ``(len(places), r, r)``; of a factor that stays, zeros.
        """
        gamma, *bases = (x[places] for x in (self.gamma, *self.bases))
        aim = gamma.new_tensor(aims)[:, None]
        part = torch.where(gamma > aim, aim / gamma, 1.0)
        weight = (part.sqrt() if all(changeable) else part)[:, None] - 1
        of_B, of_A = (P * weight @ Q for P, Q in (bases[:2], bases[2:]))
        # with B frozen, the change of B is made in A, and the other way around
        if all(changeable):
            return of_B, of_A
        none = torch.zeros_like(of_B)
        return (of_A, none) if changeable[0] else (none, of_B)


def spikes(matrices: Sequence[AdaptedMatrix]) -> list[Cores]:
    """The singular values of all updates, by squares: small ones are lost in the rounding.

    Cost: O((m + n) r²) each for the Gram matrices, two batched eigenproblems for all of one rank.

    Args:
        matrices: The matrices.

    Returns:
        One entry for all of one rank.

    Raises:
        InputError: If a factor is not finite.
    """
    with torch.no_grad():
        return [_from_squares(grams) for grams in _by_rank(matrices)]


def accurate_spikes(matrices: Sequence[AdaptedMatrix]) -> list[Cores]:
    """The singular values of all updates by SVDs of their cores: the small ones, too.

    Args:
        matrices: The matrices.

    Returns:
        One entry for all of one rank.

    Raises:
        InputError: If a factor is not finite.
    """
    with torch.no_grad():
        return [_from_roots(grams) for grams in _by_rank(matrices)]


@dataclass(frozen=True)
class _Grams:
    """The Gram matrices of k updates of one rank.

    Attributes:
        members: Which of all updates they are.
        names: Their names.
        of_B: ``BᵀB``, shape ``(k, r, r)``.
        of_A: ``A Aᵀ``, shape ``(k, r, r)``.
        scales: s of each.
        terms: ``m + n`` of each, the number of terms in both sums.
    """

    members: list[int]
    names: list[str]
    of_B: Tensor
    of_A: Tensor
    scales: Tensor
    terms: Tensor


def _by_rank(matrices: Sequence[AdaptedMatrix]) -> list[_Grams]:
    """The Gram matrices of all; those of one rank together."""
    factors = [matrix.factors for matrix in matrices]
    parts: dict[object, list[tuple[list[int], Tensor, Tensor]]] = defaultdict(list)
    for members, B, A in stacked(factors):
        parts[A.shape[1], A.device].append((members, B.mT @ B, A @ A.mT))
    found = []
    for same in parts.values():
        members = [i for own, _, _ in same for i in own]
        of_B, of_A = torch.cat([x for _, x, _ in same]), torch.cat([x for *_, x in same])
        own = [matrices[i] for i in members]
        names = [x.name for x in own]
        _require_finite(names, of_B, of_A)
        scales = of_B.new_tensor([x.scale for x in own])
        terms = of_B.new_tensor([factors[i][0].shape[0] + factors[i][1].shape[1] for i in members])
        found.append(_Grams(members, names, of_B, of_A, scales, terms))
    return found


def stacked(
    factors: Sequence[tuple[Tensor, Tensor]], kinds: Sequence[object] | None = None
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Factors in float64, those of one shape one above the other.

    Args:
        factors: B and A of each.
        kinds: Those of different kinds are kept apart.

    Yields:
        Which ones they are, their B, their A.
    """
    groups = defaultdict(list)
    for i, (B, A) in enumerate(factors):
        kind = None if kinds is None else kinds[i]
        groups[B.shape, A.shape, B.dtype, A.dtype, A.device, kind].append(i)
    for members in groups.values():
        B, A = (exact(torch.stack([factors[i][side] for i in members])) for side in (0, 1))
        yield members, B, A


def _from_squares(grams: _Grams) -> Cores:
    """By the eigenvalues of ``R_A BᵀB R_Aᵀ``, of Gram matrices with trace 1: none is too large."""
    sizes = [x.diagonal(dim1=1, dim2=2).sum(dim=1) for x in (grams.of_B, grams.of_A)]
    of_B, of_A = (
        x / torch.where(size > 0, size, 1.0)[:, None, None]
        for x, size in zip((grams.of_B, grams.of_A), sizes, strict=True)
    )
    lower, failed = torch.linalg.cholesky_ex(of_A)
    root = _roots(of_A) if bool(failed.any()) else lower.mT
    values, Y = torch.linalg.eigh(root @ of_B @ root.mT)
    values, Y = values.flip(-1).clamp_min(0), Y.flip(-1)
    size = grams.scales.abs() * sizes[0].sqrt() * sizes[1].sqrt()
    # of two sums of squares, two eigenproblems, and what counts as zero
    rounding = EPS * (grams.terms + ROUNDING * Y.shape[-1] ** 2) + RANK_TOLERANCE
    bounds = size * (values[:, 0] + rounding).sqrt() * (1 + 8 * EPS)
    gamma = size[:, None] * values.sqrt()
    heads, limits = torch.stack([gamma[:, 0], bounds]).tolist()
    P = root.mT @ Y
    Q = torch.where(values > rounding[:, None], 1 / values, 0.0)[..., None] * (P.mT @ of_B)
    return Cores(grams.members, gamma, heads, limits, (P, Q, P, Q))


def _from_roots(grams: _Grams) -> Cores:
    """By the SVDs of the cores."""
    root_B, root_A = _roots(grams.of_B), _roots(grams.of_A)
    small = grams.scales[:, None, None] * (root_B @ root_A.mT)
    _require_finite(grams.names, small)
    X, gamma, Yt = torch.linalg.svd(small)
    bases = _inverse(root_B) @ X, X.mT @ root_B, root_A.mT @ Yt.mT, Yt @ _inverse(root_A).mT
    heads = gamma[:, 0].tolist()
    return Cores(grams.members, gamma, heads, heads, bases)


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
