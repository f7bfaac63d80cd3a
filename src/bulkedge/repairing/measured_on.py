"""Whether moments of a task were measured on the fine-tune that they are used for."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._linmap import LowRank
from bulkedge._precision import exact
from bulkedge.comparison import Comparison, Pair, load
from bulkedge.moments import Layer, alike, sample_places

SAME = 0.5
"""Cosine from which on two changes of a weight count as one: bfloat16 may round much of it away.

Those of two fine-tunes have some 0.1, at random.
"""
ROUNDING = 1e-6
"""Changes that differ by less of the weight are one: moments are measured in float32."""
ANOTHER = (
    "the task moments were measured on another fine-tune; measure this one, with `bulkedge moments "
    "BASE TEXTS --tuned TUNED`"
)
NOT_TOLD = (
    "the task moments do not say which fine-tune they were measured on; measure them again if it "
    "may be another"
)


def check_fine_tune(layer: Layer, comparison: Comparison, pair: Pair) -> str | None:
    """Check that moments of the task are of the fine-tune that a matrix belongs to.

    Args:
        layer: The moments.
        comparison: The matrix.
        pair: Its tensors, without DoRA's magnitude.

    Returns:
        What to know where that is unknown; None where it is the same one.

    Raises:
        InputError: If they are of another.
    """
    if layer.tuned_sample is None:
        return NOT_TOLD
    if comparison.base.alias is not None:  # the model ran with the tensor that it shares
        return None
    kept, rows, columns = _places(comparison)
    before = exact(layer.sample)[kept]
    if torch.equal(layer.sample, layer.tuned_sample):  # the model had these weights from the start
        before = exact(pair.base[rows, columns]).cpu()
    measured, own = exact(layer.tuned_sample)[kept] - before, _change(pair, rows, columns)
    if not _is_one(measured, own, ROUNDING * float(before.norm())):
        raise InputError(ANOTHER)
    return None


def ran_with(layer: Layer, comparison: Comparison) -> bool:
    """Whether the weight that moments were measured with is that of the fine-tune.

    Args:
        layer: The moments.
        comparison: The matrix.

    Returns:
        Whether the entries that were kept are alike; False where none of them is in this part.
    """
    kept, rows, columns = _places(comparison)
    pair = load(comparison, torch.device("cpu"))
    own = exact(pair.dense_part[rows, columns])
    if pair.factors is not None:
        own = own + _product(pair.factors, rows, columns)
    if pair.magnitude_over_norm is not None:
        own = own * pair.magnitude_over_norm[columns if pair.per_column else rows]
    return alike(exact(layer.sample[kept]), own)


def _is_one(one: Tensor, other: Tensor, slack: float) -> bool:
    """Whether two changes are one, but for rounding."""
    if float((one - other).norm()) <= slack:
        return True
    return float(one @ other) >= SAME * float(one.norm()) * float(other.norm()) > 0


def _places(comparison: Comparison) -> tuple[list[int], Tensor, Tensor]:
    """Which of the entries that are kept lie in a matrix, and where they do, as ``(out, in)``."""
    base = comparison.base
    out, width = replace(base, rows=None).acts_as
    first, last = base.rows or (0, out)
    found = []
    for i, place in enumerate(sample_places(math.prod((out, width)))):
        row, column = divmod(place, out)[::-1] if base.transposed else divmod(place, width)
        if first <= row < last:
            found.append((i, row - first, column))
    kept, rows, columns = zip(*found, strict=True) if found else ((), (), ())
    return list(kept), torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)


def _change(pair: Pair, rows: Tensor, columns: Tensor) -> Tensor:
    """These entries of ``W − W0``."""
    if pair.factors is not None:
        return _product(pair.factors, rows, columns).cpu()
    before, after = pair.base[rows, columns], pair.dense_part[rows, columns]
    return (exact(after) - exact(before)).cpu()


def _product(factors: LowRank, rows: Tensor, columns: Tensor) -> Tensor:
    """These entries of ``s·B·A``."""
    return factors.scale * (factors.B[rows] * factors.A[:, columns].mT).sum(dim=1)
