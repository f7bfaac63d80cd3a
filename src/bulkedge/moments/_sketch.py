"""A second moment in one of three forms: a matrix, a diagonal, or a sketch of a matrix.

A sketch keeps the leading eigenvectors and the diagonal of what they leave: n·(r + 1) numbers in
place of n².
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._precision import exact

DENSE = 1024
"""Matrices up to this width are decomposed in full; wider ones by subspace iteration."""
PASSES = 4
"""Products of a wide matrix with the subspace before its eigenvectors are taken from it."""
EXTRA = 16
"""Columns of that subspace beyond the rank that is asked for."""
TRIES = 4
"""How often a shift is made ten times larger where rounding has left a negative direction."""
GRAM = 1e-10
"""Relative rounding of products from which on singular vectors are taken from a Gram matrix."""
ROWS = 1024
"""Rows of a weight that are multiplied at a time."""


@dataclass(frozen=True)
class Sketch:
    """``C ≈ V diag(values) Vᵀ + diag(rest)``, a second moment with an exact diagonal.

    Attributes:
        vectors: V, orthonormal columns, shape ``(n, r)``, float64.
        values: Their second moments, not negative, shape ``(r,)``.
        rest: The part of the diagonal that they leave, not negative, shape ``(n,)``.
        loss: ``‖C − C≈‖_F / ‖C‖_F``, measured where C was at hand; else an upper bound.

    References:
        Tropp et al., "Fixed-rank approximation of a positive-semidefinite matrix from streaming
        data", NeurIPS 2017, arXiv:1706.05736.

    Example:
        >>> found = sketch(torch.diag(torch.tensor([4.0, 1.0, 1.0])), rank=1)
        >>> found.values.tolist(), found.rest.tolist(), found.loss
        ([4.0], [0.0, 1.0, 1.0], 0.0)
    """

    vectors: Tensor
    values: Tensor
    rest: Tensor
    loss: float

    def to(self, device: torch.device | str) -> Sketch:
        """The sketch on a device, as :meth:`torch.Tensor.to`."""
        vectors, values, rest = (x.to(device) for x in (self.vectors, self.values, self.rest))
        return Sketch(vectors, values, rest, self.loss)


Moment: TypeAlias = Tensor | Sketch
"""``E[x xᵀ]``: shape ``(n, n)``; the diagonal of one that is diagonal, ``(n,)``; or a sketch."""


def width(moment: Moment) -> int:
    """n, the length of the inputs.

    Args:
        moment: Any form.

    Returns:
        n.

    Example:
        >>> width(torch.eye(3)), width(torch.ones(5))
        (3, 5)
    """
    return len(moment.rest if isinstance(moment, Sketch) else moment)


def diagonal(moment: Moment) -> Tensor:
    """The mean squares of the inputs.

    Args:
        moment: Any form.

    Returns:
        Shape ``(n,)``.

    Example:
        >>> diagonal(2 * torch.eye(3)).tolist()
        [2.0, 2.0, 2.0]
    """
    if isinstance(moment, Sketch):
        return moment.vectors.square() @ moment.values + moment.rest
    return moment if moment.ndim == 1 else moment.diagonal()


def right_times(W: Tensor, moment: Moment) -> Tensor:
    """``W C``, by thin products where C is a sketch.

    Cost: ``m n²``, of a sketch ``2 m n r``, of a diagonal ``m n``.

    Args:
        W: Shape ``(m, n)``; derivatives pass through.
        moment: C in any form, brought to the device of W.

    Returns:
        Shape ``(m, n)``, float64.

    Example:
        >>> right_times(torch.ones(1, 2), torch.tensor([3.0, 4.0])).tolist()
        [[3.0, 4.0]]
    """
    W = exact(W)
    if isinstance(moment, Sketch):
        vectors, values, rest = (x.to(W) for x in (moment.vectors, moment.values, moment.rest))
        return (W @ vectors * values) @ vectors.mT + W * rest
    moment = moment.to(W)
    return W * moment if moment.ndim == 1 else W @ moment


def to_dense(moment: Moment) -> Tensor:
    """The moment as a matrix.

    Args:
        moment: Any form.

    Returns:
        Shape ``(n, n)``; for a sketch, its approximation.

    Example:
        >>> to_dense(torch.tensor([1.0, 2.0])).tolist()
        [[1.0, 0.0], [0.0, 2.0]]
    """
    if isinstance(moment, Sketch):
        V = moment.vectors
        return (V * moment.values) @ V.mT + torch.diag(moment.rest)
    return torch.diag(moment) if moment.ndim == 1 else moment


def sketch(C: Tensor, rank: int) -> Sketch:
    """The leading eigenvectors of a second moment, and the diagonal of the remainder.

    Up to a width of 1024 by a full decomposition, 10·n³.  Wider ones by four steps of subspace
    iteration from a fixed seed and a Nyström approximation, which is nowhere above C, so that
    no rest is negative: ``12 n² r``.

    Args:
        C: Symmetric and positive semidefinite, shape ``(n, n)``.
        rank: Number r of eigenvectors; at most n are kept.

    Returns:
        The sketch, float64, with its loss measured.

    Raises:
        InputError: If C is not square or the rank is below 1.

    Example:
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> C = x.mT @ x / 200
        >>> found = sketch(C, rank=8)
        >>> torch.allclose(to_dense(found).float(), C, atol=1e-6)
        True
    """
    if C.ndim != 2 or C.shape[0] != C.shape[1]:
        raise InputError(f"expected a square second moment, got shape {tuple(C.shape)}")
    if rank < 1:
        raise InputError(f"expected rank ≥ 1, got {rank}")
    C, rank = exact(C), min(rank, len(C))
    vectors, values = _leading(C, rank)
    left = C - (vectors * values) @ vectors.mT
    rest = left.diagonal().clamp(min=0).clone()
    left.diagonal().zero_()
    norm = float(torch.linalg.matrix_norm(C))
    return Sketch(
        vectors, values, rest, float(torch.linalg.matrix_norm(left)) / norm if norm else 0.0
    )


def _leading(C: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors and their values, falling; of a wide matrix nearly so."""
    n = len(C)
    if n <= DENSE or 4 * rank > n:
        values, vectors = torch.linalg.eigh(C)
        return vectors[:, -rank:].flip(1).contiguous(), values[-rank:].flip(0).clamp(min=0)
    generator = torch.Generator().manual_seed(n)
    start = torch.randn(n, rank + EXTRA, generator=generator, dtype=torch.float64).to(C.device)
    for _ in range(PASSES):
        start = C @ torch.linalg.qr(start).Q
    Q = torch.linalg.qr(start).Q
    return nystrom(C @ Q, Q, rank, torch.finfo(C.dtype).eps)


def nystrom(Y: Tensor, Q: Tensor, rank: int, rounding: float) -> tuple[Tensor, Tensor]:
    """The leading part of ``Y (Qᵀ Y)⁺ Yᵀ``, which is nowhere above C, for ``Y = C Q``.

    Args:
        Y: Shape ``(n, k)``, float64.
        Q: Of the same shape, full column rank.
        rank: Number of eigenvectors.
        rounding: Relative error of Y.

    Returns:
        Vectors, shape ``(n, rank)``, and values, falling.

    Raises:
        InputError: If C is not positive semidefinite.
    """
    shift = rounding * float(torch.linalg.matrix_norm(Y))
    for _ in range(TRIES):
        shifted = Y + shift * Q  # of C + shift: a moment of low rank has a factor, too
        half, failed = torch.linalg.cholesky_ex((Q.mT @ shifted + shifted.mT @ Q) / 2)
        if not int(failed):
            break
        shift *= 10
    else:
        raise InputError("expected a positive semidefinite second moment; measure it again")
    F = torch.linalg.solve_triangular(half.mT, shifted, upper=True, left=False)
    vectors, values = _left_vectors(F, rank, rounding)
    return vectors, (values - shift).clamp(min=0)


def _left_vectors(F: Tensor, rank: int, rounding: float) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors and squared values, by products where those lose nothing."""
    if rounding < GRAM:
        vectors, values, _ = torch.linalg.svd(F, full_matrices=False)
        return vectors[:, :rank].contiguous(), values[:rank].square()
    # no squared value of F is below its shift, so that the squares keep more than there is to know
    values, right = torch.linalg.eigh(F.mT @ F)
    values, right = values[-rank:].flip(0), right[:, -rank:].flip(1)
    return F @ (right / values.sqrt()), values


def mean(moments: Sequence[Moment], shares: Sequence[float]) -> Moment:
    """``Σ shareᵢ Cᵢ``, of the shape that all have; a sketch if one of them is.

    A sketch has the largest rank among them.  Its loss bounds what all of them have lost:
    ``(Σ shareᵢ lossᵢ ‖Cᵢ‖ + what this sum leaves out) / ‖C‖``.

    Args:
        moments: Of one width.
        shares: Their weights, which sum up to 1.

    Returns:
        The mean, float64, on the processor.

    Raises:
        InputError: If their widths or kinds differ.
    """
    kinds = {(width(x), isinstance(x, Tensor) and x.ndim == 1) for x in moments}
    if len(kinds) > 1:
        raise InputError(f"expected moments of one kind and width, got {sorted(kinds)}")
    plain = [x.to("cpu") for x in moments if isinstance(x, Tensor)]
    if len(plain) == len(moments):
        found = torch.zeros_like(plain[0], dtype=torch.float64)
        for share, moment in zip(shares, plain, strict=True):
            found += share * moment
        return found
    rank = max(len(x.values) for x in moments if isinstance(x, Sketch))
    parts = [(x if isinstance(x, Sketch) else sketch(x, rank)).to("cpu") for x in moments]
    return _mean_of_sketches(parts, shares, rank)


def _mean_of_sketches(parts: Sequence[Sketch], shares: Sequence[float], rank: int) -> Sketch:
    """The sum in the space of all vectors, which is exact, and its leading part."""
    both = list(zip(parts, shares, strict=True))
    half = torch.cat([x.vectors * (share * x.values).sqrt() for x, share in both], dim=1)
    vectors, values, _ = torch.linalg.svd(half, full_matrices=False)
    dropped = vectors[:, rank:] * values[rank:]
    left = dropped.square().sum(dim=1)
    rest = sum((share * x.rest for x, share in both), left)
    found = Sketch(vectors[:, :rank].contiguous(), values[:rank].square(), rest, 0.0)
    # ‖X Xᵀ − diag‖² = ‖XᵀX‖² − ‖diag‖², not below 0 but for rounding
    off = float((dropped.mT @ dropped).square().sum() - left.square().sum())
    before = sum(share * norm_of(x) * x.loss / max(1 - x.loss, 1e-9) for x, share in both)
    lost = max(0.0, off) ** 0.5 + before
    least = norm_of(found) - lost  # ‖C‖ is not below it; what is left out of C is no more than C
    loss = min(1.0, lost / least) if least > 0 else 1.0
    return Sketch(found.vectors, found.values, found.rest, loss)


def norm_of(moment: Sketch) -> float:
    """``‖C≈‖_F`` by thin products.

    Args:
        moment: C≈.

    Returns:
        The norm.
    """
    cross = moment.vectors.square().mT @ moment.rest @ moment.values
    return float(moment.values.square().sum() + 2 * cross + moment.rest.square().sum()) ** 0.5


def output_power(weight: Tensor, moment: Moment) -> float:
    """``tr(W C Wᵀ) = E‖W x‖²``; of an embedding with index shares p ``Σ pᵢ ‖Wᵢ‖²``.

    Cost: ``m n²``, of a sketch ``2 m n r``.

    Args:
        weight: Shape ``(m, n)``; of an embedding ``(n, m)``, one row per index.
        moment: C in any form.

    Returns:
        The mean square of the output, the bias left out.

    Example:
        >>> output_power(torch.tensor([[1.0, 2.0]]), torch.eye(2))
        5.0
    """
    if isinstance(moment, Tensor) and moment.ndim == 1:
        squares = exact(weight.detach()).square().sum(dim=1)
        return float(squares @ moment.to(squares))
    parts = weight.detach().split(ROWS)
    return sum(float((right_times(W, moment) * exact(W)).sum()) for W in parts)
