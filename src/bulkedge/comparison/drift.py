"""How far an update moves the outputs of a layer on inputs of known second moment.

With ``C = E[x xᵀ]`` the mean square of what a layer adds is ``E‖ΔW x‖² = tr(ΔW C ΔWᵀ)``.  For
orthonormal directions ``y`` of the outputs the parts ``E⟨y, ΔW x⟩² = ‖C^½ ΔWᵀ y‖²`` add up to it;
those of the left singular vectors of ``ΔW`` are ``σ² vᵀCv``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._precision import exact
from bulkedge.moments import Moment, right_times
from bulkedge.triplet import GolubKahan, singular_triplet

from .pair import TILE, Pair


@dataclass(frozen=True)
class Parts:
    """What singular directions of an update add to the change of the outputs.

    Attributes:
        sigma: Singular values of the update, descending, shape ``(k,)``.
        change: ``σ² vᵀCv``, shape ``(k,)``.
        whole: Whether these are all directions of the update.
    """

    sigma: Tensor
    change: Tensor
    whole: bool


def of_indices(moment: Moment) -> bool:
    """Whether a moment is of indices, those of an embedding, whose weight is ``(n, m)``."""
    return isinstance(moment, Tensor) and moment.ndim == 1


def parts_of(pair: Pair, moment: Moment, k: int, seed: int) -> Parts:
    """What the singular directions of an update add to the change of the outputs.

    Cost: of a low-rank update thin products, ``r n² + (m + n) r²``, for all directions; of another
    the k leading triplets of the update, and ``k n²``.

    Args:
        pair: Base and update.
        moment: C.
        k: How many directions of an update that is not of low rank.
        seed: Of the search for these.

    Returns:
        The parts.  Each is that of a direction of the outputs, so that they are right to rounding
        where the directions of a dense update are known to three digits alone.
    """
    if pair.spikes is not None:
        found = pair.spikes
        outputs = found.v if of_indices(moment) else found.u
        return Parts(found.gamma, change_along(pair, moment, outputs), whole=True)
    update = pair.update_map()
    if update is None:
        nothing = torch.zeros(0, dtype=torch.float64)
        return Parts(nothing, nothing, whole=True)
    generator = torch.Generator().manual_seed(pair.seed(seed))
    top = singular_triplet(
        update,
        min(k, *update.shape),
        solver=GolubKahan(rtol=1e-3),
        generator=generator,
        strict=False,
    )
    outputs = top.v if of_indices(moment) else top.u
    return Parts(top.sigma, change_along(pair, moment, outputs), whole=False)


def change_of(pair: Pair, moment: Moment) -> float:
    """``tr(ΔW C ΔWᵀ)`` of any update, some rows at a time.

    Cost: ``m n²``; of an embedding ``m n``, of a sketch of rank r ``m n r``.

    Args:
        pair: Base and update.
        moment: C.

    Returns:
        The mean square of the change of the outputs.
    """
    total, at = 0.0, 0
    for rows in update_rows(pair):
        if isinstance(moment, Tensor) and moment.ndim == 1:
            shares = moment[at : at + len(rows)].to(rows)
            total += float(rows.square().sum(dim=1) @ shares)
        else:
            total += float((right_times(rows, moment) * rows).sum())
        at += len(rows)
    return max(total, 0.0)


def change_along(pair: Pair, moment: Moment, outputs: Tensor) -> Tensor:
    """``E⟨y, ΔW x⟩²`` for directions y of the outputs.

    Cost: k products with the update, and ``k n²``.

    Args:
        pair: Base and update.
        moment: C.
        outputs: Orthonormal columns, shape ``(m, k)``, float64; they are the right singular
            vectors of an embedding ``(vocab, dim)``, the left ones of every other weight.

    Returns:
        Shape ``(k,)``.
    """
    update = pair.update_map()
    if update is None:
        return torch.zeros(outputs.shape[1], dtype=torch.float64)
    if isinstance(moment, Tensor) and moment.ndim == 1:
        moved = update.matmat(outputs)
        found = moment.to(moved) @ moved.square()
    else:
        moved = update.rmatmat(outputs).mT
        found = (right_times(moved, moment) * moved).sum(dim=1)
    return found.clamp(min=0).cpu()  # a moment that was rounded may be below zero by as much


def update_rows(pair: Pair) -> Iterator[Tensor]:
    """``W − W0`` in float64, some rows at a time.

    Args:
        pair: Base and update.

    Yields:
        Up to 1024 rows, in order.
    """
    for at in range(0, len(pair.base), TILE):
        part = slice(at, at + TILE)
        rows = exact(pair.dense_part[part])
        if pair.factors is not None:
            rows = rows + pair.factors.scale * pair.factors.B[part] @ pair.factors.A
        factor = pair.magnitude_over_norm
        if factor is not None:
            rows = rows * (factor if pair.per_column else factor[part, None])
        yield rows - exact(pair.base[part])
