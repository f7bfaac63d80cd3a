"""The thin SVD of a matrix that is held in memory, by LAPACK."""

from __future__ import annotations

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._guard import all_finite
from bulkedge._guard import matrix as require_matrix
from bulkedge._linmap import remedy


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triplets of a matrix that is held in memory.

    LAPACK is several times slower on a wide matrix than on its transpose
    (``benchmarks/precision.py``), so the transpose it gets.

    Cost: O(mn·min(m, n)) operations; memory of about eight copies where the matrix is square.

    Args:
        matrix: Shape ``(m, n)``.

    Returns:
        U of shape ``(m, p)``, σ of shape ``(p,)`` descending, V of shape ``(n, p)``, p = min(m, n).

    Raises:
        InputError: If it is no matrix of real floating-point numbers, or not finite, or if its
            dtype cannot hold σ₁.

    Example:
        >>> U, S, V = thin_svd(torch.tensor([[0.0, 3.0, 0.0], [2.0, 0.0, 0.0]]))
        >>> S.tolist(), V.shape
        ([3.0, 2.0], torch.Size([3, 2]))
    """
    require_matrix("the matrix", matrix)
    U, S, V = factored(matrix)
    if not torch.compiler.is_compiling() and not all_finite(S):
        raise InputError(
            f"expected singular values that {S.dtype} can hold, got larger ones; {remedy(S.dtype)}"
        )
    return U, S, V


def factored(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`thin_svd` of a finite matrix; values beyond the numbers of the dtype are infinite."""
    wide = matrix.shape[0] < matrix.shape[1]
    U, S, Vt = torch.linalg.svd(matrix.mT if wide else matrix, full_matrices=False)
    return (Vt.mT, S, U) if wide else (U, S, Vt.mT)
