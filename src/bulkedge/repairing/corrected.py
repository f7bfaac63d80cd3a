"""A pair of base and tuned matrix with a correction applied, in the form that it is stored in.

A product of two factors grows by the columns of the correction.  DoRA, ``W = D V`` with
``V = W0 + s·B·A`` and ``D = diag(m/‖V‖)``, can hold any low-rank correction exactly:

    W' = D V + X Yᵀ = D (V + D⁻¹X Yᵀ) = D V',      m'_i = d_i ‖V'_i‖.

(Of an embedding D scales columns, and stands on the right.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import LowRank
from bulkedge._precision import exact
from bulkedge.comparison.pair import TILE, Pair, row_norms

from .method import Correction


def corrected(pair: Pair, correction: Correction) -> Pair:
    """The pair with ``W + X Yᵀ``, or ``W0 + X Yᵀ``, for W.

    Args:
        pair: Base and tuned matrix.
        correction: What to change.

    Returns:
        A pair of the same kind; a full matrix is rounded to the dtype that it had.

    Raises:
        InputError: If the stored form cannot hold the corrected matrix.
    """
    if pair.factors is None:
        start = pair.base if correction.anew else pair.dense_part
        return replace(pair, replaced=_added(start, correction, pair.dense_part.dtype))
    factors = _factors(pair, correction)
    if pair.magnitude is None:
        return replace(pair, factors=factors)
    norms = row_norms(pair.dense_part, factors, pair.per_column)
    return replace(pair, factors=factors, magnitude=norms if correction.anew else _D(pair) * norms)


def in_factors(pair: Pair, correction: Correction) -> Correction:
    """The same correction as one of ``V = W0 + s·B·A``, what the factors add up to.

    Args:
        pair: A pair with factors.
        correction: Of W.

    Returns:
        Of V, never made anew.

    Raises:
        InputError: If the stored form cannot hold it.
    """
    X, Y = correction.X, correction.Y
    if correction.anew:
        if pair.replaced is not None:
            raise InputError(
                "expected an update of the base, got one of a tensor that replaces it; scale or "
                "project"
            )
        B, A = _folded(pair)
        return Correction(torch.cat([-B, X], dim=1), torch.cat([A.mT, Y], dim=1))
    if pair.magnitude is None:
        return correction
    D = _D(pair)
    if not bool((D != 0).all()):
        raise InputError("expected magnitudes that are not zero, got a row that DoRA switched off")
    return Correction(X, Y / D[:, None]) if pair.per_column else Correction(X / D[:, None], Y)


def _factors(pair: Pair, correction: Correction) -> LowRank:
    """The factors of V', scale folded in."""
    B, A = _folded(pair)
    more = in_factors(pair, correction)
    return LowRank(torch.cat([B, more.X], dim=1), torch.cat([A, more.Y.mT]))


def _folded(pair: Pair) -> tuple[Tensor, Tensor]:
    """``s·B`` and A of a pair that has them."""
    if pair.factors is None:
        raise TypeError("expected a pair with factors")
    return pair.factors.scale * pair.factors.B, pair.factors.A


def _D(pair: Pair) -> Tensor:
    """The diagonal of D of a pair that has one."""
    if pair.magnitude_over_norm is None:
        raise TypeError("expected a pair with a magnitude")
    return pair.magnitude_over_norm


def rounding(pair: Pair, after: Pair, correction: Correction) -> float:
    """What the dtype of a full matrix leaves out.

    Args:
        pair: Before.
        after: What :func:`corrected` made of it.
        correction: By what.

    Returns:
        ``‖stored − meant‖_F``.
    """
    start = pair.base if correction.anew else pair.dense_part
    stored = after.dense_part.split(TILE)
    errors = [(W - out).norm() for W, out in zip(_tiles(start, correction), stored, strict=True)]
    return float(torch.stack(errors).norm())


def _added(start: Tensor, correction: Correction, dtype: torch.dtype) -> Tensor:
    """``start + X Yᵀ`` in a dtype."""
    result = torch.empty(start.shape, dtype=dtype, device=start.device)
    for out, W in zip(result.split(TILE), _tiles(start, correction), strict=True):
        out.copy_(W)
    return result


def _tiles(start: Tensor, correction: Correction) -> Iterator[Tensor]:
    """``start + X Yᵀ`` in float64, some rows at a time."""
    for W, X in zip(start.split(TILE), correction.X.split(TILE), strict=True):
        yield torch.addmm(exact(W), X, correction.Y.mT)
