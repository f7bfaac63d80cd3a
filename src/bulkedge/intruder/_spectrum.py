"""All singular values of the base: computed, or the leading ones and a quadrature of the others."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from bulkedge._linmap import Dense, LinearMap
from bulkedge._precision import exact
from bulkedge.triplet import Ritz

TILE = 2048
"""Rows or columns that are converted at a time."""
TINY = 1e-300
"""A divisor is at least this, so that nothing is divided by zero."""


def guess_spectrum(
    ritz: Ritz, known: int, shape: tuple[int, int], k: int, start_size: int, frobenius: float
) -> Tensor:
    """All singular values: the leading Ritz values, the others where Gauss quadrature puts them.

    The Ritz vectors' components on the start block are the weights of a quadrature of its spectral
    measure. The k directions count individually, the random ones for all the rest.

    Args:
        ritz: The Ritz vectors.
        known: How many leading Ritz values are taken as they are.
        shape: ``(m, n)`` of the base.
        k: How many directions the process began with.
        start_size: How many vectors it began with in all.
        frobenius: ``‖W0‖_F``: the result has this sum of squares, as far as its order allows.

    Returns:
        Shape ``(min(m, n),)``.
    """
    m, p = shape[0], min(shape)
    share = (m - k) / (start_size - k) if start_size > k else 0.0
    weight = torch.full((start_size,), share, dtype=torch.float64)
    weight[:k] = 1.0
    # How many singular values each Ritz value stands for.
    counts = weight @ ritz.left[:start_size].square()
    sigma, counts = ritz.sigma[known : len(counts)].numpy(), counts[known:].numpy()
    if p == known or counts.sum() == 0:
        return ritz.sigma[:p]
    counts = counts * ((m - known) / counts.sum())
    above = numpy.cumsum(counts) - counts / 2
    if len(sigma) > 1:  # the spectrum reaches half a node further at either end
        ends = 1.5 * sigma[[0, -1]] - 0.5 * sigma[[1, -2]]
        sigma = numpy.concatenate([ends[:1], sigma, ends[1:].clip(0.0)])
        above = numpy.concatenate([[0.0], above, [m - known]])
    rest = torch.from_numpy(numpy.interp(numpy.arange(p - known) + 0.5, above, sigma))
    # The sum of the squares is known: scale the guessed values to it.
    left = frobenius**2 - float(ritz.sigma[:known].square().sum())
    rest *= (max(left, 0.0) / max(float(rest.square().sum()), TINY)) ** 0.5
    return torch.cat([ritz.sigma[:known], rest.clamp_max(float(ritz.sigma[max(known - 1, 0)]))])


def all_values(W0: LinearMap) -> Tensor:
    """All singular values in float64, without a copy of a matrix in float64.

    Args:
        W0: Shape ``(m, n)``.

    Returns:
        Descending, shape ``(min(m, n),)``.
    """
    # R of [R of the rows so far; the next rows] is R of them all, as stable as one QR of the whole
    # (Demmel et al., arXiv:0808.2664)
    matrix = W0.matrix if isinstance(W0, Dense) else W0.to_dense()
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    R = exact(tall.new_zeros(0, tall.shape[1]))
    for rows in tall.split(TILE):
        R = torch.linalg.qr(torch.cat([R, exact(rows)]), mode="r").R
    return torch.linalg.svdvals(R)
