"""What an initialisation took off the base, for adapters that are relative to it.

PiSSA (Meng et al., arXiv:2404.02948) takes the best part of rank r, ``U_r Σ_r V_rᵀ``; OLoRA
(Büyükakyüz, arXiv:2406.01775) takes ``s·Q_r R_r`` of the factorisation ``W0 = Q R``, which is s
times W0 projected onto the span of its first r columns.  The base alone determines either, so the
update ``s·(B·A − B0·A0)`` is known without the adapter of before training.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bulkedge._errors import AdapterError
from bulkedge._linmap import Dense, LowRank
from bulkedge._precision import exact
from bulkedge.checkpoint import LoraFactors, StoredMatrix
from bulkedge.checkpoint.lora import CONVERT, FROM_THE_BASE
from bulkedge.intruder import Remember
from bulkedge.triplet import singular_triplet

from .comparison import Comparison


def why_not_initial(comparison: Comparison) -> str | None:
    """Why what an initialisation took off a base cannot be computed from it.

    Args:
        comparison: A base matrix and its update.

    Returns:
        The reason and the remedy; None if it can, or nothing was taken off.
    """
    update, base = comparison.factors, comparison.base
    if not isinstance(update, LoraFactors) or (initial := update.initial) is None:
        return None
    method = FROM_THE_BASE[initial]
    if comparison.resized is not None:
        return f"{method} of a vocabulary that was resized: not of this base; {CONVERT}"
    if base.codec.quantised:
        return f"{method} on a quantised base, where PEFT rounds the residual again; {CONVERT}"
    if initial == "olora" and base.transposed:
        return f"{method} of a weight stored as (in, out), where PEFT takes its rows; {CONVERT}"
    return None


def since_initial(
    update: LowRank, comparison: Comparison, base: Tensor, remember: Remember
) -> LowRank:
    """The update of the base, from trained factors and those that were taken off it.

    Args:
        update: ``s·B·A`` of rank r.
        comparison: What it belongs to.
        base: W0 as it is compared, shape ``(m, n)``.
        remember: Where what is computed of the base is kept.

    Returns:
        ``s·(B·A − B0·A0)``, of rank up to 2r; ``update`` itself where nothing was taken off.

    Raises:
        AdapterError: If the scale is zero, by which PEFT divides.
    """
    stored = comparison.factors
    if not isinstance(stored, LoraFactors) or (initial := stored.initial) is None:
        return update
    if update.scale == 0:
        raise AdapterError(
            f"{stored.infos[0].file}: a scale of zero, which {FROM_THE_BASE[initial]} divides by; "
            "correct lora_alpha"
        )
    r, part = update.A.shape[0], comparison.base
    whole = part if stored.rows is None else replace(part, rows=None)
    left, right = remember(
        f"{initial}, {r}, {whole.suffix}",
        lambda: _taken(initial, exact(base if whole is part else _read(whole, base)), r),
    )
    left = left if stored.rows is None else left[slice(*stored.rows)]
    if initial == "pissa":  # whose factors hold √(σ/s)
        left = left / update.scale
    return LowRank(torch.cat([update.B, -left], dim=1), torch.cat([update.A, right]), update.scale)


def _read(matrix: StoredMatrix, like: Tensor) -> Tensor:
    """A matrix, where another one is."""
    return matrix.read().to(like.device)


def _taken(initial: str, W0: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``U_r Σ_r`` and ``V_rᵀ``, or ``Q_r`` and ``R_r``, in float64."""
    if initial == "pissa":
        found = singular_triplet(Dense(W0), min(r, *W0.shape))
        return found.u * found.sigma, found.v.mT
    Q = torch.linalg.qr(W0[:, :r])[0]
    return Q, Q.mT @ W0
