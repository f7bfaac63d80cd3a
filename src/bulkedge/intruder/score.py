"""The intruder score of a tuned singular vector, and the verdict on it.

A tuned vector y is compared with the singular vectors u_i of the base on the same side
(Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv:2410.21228):

    score(y) = max_i |⟨y, u_i⟩|,        overlap(y) = ‖U_{2k}ᵀ y‖

where U_{2k} holds the 2k leading base vectors.  The paper calls y an intruder when its score is
below ε.  A rotation among nearly equal base vectors lowers the score too, although nothing new was
written.  The verdict distinguishes the two by the overlap; new directions are both together.

Two choices make the score independent of how an SVD routine picks its basis.  Base vectors with
σ_i = 0 do not count, because any basis of the null space is arbitrary.
For base values that coincide to rounding, the score is the norm of the projection on their common
space, the only meaning it has there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._guard import finite, matrix, precise
from bulkedge.triplet import resolution

VectorSide = Literal["left", "right"]


@dataclass(frozen=True)
class BaseVectors:
    """The singular vectors of a base matrix on one side, as far as they are determined.

    Attributes:
        vectors: Orthonormal columns, by descending singular value, shape ``(m, p)``.
        eigenspace: The number of the eigenspace that each belongs to, shape ``(p,)``.
    """

    vectors: Tensor
    eigenspace: Tensor


@dataclass(frozen=True)
class Scores:
    """Scores of k tuned vectors against a base.

    Attributes:
        score: ``max_i |⟨y, u_i⟩|`` of each, shape ``(k,)``.
        matched_index: The base vector (0 is the leading one) where it is attained; −1 without one.
        subspace_overlap: ``‖U_{2k}ᵀ y‖`` of each, shape ``(k,)``.
    """

    score: Tensor
    matched_index: Tensor
    subspace_overlap: Tensor


def base_vectors(vectors: Tensor, sigma: Tensor, shape: tuple[int, ...]) -> BaseVectors:
    """Keep what a full SVD determines: drop the null space, group equal values.

    Args:
        vectors: All thin singular vectors of one side, shape ``(m, min(m, n))``.
        sigma: All singular values, descending, shape ``(min(m, n),)``.
        shape: ``(m, n)`` of the base.  Values up to max(m, n)·eps·σ₁ count as zero, values within
            2√max(m, n)·eps·σ₁ as equal.

    Returns:
        The determined vectors.

    Raises:
        InputError: If the number of vectors and values differ, or they are not real and finite.

    Example:
        >>> U, S, _ = torch.linalg.svd(torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0])))
        >>> base_vectors(U, S, (4, 4)).eigenspace.tolist()
        [0, 1, 1]
    """
    matrix("the vectors", vectors)
    if sigma.ndim != 1 or vectors.shape[1] != len(sigma):
        raise InputError(
            f"expected as many vectors as values, got {vectors.shape[1]} and {sigma.numel()}"
        )
    eigenspace = eigenspaces(sigma, shape)
    return BaseVectors(vectors[:, : len(eigenspace)], eigenspace)


def eigenspaces(sigma: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The number of the eigenspace of each singular value above zero, see :func:`base_vectors`."""
    rounding = resolution(sigma, shape)
    sigma = sigma[sigma > rounding]
    # max(m, n)·eps·σ₁ bounds the worst case.  Errors that add up at random stay below
    # 2√max(m, n)·eps·σ₁.
    spaces, first, width = [], float("inf"), 2 * float(rounding) / max(shape) ** 0.5
    for value in sigma.tolist():
        # Compared with the first value of its space, not the last: a dense tail is not one space.
        if first - value > width:
            first = value
            spaces.append(spaces[-1] + 1 if spaces else 0)
        else:
            spaces.append(spaces[-1])
    return torch.tensor(spaces, dtype=torch.long, device=sigma.device)


@precise
def scores(Y: Tensor, base: BaseVectors, subspace: int) -> Scores:
    """Score orthonormal tuned vectors against a base.

    Cost: one product with the base vectors, O(m p k).

    Args:
        Y: Tuned singular vectors, shape ``(m, k)``, dtype and device of the base vectors.
        base: Base vectors of the same side.
        subspace: How many leading base vectors span the space of the overlap, 2k as a rule.

    Returns:
        Score, matched index and subspace overlap of each vector.

    Raises:
        InputError: If Y is not real and finite, or not like the base's.

    Example:
        >>> base = BaseVectors(torch.eye(4)[:, :3], torch.tensor([0, 1, 2]))
        >>> y = torch.tensor([[0.0], [0.6], [0.0], [0.8]])
        >>> result = scores(y, base, subspace=2)
        >>> round(result.score.item(), 4), result.matched_index.item()
        (0.6, 1)
    """
    known = base.vectors
    if Y.ndim != 2 or (len(Y), Y.dtype, Y.device) != (len(known), known.dtype, known.device):
        raise InputError(
            f"expected vectors of {len(known)} entries in {known.dtype} on {known.device}, as the "
            f"base's, got shape {tuple(Y.shape)} in {Y.dtype} on {Y.device}"
        )
    finite("Y", Y)
    return scores_of(base.vectors.mT @ Y, base.eigenspace, subspace)


def scores_of(coordinates: Tensor, eigenspace: Tensor, subspace: int) -> Scores:
    """The scores of vectors by their coordinates on the base vectors.

    Args:
        coordinates: Shape ``(p, k)``.
        eigenspace: The number of the eigenspace of each base vector, shape ``(p,)``.
        subspace: How many leading base vectors span the space of the overlap.

    Returns:
        As :func:`scores`.
    """
    p, k = coordinates.shape
    if p == 0:  # of a zero base every direction is new
        zeros = coordinates.new_zeros(k)
        return Scores(zeros, zeros.long() - 1, zeros)
    energy = coordinates.square()
    spaces = int(eigenspace[-1]) + 1
    atoms = energy.new_zeros(spaces, k).index_add_(0, eigenspace, energy)
    best, space = atoms.max(dim=0)
    inside = torch.where(eigenspace[:, None] == space, energy, -1.0)
    return Scores(
        score=best.sqrt().clamp_max(1.0),
        matched_index=inside.argmax(dim=0),
        subspace_overlap=energy[:subspace].sum(dim=0).sqrt().clamp_max(1.0),
    )
