"""One matrix: read it, solve it, judge it.

The row of a matrix depends on its tensors and the recipe alone, not on the process, the order or
the number of workers that computed it.  Another kind of processor rounds otherwise: there the last
digits differ, and at times how far a certificate went; what it proved holds on either.
"""

from __future__ import annotations

import math
import sys
from typing import Literal

import torch

from bulkedge._errors import CheckpointError, InputError
from bulkedge._linmap import frobenius
from bulkedge.checkpoint.of_base import OfBase
from bulkedge.comparison import Comparison, Pair, judge_pair, load, what_is_not_finite
from bulkedge.comparison.drift import update_rows
from bulkedge.intruder import Judgement, Remember, compute_anew
from bulkedge.records import Matrix, Recipe
from bulkedge.records.rows import CriticalScale
from bulkedge.update import (
    BaseSpectrum,
    Measured,
    UpdateSVD,
    aligned_scale,
    budget,
    critical_scale,
)
from bulkedge.update._products import measure_further, norm_is_known

from .curve import expected_curve, judged_point, scale_curve
from .drift import Drift, drift_of
from .known import KnownBases
from .rows import angle_rows, bulk_row, direction_rows, predicted_rows, rank_fields, spectrum_row
from .scale import measured_scale

ZEROS = (
    "all entries of the tuned matrix are zero, where the base's are not: a damaged save? save it "
    "again, or leave it out with --exclude"
)


def audit_matrix(comparison: Comparison, recipe: Recipe, known: KnownBases | None = None) -> Matrix:
    """The row of one matrix.

    Cost: some 15 to 30 products with the base or the tuned matrix, each with a block of 16 vectors;
    two SVDs where that leaves a verdict open.  Some 20 to 40 more for the bulk of a base of which
    fewer than eight values have converged by then.

    Args:
        comparison: What to compare.
        recipe: How.
        known: What is known of the base, where several fine-tunes of it are audited.

    Returns:
        The row.  A matrix that cannot be audited says so in ``status`` and ``note``; the others
        go on.
    """
    try:
        return _audit(comparison, recipe, known)
    except Exception as error:  # whatever it is: the others go on, and the exit code is 2
        return _row(comparison, "failed", note=f"{type(error).__name__}: {error}")


def _audit(comparison: Comparison, recipe: Recipe, known: KnownBases | None) -> Matrix:
    """Load, look for the easy ends, else judge."""
    device = torch.device(recipe.device)
    remember = compute_anew if known is None else known.of(comparison, device)
    pair = load(comparison, device, remember)
    if problem := _not_finite(pair):
        return _row(comparison, "not_finite", note=problem)
    norm_update = pair.update_norm(recipe.seed)
    if norm_update == 0:
        drift = None if comparison.inputs is None else 0.0  # whatever the inputs are
        return _row(comparison, "unchanged", drift=drift)
    judged = judge_pair(pair, recipe, remember)
    if judged.tuned.rank == 0:
        return _row(comparison, "failed", note=ZEROS)
    measured = _measure(pair, judged, recipe, remember)
    notes = (_rank_note(judged.tuned.rank, recipe), judged.note, measured.problem, measured.note)
    drift = _drift(comparison, pair, judged, recipe)
    moved = drift if isinstance(drift, Drift) else None
    return _row(
        comparison,
        "audited",
        note="; ".join(filter(None, notes)) or None,
        spectral_norm_base=None if measured.note else float(measured.values[0]),
        spectral_norm_update=norm_update,
        relative_update=_relative_update(pair),
        new_directions=sum(direction.score < recipe.epsilon for direction in judged.directions),
        directions=direction_rows(judged, moved),
        angles=angle_rows(judged),
        spectrum=spectrum_row(measured.values),
        passes=judged.passes + measured.passes,
        low_rank=pair.low_rank is not None,
        **({} if pair.spikes is None else rank_fields(pair.spikes.gamma)),
        **_theory(measured, pair.spikes, judged, recipe),
        **_scales(measured.spectrum, pair, judged, recipe, norm_update, remember),
        **({"drift_note": drift} if moved is None else moved.fields),
    )


def _drift(
    comparison: Comparison, pair: Pair, judged: Judgement, recipe: Recipe
) -> Drift | str | None:
    """The drift of a matrix, or why it is not known; None where it was not asked for."""
    if isinstance(comparison.inputs, str | None):
        return comparison.inputs
    try:
        return drift_of(comparison.inputs, comparison.base, pair, judged.tuned, recipe)
    except (InputError, CheckpointError) as error:
        return str(error)


def _measure(pair: Pair, judged: Judgement, recipe: Recipe, remember: Remember) -> Measured:
    """Norm and bulk of the base, from what is known of it and further values where needed."""
    values, exact = judged.spectrum, judged.computed_count
    if exact == len(values):
        what = f"bulk, {judged.method}"
        return remember(what, lambda: measure_further(pair.base, values, exact))
    # by products alone, the spectrum depends on the tuned matrix, too
    known = norm_is_known(pair.base_map(pair.product_dtype), judged.base)
    return measure_further(
        pair.base,
        values,
        exact,
        norm_known=known,
        top_k=recipe.top_k,
        seed=recipe.seed,
        remember=remember,
    )


def _theory(
    measured: Measured,
    update: UpdateSVD | None,
    judged: Judgement,
    recipe: Recipe,
) -> dict[str, object]:
    """Bulk and threshold of the base, and what a low-rank update was expected to do to it."""
    base = measured.spectrum
    if base is None:
        return {}
    exact = measured.exact == len(measured.values)
    theta_k = budget(base, 1, top_k=recipe.top_k).top_k_threshold
    found = {
        "bulk": bulk_row(base, exact=exact),
        "threshold": base.fit.threshold,
        "top_k_threshold": theta_k,
    }
    if update is None:
        return found
    outlying = base.fit.bulk.supercritical(update.gamma)
    # θ_k is below θ_c where the bulk that was fitted ends above σ_k: no outlier is needed there
    leading = (update.gamma > theta_k) & (outlying | (theta_k < base.fit.threshold))
    return found | {
        "supercritical": int(outlying.sum()),
        "beyond_top_k_threshold": int(leading.sum()),
        "predicted": predicted_rows(base, update, judged.tuned, recipe.epsilon),
    }


def _scales(
    base: BaseSpectrum | None,
    pair: Pair,
    judged: Judgement,
    recipe: Recipe,
    strongest: float,
    remember: Remember,
) -> dict[str, object]:
    """The critical scale that is expected or was measured, and the curve that it is a point of."""
    at_one = judged_point(1.0, (row.score for row in judged.directions), recipe.epsilon)
    seen, curve = [], []
    found = None if base is None else _expected_scale(base, pair, judged, recipe, strongest)
    if recipe.critical_scale:
        found, seen = measured_scale(pair, judged, recipe, found, remember)
    if base is not None and pair.spikes is not None and found is not None and found.aligned:
        curve = expected_curve(base, judged.base, pair.spikes, recipe)
    return {"critical_scale": found, "scale_curve": scale_curve(curve, [*seen, at_one])}


def _expected_scale(
    base: BaseSpectrum, pair: Pair, judged: Judgement, recipe: Recipe, strongest: float
) -> CriticalScale | None:
    """By how the update lies to the leading vectors of the base, else by its norm alone."""
    top_k = min(recipe.top_k, len(base.values))
    if pair.spikes is not None and len(judged.base[1]) >= top_k:
        expected = aligned_scale(
            base, judged.base, pair.spikes, top_k=top_k, epsilon=recipe.epsilon, sides=recipe.sides
        )
        return CriticalScale(expected=expected, aligned=True)
    expected = critical_scale(base, strongest, top_k=recipe.top_k)
    return None if expected is None else CriticalScale(expected=expected)


def _relative_update(pair: Pair) -> float | None:
    """``‖ΔW‖_F / ‖W0‖_F``; None of a base that is zero.

    Cost: one pass over a dense update, and one over the base.

    Args:
        pair: The tensors of both.

    Returns:
        The ratio.
    """
    base = frobenius(pair.base)
    if not base:
        return None
    if pair.low_rank is not None:
        update = pair.low_rank.norm_bound()
    else:
        update = math.hypot(*map(frobenius, update_rows(pair)))
    return min(update / base, sys.float_info.max)


def _not_finite(pair: Pair) -> str | None:
    """Where NaN or Inf stand, None if nowhere."""
    problems = [
        f"{name} holds {found}"
        for name, tensor in pair.tensors.items()
        if (found := what_is_not_finite(tensor)) is not None
    ]
    return "; ".join(problems) or None


def _rank_note(rank: int, recipe: Recipe) -> str | None:
    """What to say where fewer directions exist than were asked for."""
    if rank == recipe.top_k:
        return None
    return f"the tuned matrix has rank {rank}: {rank} of {recipe.top_k} directions exist"


def _row(
    comparison: Comparison,
    status: Literal["audited", "unchanged", "not_finite", "failed"],
    *,
    low_rank: bool = True,
    note: str | None = None,
    **fields: object,
) -> Matrix:
    """A row; ``low_rank`` is False where more than the factors was found to differ."""
    stored = comparison.factors
    factors = stored if low_rank or isinstance(stored, OfBase) else None
    return Matrix.model_validate(
        {
            "name": comparison.base.name,
            "tuned_name": comparison.tuned_name,
            "shape": comparison.base.shape,
            "transposed": comparison.transposed,
            "dtype": comparison.base.dtype,
            "update": factors.kind if factors else "dense",
            "rank": factors.rank if factors else None,
            "scale": factors.scale if factors else None,
            "status": status,
            "note": "; ".join(filter(None, (comparison.note, note))) or None,
            "read_only": comparison.read_only,
            **fields,
        }
    )
