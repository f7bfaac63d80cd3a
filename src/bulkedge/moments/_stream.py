"""Sketches of inputs too wide for a matrix, from sums of thin products alone.

While a model runs, only ``Y = C Ω`` is summed up for a fixed random Ω of a few columns, and the
diagonal of C.  From them comes a Nyström approximation, in one pass over the inputs; a few more
columns, which it does not see, measure what it has lost.  Everything is linear in C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bulkedge._precision import exact

from ._sketch import Sketch, norm_of, nystrom

EXACT_WIDTH = 4096
"""Inputs up to this width are summed up exactly."""
RANK = 1024
"""Eigenvectors that are kept of a wider one."""
COLUMNS = 3
"""Columns of Ω for each eigenvector that is kept."""
PROBES = 32
"""Columns of Ω that measure the loss; its estimate is within a quarter of it, mostly."""


def stream_columns(width: int, rank: int | None, exact_width: int) -> int:
    """Number of columns of Ω for inputs of a width; 0 where they are summed up exactly.

    Args:
        width: n.
        rank: Eigenvectors to be kept; 1024 if None.
        exact_width: The largest width that is summed up exactly.

    Returns:
        Columns, the probes included; never as many as n.

    Example:
        >>> stream_columns(384, None, 4096), stream_columns(11008, None, 4096)
        (0, 3104)
    """
    columns = COLUMNS * (rank or RANK) + PROBES
    return columns if width > exact_width and columns + 1 < width else 0


def random_columns(width: int, columns: int) -> Tensor:
    """Ω, the same for every layer, run and machine.

    Args:
        width: n.
        columns: With the probes.

    Returns:
        Normal numbers, shape ``(n, columns)``, float32.
    """
    return torch.randn(width, columns, generator=torch.Generator().manual_seed(width))


def products(rows: Tensor, omega: Tensor) -> Tensor:
    """``Σ x xᵀ Ω`` of rows, and their squares as the last column.

    Cost: ``4 · rows · n · columns``.

    Args:
        rows: Shape ``(rows, n)``.
        omega: From :func:`random_columns`, on their device.

    Returns:
        Shape ``(n, columns + 1)``.
    """
    rows = rows.float()
    return torch.cat([rows.mT @ (rows @ omega), rows.square().sum(dim=0)[:, None]], dim=1)


def is_stream(total: Tensor) -> bool:
    """Whether a sum is that of :func:`products`, not of squares."""
    return total.ndim == 2 and total.shape[0] != total.shape[1]


def from_products(total: Tensor, rank: int) -> Sketch:
    """A sketch of C from :func:`products`.

    Args:
        total: Shape ``(n, columns + 1)``, of means.
        rank: Number of eigenvectors.

    Returns:
        The sketch; its loss is estimated by the probes.

    References:
        Tropp et al., "Fixed-rank approximation of a positive-semidefinite matrix from streaming
        data", NeurIPS 2017, arXiv:1706.05736.

    Example:
        >>> x = torch.randn(9, 300, generator=torch.Generator().manual_seed(0))
        >>> found = from_products(products(x, random_columns(300, 64)) / 9, rank=16)
        >>> C = x.mT @ x / 9
        >>> torch.allclose((found.vectors * found.values) @ found.vectors.mT, C.double(), atol=1e-3)
        True
    """
    total = exact(total)
    n, columns = len(total), total.shape[1] - 1
    omega = random_columns(n, columns).to(total)
    used = columns - PROBES
    diagonal, probes = total[:, -1], omega[:, used:]
    # the products were formed in float32: below its rounding there is nothing to be seen
    vectors, values = nystrom(
        total[:, :used], omega[:, :used], rank, torch.finfo(torch.float32).eps
    )
    rest = (diagonal - vectors.square() @ values).clamp(min=0)
    seen = vectors @ (values[:, None] * (vectors.mT @ probes)) + rest[:, None] * probes
    lost = float((total[:, used:columns] - seen).norm()) / PROBES**0.5
    found = Sketch(vectors, values, rest, 0.0)
    there = norm_of(found)
    return Sketch(vectors, values, rest, min(1.0, lost / there) if there else 0.0)
