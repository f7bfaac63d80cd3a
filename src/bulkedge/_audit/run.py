"""One matrix: read it, solve it, judge it.

The row of a matrix depends on its tensors and the recipe alone, not on the process, the order or
the number of workers that computed it.
"""

from __future__ import annotations

from typing import Literal

import torch

from bulkedge._errors import BulkedgeError
from bulkedge._linmap import LinearMap, LowRank
from bulkedge.intruder import Scores, base_vectors, scores, verdict
from bulkedge.triplet import (
    BlockKrylov,
    DenseSVD,
    SingularTriplets,
    Status,
    singular_triplet,
    thin_svd,
)
from bulkedge.update import BaseSpectrum, Factors, balanced

from .load import Pair, load
from .plan import Comparison
from .recipe import Recipe
from .record import Direction, Matrix
from .spikes import bulk_row, measure_base, predicted_rows

# The vectors of close singular values mix by rounding error over gap, and the scores with them.
# This path is the oracle: float64 (benchmarks/precision.py measures what float32 would cost).
DTYPE = torch.float64
TRIPLETS = BlockKrylov()
# the error of a singular value is quadratic in the residual: this gives ten digits of a norm
NORM = BlockKrylov(rtol=1e-6)


def audit_matrix(comparison: Comparison, recipe: Recipe) -> Matrix:
    """The row of one matrix.

    Cost: a full SVD of the base, O(mn·min(m, n)), and the passes of ``BlockKrylov`` over the tuned
    matrix.

    Args:
        comparison: What to compare.
        recipe: How.

    Returns:
        The row.  A matrix that cannot be audited says so in ``status`` and ``note``; the others
        go on.
    """
    try:
        return _audit(comparison, recipe)
    except (BulkedgeError, RuntimeError, MemoryError) as error:  # torch raises RuntimeError
        return _row(comparison, "failed", note=f"{type(error).__name__}: {error}")


def _audit(comparison: Comparison, recipe: Recipe) -> Matrix:
    """Load, look for the easy ends, else solve and judge."""
    pair = load(comparison, torch.device(recipe.device))
    if problem := _not_finite(pair):
        return _row(comparison, "not_finite", note=problem)
    norm_update = _update_norm(pair, recipe)
    if norm_update == 0:
        return _row(comparison, "unchanged")
    tuned = pair.tuned_map(DTYPE)
    triplets = _solve(tuned, min(recipe.top_k, *pair.base.shape), recipe, TRIPLETS)
    base = pair.base.to(DTYPE)
    low_rank = pair.replaced is None
    update = _balanced(pair.low_rank) if pair.low_rank else None
    del pair, tuned  # the SVD of the base is the peak of memory: let the rest go first
    U, S, V = thin_svd(base)
    directions = []
    for side in recipe.sides:
        vectors, Y = (U, triplets.u) if side == "left" else (V, triplets.v)
        known = base_vectors(vectors, S, comparison.base.shape)
        directions += _directions(side, triplets, scores(Y, known, 2 * recipe.top_k), recipe)
    spectrum, problem = measure_base(S, (base.shape[0], base.shape[1]))
    return _row(
        comparison,
        "audited",
        note="; ".join(filter(None, (_rank_note(triplets.rank, recipe), problem))) or None,
        spectral_norm_base=float(S[0]),
        spectral_norm_update=norm_update,
        intruders=sum(direction.score < recipe.epsilon for direction in directions),
        directions=directions,
        low_rank=low_rank,
        spikes=None if update is None else update.rank,
        **_theory(spectrum, update, triplets, recipe),
    )


def _balanced(update: LowRank) -> Factors:
    """The spikes of an update and their vectors."""
    return balanced(update.B, update.A, update.scale, update.shape)


def _theory(
    base: BaseSpectrum | None,
    update: Factors | None,
    tuned: SingularTriplets,
    recipe: Recipe,
) -> dict[str, object]:
    """Bulk and threshold of the base, and what a low-rank update was expected to do to it."""
    if base is None:
        return {}
    found = {"bulk": bulk_row(base), "threshold": base.fit.threshold}
    if update is None:
        return found
    return found | {
        "separated": int((update.gamma > base.fit.threshold).sum()),
        "predicted": predicted_rows(base, update, tuned, recipe.epsilon),
    }


def _not_finite(pair: Pair) -> str | None:
    """Where NaN or Inf stand, None if nowhere."""
    problems = [
        f"{name} holds {int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} Inf"
        for name, tensor in pair.tensors.items()
        if not bool(tensor.isfinite().all())
    ]
    return "; ".join(problems) or None


def _update_norm(pair: Pair, recipe: Recipe) -> float:
    """``‖W − W0‖₂``."""
    if pair.low_rank is not None:
        return float(pair.low_rank.singular_values()[0])
    update = pair.update_map(DTYPE)
    return 0.0 if update is None else float(_solve(update, 1, recipe, NORM).sigma[0])


def _solve(A: LinearMap, k: int, recipe: Recipe, solver: BlockKrylov) -> SingularTriplets:
    """The k leading triplets; a dense SVD where the iteration stops short."""
    generator = torch.Generator().manual_seed(recipe.seed)
    result = singular_triplet(A, k, solver=solver, generator=generator, strict=False)
    if result.status is Status.CONVERGED:
        return result
    return singular_triplet(A, k, solver=DenseSVD())


def _directions(
    side: Literal["left", "right"], triplets: SingularTriplets, result: Scores, recipe: Recipe
) -> list[Direction]:
    """The rows of one side; a direction with σ = 0 is an arbitrary vector and gets none."""
    errors = triplets.vector_errors.tolist()
    rows = []
    for i in range(triplets.rank):
        score, overlap = float(result.score[i]), float(result.subspace_overlap[i])
        rows.append(
            Direction(
                index=i,
                sigma=float(triplets.sigma[i]),
                side=side,
                score=score,
                matched_index=int(result.matched_index[i]),
                subspace_overlap=overlap,
                verdict=verdict(score, overlap, epsilon=recipe.epsilon, vector_error=errors[i]),
                residual=float(triplets.residuals[i] / triplets.sigma[0]),
            )
        )
    return rows


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
    factors = comparison.factors if low_rank else None
    return Matrix.model_validate(
        {
            "name": comparison.base.name,
            "tuned_name": comparison.tuned_name,
            "shape": comparison.base.shape,
            "transposed": comparison.transposed,
            "dtype": comparison.base.dtype,
            "update": "lora" if factors else "dense",
            "rank": factors.rank if factors else None,
            "scale": factors.scale if factors else None,
            "status": status,
            "note": "; ".join(filter(None, (comparison.note, note))) or None,
            **fields,
        }
    )
