"""The entry: validate, solve with a derivative attached, wrap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import as_whole
from bulkedge._guard import require_strided
from bulkedge._linmap import LinearMap, MatrixLike, as_map
from bulkedge._precision import full_precision

from ._implicit import Problem, gradient_by_rule, triplet
from ._result import SingularTriplets, Status, stated
from ._small_rule import small_triplet
from .adjoint import AdjointSolver, DeflatedCG
from .solver import Auto, Solver
from .solver._start import generic


def singular_triplet(
    A: MatrixLike,
    k: int = 1,
    *,
    solver: Solver | None = None,
    adjoint: AdjointSolver | None = None,
    init: tuple[Tensor, Tensor] | SingularTriplets | None = None,
    generator: torch.Generator | None = None,
    strict: bool = True,
) -> SingularTriplets:
    """The k leading singular triplets (σ, u, v) of A, differentiable, without a full SVD.

    Derivatives of every order, reverse and forward, reach A, or the tensors of a map: W0, B and A
    of W0 + s·B·A.  A loss of σ alone costs no further solve.  One of u and v costs one linear
    system ``[[σI, −A], [−Aᵀ, σI]] [p; q] = [φ; ψ]`` a triplet, in which the gap σ_k − σ_{k+1}
    decides; where the data do not determine the answer, a :class:`~bulkedge.DegenerateWarning`
    names the gap.

    The sign of (u_i, v_i) is arbitrary, so only a loss that does not change with it is defined.
    Among equal values inside the block the same holds for every rotation.

    Args:
        A: A dense tensor of shape ``(..., m, n)`` or a ``LinearMap``, real; float16 and bfloat16
            are taken in float32.  A sparse matrix is a ``LinearMap`` of your own
            (docs/triplets.md).  Small matrices of a batch, with up to 384 rows or
            columns, are decomposed together, others one after the other.
        k: How many triplets, ``1 ≤ k ≤ min(m, n)``.
        solver: The forward method; ``Auto()`` if None.
        adjoint: The backward method; ``DeflatedCG()`` if None.
        init: The result for a matrix nearby, or a guess (u, v) of shapes ``(..., m, j)`` and
            ``(..., n, j)``; j ≥ 1 columns, and vectors ``(m,)``, ``(n,)`` will do for one matrix.
            Never written to; no gradient goes there.  It is tilted a little (by eps^(3/16)): an
            exact lower triplet would satisfy every solver.
        generator: Source of the random start; None takes a fixed seed, so that equal input gives
            equal output.
        strict: Raise when the tolerance is not reached; False returns what there is, with its
            ``status``.

    Returns:
        The triplets, with residuals, gaps, steps and passes.

    Raises:
        InputError: If A is empty, not finite or not of a supported dtype, if k or init does not
            fit, or if σ₁ is beyond the numbers of the dtype.  If the ``rmatmat`` of a map is not
            the transpose of its ``matmat``, as far as the solver sees both.  From a derivative in
            reverse mode through u or v, if the rank of A is below k.
        ConvergenceError: If the tolerance is not reached and ``strict``.

    Example:
        >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)).requires_grad_()
        >>> top = singular_triplet(A)
        >>> round(top.sigma.item(), 12)
        3.0
        >>> (top.u[1, 0] * top.v[0, 0]).backward()  # du/dA: 1/gap shared by both sides of A
        >>> [round(x, 12) for x in A.grad[:, 0].tolist()]
        [0.0, 0.6, 0.0]
        >>> from bulkedge.triplet import Dense, LowRank
        >>> tuned = Dense(A) + LowRank(A[:, :1], A[:1], scale=2.0)  # W0 + s·B·A, not formed
        >>> round(singular_triplet(tuned).sigma.item(), 12)
        21.0
    """
    k = as_whole(k) or k
    init = (init.u, init.v) if isinstance(init, SingularTriplets) else init
    if init is None and solver is adjoint is generator is None and isinstance(A, Tensor):
        found = small_triplet(A, k, gradient_by_rule)
        if found is not None:
            return found
    options = {"solver": solver, "adjoint": adjoint, "generator": generator, "strict": strict}
    if isinstance(A, Tensor) and A.ndim > 2:
        require_strided("the matrices", A)
        return _batch(A, k, init, options)
    A = checked(as_map(A), k)
    check_methods(solver, adjoint, generator)
    start = None if init is None else _start(A, init)
    return solve_from(A, k, start, **options)


def solve_from(
    A: LinearMap,
    k: int,
    start: Tensor | None,
    *,
    solver: Solver | None = None,
    adjoint: AdjointSolver | None = None,
    generator: torch.Generator | None = None,
    strict: bool = True,
    spaces_only: bool = False,
) -> SingularTriplets:
    """The same for one map and a start on its shorter side, shape ``(min(m, n), j)``.

    With ``spaces_only``, σ is the matrix S and only what no change of basis alters has
    derivatives; see :class:`Problem`.

    Returns:
        The triplets.
    """
    problem = Problem(
        A.with_tensors(*(torch.empty_like(tensor, device="meta") for tensor in A.tensors)),
        k,
        solver or Auto(),
        adjoint or DeflatedCG(),
        generator,
        strict,
        spaces_only,
    )
    with full_precision(A.device):
        sigma, u, v, residuals, gaps, counts, theta, Z = triplet(problem, start, *A.tensors)
    steps, passes, status = _counts(counts)
    values = sigma.detach()
    residuals = stated(residuals, values.diagonal() if spaces_only else values)
    return SingularTriplets(sigma, u, v, residuals, gaps, steps, passes, status, near=(theta, Z))


def checked(A: LinearMap, k: int) -> LinearMap:
    """The map in float32 or float64; InputError where there is nothing to solve."""
    if A.dtype in (torch.float16, torch.bfloat16):
        A = A.with_tensors(*(tensor.float() for tensor in A.tensors))
    if A.dtype not in (torch.float32, torch.float64):
        raise InputError(f"expected a floating dtype of at most 64 bits, got {A.dtype}; convert it")
    if A.device.type == "meta":
        raise InputError("expected a map with entries, got one on the meta device; to_empty() it")
    if 0 in A.shape:
        raise InputError(f"expected a matrix with entries, got shape {A.shape}")
    whole = type(k) is int  # True is none
    if not whole or not 1 <= k <= min(A.shape):
        advice = "" if whole else "; k must be an integer"
        raise InputError(f"expected 1 ≤ k ≤ {min(A.shape)} for shape {A.shape}, got k={k}{advice}")
    return A


def check_methods(solver: object, adjoint: object, generator: object) -> None:
    """InputError for what is no method: a class instead of an object, a name, the wrong kind."""
    for name, given, does, example in (
        ("solver", solver, "compute", "BlockKrylov()"),
        ("adjoint", adjoint, "solve", "DeflatedCG()"),
    ):
        if given is not None and (isinstance(given, type) or not hasattr(given, does)):
            raise InputError(f"expected {name} to be an object such as {example}, got {given!r}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"expected generator to be a torch.Generator, got {generator!r}")


def _start(A: LinearMap, init: tuple[Tensor, Tensor]) -> Tensor:
    """The guess on the shorter side of A, shape ``(min(m, n), j)``, detached."""
    pair = isinstance(init, tuple | list) and len(init) == 2
    if not pair or not all(isinstance(x, Tensor) for x in init):
        raise InputError("expected init to be a pair (u, v) of tensors")
    u, v = (x.unsqueeze(-1) if x.ndim == 1 else x for x in init)
    for name, x, rows in (("u", u, A.shape[0]), ("v", v, A.shape[1])):
        if x.ndim != 2 or x.shape[0] != rows or x.shape[1] != u.shape[1] or x.shape[1] == 0:
            raise InputError(
                f"expected init=(u, v) of shapes ({A.shape[0]}, j) and ({A.shape[1]}, j) for a "
                f"matrix of shape {A.shape}, got {name} of shape {tuple(x.shape)}"
            )
        if (x.dtype, x.device) != (A.dtype, A.device):
            raise InputError(
                f"expected init in {A.dtype} on {A.device}, got {name} in {x.dtype} on "
                f"{x.device}; convert it"
            )
    guess = (v if A.shape[0] >= A.shape[1] else u).detach()
    tilt = torch.finfo(A.dtype).eps ** (3 / 16) * torch.linalg.vector_norm(guess, dim=0)
    return guess + tilt * generic(*guess.shape, like=guess)


def _counts(counts: Tensor) -> tuple[int, int, Status]:
    """Steps, passes and status; inside compiled or vmapped code they are not known yet."""
    if not torch.compiler.is_compiling():
        try:
            steps, passes, status = counts.tolist()
            return steps, passes, list(Status)[status]
        except RuntimeError:  # a batch, one level up
            pass
    return -1, -1, Status.DEFERRED


def _batch(
    A: Tensor, k: int, init: tuple[Tensor, Tensor] | None, options: dict[str, Any]
) -> SingularTriplets:
    """One matrix after the other, results stacked."""
    batch = A.shape[:-2]
    if 0 in A.shape:
        raise InputError(f"expected matrices with entries, got shape {tuple(A.shape)}")
    starts: list[tuple[Tensor, Tensor] | None] = [None] * batch.numel()
    if init is not None:
        try:
            flat = [x.expand(*batch, *x.shape[-2:]).flatten(0, -3) for x in init]
        except (RuntimeError, AttributeError, IndexError) as error:
            raise InputError(
                f"expected init=(u, v) of shapes (..., m, j) and (..., n, j) for a batch of shape "
                f"{tuple(A.shape)}: {error}"
            ) from error
        starts = list(zip(*flat, strict=True))
    results = [
        singular_triplet(matrix, k, init=start, **options)
        for matrix, start in zip(A.flatten(0, -3), starts, strict=True)
    ]

    def stacked(name: str) -> Tensor:
        one = torch.stack([getattr(result, name) for result in results])
        return one.unflatten(0, batch)

    return SingularTriplets(
        *(stacked(name) for name in ("sigma", "u", "v", "residuals", "gaps")),
        steps=max(result.steps for result in results),
        passes=sum(result.passes for result in results),
        status=max((result.status for result in results), key=list(Status).index),
    )
