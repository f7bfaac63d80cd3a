"""One matrix of a base: its values, its bulk, and the strengths θ_c and θ_k that follow."""

from __future__ import annotations

import torch

from bulkedge._linmap import LowRank
from bulkedge.auditing.rows import bulk_row
from bulkedge.checkpoint import LoraFactors, StoredUpdate
from bulkedge.checkpoint.lora import alpha_of, scale_of
from bulkedge.comparison import Comparison
from bulkedge.comparison.pair import load
from bulkedge.records.budget import Allowance, BudgetSettings, MatrixBudget
from bulkedge.update import MOMENTS, BaseSpectrum, budget, measure, moment_misfit

from .plan import Wanted

FLAT = (
    "the k-th singular value is zero or tied: every update makes a new direction among the k "
    "leading ones, and there is no limit; give a smaller --top-k"
)
STEP = "the bulk ends in a step, where theory has no threshold: the limit is that of random updates"
DORA = "DoRA scales each row besides: no α alone keeps its update below a level"
REPLACED = "the adapter replaces the whole tensor besides: no α alone keeps that below a level"
KEPT_BELOW = 1e-5
"""By what part an α stays below its limit, so that its rounding does not lead beyond."""


def measure_matrix(wanted: Wanted, settings: BudgetSettings) -> MatrixBudget:
    """The row of one matrix, without what is allowed.

    Args:
        wanted: The matrix.
        settings: What was asked for; only ``top_k`` and ``seed`` matter here.

    Returns:
        The row.  A matrix that cannot be measured says so in ``status`` and ``note``; the others
        go on.
    """
    try:
        found = measure(wanted.matrix.read(), top_k=settings.top_k, seed=settings.seed)
    except Exception as error:  # whatever it is: the others go on, and the exit code is 2
        return _row(wanted, "failed", note=f"{type(error).__name__}: {error}")
    k = min(settings.top_k, len(found.values))
    known = {
        "sigma_1": float(found.values[0]),
        "sigma_k": float(found.values[k - 1]),
        "passes": found.passes,
    }
    if found.spectrum is None:
        return _row(wanted, "no_limit", note=found.problem, **known)
    exact = found.exact == len(found.values)
    known |= {
        "bulk": bulk_row(found.spectrum, exact=exact),
        "noise": _is_noise(found.spectrum, exact=exact),
    }
    limit = budget(found.spectrum, 1, top_k=settings.top_k)
    if not limit.top_k_threshold > 0:
        return _row(wanted, "no_limit", note=FLAT, threshold=limit.threshold, **known)
    return _row(
        wanted,
        "measured",
        note="; ".join(filter(None, (found.note, None if limit.threshold > 0 else STEP))) or None,
        threshold=limit.threshold,
        top_k_threshold=limit.top_k_threshold,
        **known,
    )


def spike_of(comparison: Comparison, factors: StoredUpdate) -> float | str:
    """The strongest spike of an adapter's update, ``‖ΔW‖₂``; or why no α holds it.

    Args:
        comparison: A matrix and what the adapter makes of it.
        factors: Its low-rank part.

    Returns:
        The norm, or what to say instead.
    """
    if factors.read_magnitude() is not None:
        return DORA
    if isinstance(factors, LoraFactors) and factors.initial:
        return str(factors.correctable())
    if comparison.tuned is not None and load(comparison, torch.device("cpu")).replaced is not None:
        return REPLACED
    update = LowRank(*factors.read())
    if not (update.A.isfinite().all() and update.B.isfinite().all()):
        return "the adapter's factors hold NaN or Inf; save it again"
    return float(update.singular_values()[0])


def allowed_like(
    row: MatrixBudget, wanted: Wanted, settings: BudgetSettings
) -> tuple[Allowance | None, str | None]:
    """What the limit makes of an adapter's update: the α that keeps it below; or why none.

    Args:
        row: The matrix, measured.
        wanted: It, with its update.
        settings: The level, and whether scales are α/√r.

    Returns:
        The allowance, or a note.
    """
    update = wanted.update
    if update is None or update.factors is None or row.top_k_threshold is None:
        return None, None
    if (factors := update.factors).rank is None or factors.scale is None:
        return None, "an update without rank and scale: no α scales it"
    try:
        spike = spike_of(update, factors)
    except Exception as error:  # a damaged adapter must not stop the other matrices
        spike = f"{type(error).__name__}: {error}"
    if isinstance(spike, str):
        return None, spike
    if not (scale := abs(factors.scale)):
        return None, "a scale of zero: the update is none, and no α makes it one"
    rank, limit = factors.rank, settings.level * row.top_k_threshold
    alpha = alpha_of(scale, rank, rslora=settings.rslora)
    if spike > (1 - KEPT_BELOW) * limit:
        alpha *= (1 - KEPT_BELOW) * limit / spike
    return Allowance(
        rank=rank, scale=scale, max_ba_norm=limit / scale, spectral_norm_update=spike, alpha=alpha
    ), None


def allowed_any(row: MatrixBudget, settings: BudgetSettings, mean: float) -> Allowance | None:
    """What the limit allows an update of the rank and α that are planned.

    Args:
        row: The matrix, measured.
        settings: Rank, α and level.
        mean: Of θ_k over the matrices that are to be trained.

    Returns:
        The allowance; None without rank and α, or without a limit.
    """
    rank, alpha = settings.rank, settings.alpha
    if rank is None or alpha is None or row.top_k_threshold is None:
        return None
    scale = scale_of(alpha, rank, rslora=settings.rslora)
    return Allowance(
        rank=rank,
        scale=scale,
        max_ba_norm=settings.level * row.top_k_threshold / scale,
        spectral_norm_update=None,
        alpha=alpha * row.top_k_threshold / mean,
    )


def _is_noise(spectrum: BaseSpectrum, *, exact: bool) -> bool | None:
    """Whether a base is noise; None where a quadrature cannot tell."""
    if spectrum.fit.white:
        return True
    return False if exact or moment_misfit(spectrum.values, spectrum.shape) > MOMENTS else None


def _row(wanted: Wanted, status: str, **fields: object) -> MatrixBudget:
    matrix = wanted.matrix
    return MatrixBudget.model_validate(
        {
            "name": matrix.name,
            "module": wanted.module,
            "shape": matrix.acts_as,
            "dtype": matrix.dtype,
            "status": status,
            **fields,
        }
    )
