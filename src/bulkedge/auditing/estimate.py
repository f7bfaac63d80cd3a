"""What an audit will need, from the shapes of its matrices: memory of a job, time of a core.

The constants are those of one machine, as ``benchmarks/dry_run.py`` measures them.  Another machine
is compared with it by a product and an eigenproblem, which take some milliseconds.
"""

from __future__ import annotations

import time

import torch

from bulkedge._precision import one_thread
from bulkedge.comparison import Comparison, Plan
from bulkedge.intruder import svd_is_cheap
from bulkedge.records import Recipe

PROCESS_BYTES = 330e6
"""What a job takes before it reads a matrix: most of it is torch."""
BASIS_VECTORS = 500
"""A certificate keeps at most this many basis vectors on either side, copies included."""
SCALES = 6
"""A matrix takes about this many times as long where its critical scale is measured."""
PASSES, BLOCK = 40, 18
"""A certificate takes about so many products, with so many vectors each."""
EIGEN_WORK = 5.4
"""Two eigenproblems in float64 cost this many times the cube of their side."""
CERTIFIED_SECONDS, DENSE_SECONDS = 0.09, 0.036
"""What a matrix takes besides: small algebra, most of it the time of Python."""
FLOP_A_SECOND = 4.2e10
"""Operations of one core."""
REFERENCE_SECONDS = 0.0103
"""What :func:`reference_seconds` is on that machine."""


def peak_bytes(plan: Plan, recipe: Recipe) -> float:
    """Memory of a job: torch, the largest comparison's tensors, and what is computed from them.

    Args:
        plan: What would be compared.
        recipe: How.

    Returns:
        Bytes.
    """
    peak = 0.0
    for comparison in plan.comparisons:
        stored = sum(matrix.nbytes for matrix in comparison.matrices)
        long, short = max(comparison.base.shape), min(comparison.base.shape)
        if _is_decomposed(comparison, recipe):
            computed = 8 * (4 * long * short + 5 * short**2)
        else:  # the bases of the process, and Gram matrices of the short side
            grams = 2 if long > short else 1
            computed = 4 * (BASIS_VECTORS * (long + short) + grams * short**2)
        moment = 0 if isinstance(comparison.inputs, str | None) else comparison.inputs.nbytes
        peak = max(peak, stored + computed + 5 * moment)  # stored, in float64, and checked
    return PROCESS_BYTES + peak


def core_seconds(plan: Plan, recipe: Recipe) -> float:
    """Time of one core of this machine, beyond the start of the program.

    Args:
        plan: What would be compared.
        recipe: How.

    Returns:
        Seconds, of matrices whose verdicts products decide where an SVD would cost more.
    """
    slower = reference_seconds() / REFERENCE_SECONDS
    return slower * sum(_core_seconds(comparison, recipe) for comparison in plan.comparisons)


def reference_seconds() -> float:
    """What a product of a matrix with a block, and an eigenproblem, take on this machine."""
    W = torch.ones(2048, 2048).tril_()
    best = float("inf")
    with one_thread():
        for _ in range(3):  # the first is slower
            begun = time.process_time()
            for _ in range(2):
                torch.mm(W, W[:, :BLOCK])
            torch.linalg.eigh(W[:256, :256].double())
            best = min(best, time.process_time() - begun)
    return best


def _is_decomposed(comparison: Comparison, recipe: Recipe) -> bool:
    """Whether decompositions decide on a matrix at once."""
    return recipe.method == "dense" or svd_is_cheap(comparison.base.shape, recipe.top_k)


def _core_seconds(comparison: Comparison, recipe: Recipe) -> float:
    """About how long one core takes for a matrix."""
    long, short = max(comparison.base.shape), min(comparison.base.shape)
    if _is_decomposed(comparison, recipe):
        # two Gram matrices and two eigenproblems, in float64
        seconds, flop = DENSE_SECONDS, 2 * long * short**2 + EIGEN_WORK * short**3
    else:
        seconds, flop = CERTIFIED_SECONDS, PASSES * 2 * BLOCK * long * short
        if long > short:  # of one side a Gram matrix, too
            flop += long * short**2 / len(recipe.sides)
    times = SCALES if recipe.critical_scale else 1
    if not isinstance(comparison.inputs, str | None):
        rows = comparison.base.acts_as[0] if comparison.factors is None else 20
        flop += 2 * rows * comparison.inputs.nbytes / 4 / times
    return times * (seconds + flop / FLOP_A_SECOND)
