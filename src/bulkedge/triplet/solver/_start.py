"""The block of right vectors with which an iteration begins."""

from __future__ import annotations

import torch
from torch import Tensor

from bulkedge._linmap import LinearMap


def start_block(
    A: LinearMap, columns: int, start: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Orthonormal block, shape ``(n, columns)``: the guess first, completed by Gaussian vectors.

    Args:
        A: Shape ``(m, n)``.
        columns: How many, at most n.
        start: A guess of the right vectors, shape ``(n, any)``, or None.
        generator: Source of the rest.

    Returns:
        Columns that span the guess (its first ``columns``) and something random.
    """
    n = A.shape[1]
    guess = torch.empty(n, 0, dtype=A.dtype, device=A.device) if start is None else start
    # drawn on the CPU in float64, so that every device and dtype starts alike
    drawn = torch.randn(n, columns, generator=generator, dtype=torch.float64)
    block = torch.cat([guess, drawn.to(A.device, A.dtype)], dim=1)[:, :columns]
    return torch.linalg.qr(block).Q
