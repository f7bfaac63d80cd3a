"""Every function in every nesting of transforms and compilation, against dense LAPACK in float64.

``outcome`` runs one cell of the table in docs/derivatives.md and says what came of it.  Only
``RIGHT``, ``REFUSED`` (an error of this package) and ``TORCH`` (torch refuses the same nesting of
its own ``torch.linalg.svdvals``) are allowed; a wrong number or a foreign error raises.

python tests/derivatives.py [MODE ...]  # run the modes, all by default, and write the page
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from bulkedge import BulkedgeError
from bulkedge.spectral import Convolution, cap, normalize, project_spectral_ball, spectral_norm
from bulkedge.triplet import Dense, LowRank, singular_triplet, truncate
from cases import gaussian, with_spectrum

RIGHT, REFUSED, TORCH, NONE = "right", "error", "torch", "–"
PAGE = Path(__file__).parents[1] / "docs/derivatives.md"
MARK = "<!-- written by tests/derivatives.py -->\n"

Function = Callable[[Tensor], Tensor]

SIGMA = torch.tensor([3.0, 2.0, 1.2, 0.5])
A = with_spectrum(5, 4, SIGMA, seed=5)
T = gaussian(5, 4)
BATCH = torch.stack([A, A.flip(0) + 0.1, 1.1 * A.flip(1)])
K = 2


def _svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = torch.linalg.svd(A, full_matrices=False)
    return S[:K], U[:, :K], Vt[:K].mT


def _truncated(A: Tensor) -> Tensor:
    S, u, v = _svd(A)
    return (u * S) @ v.mT


def _pairs(u: Tensor, v: Tensor) -> Tensor:
    """What the signs of the vectors leave alone."""
    return u[:, None] * v[None]


def _convolution(A: Tensor) -> Convolution:
    return Convolution(A.reshape(2, 2, 5), (6,), padding=2)


def _norm(A: Tensor) -> Tensor:
    return torch.linalg.svdvals(A)[0]


def _clip(A: Tensor) -> Tensor:
    U, S, Vt = torch.linalg.svd(A.detach(), full_matrices=False)
    return (U * S.clamp_max(1.0)) @ Vt


def _kernel_norm(A: Tensor) -> Tensor:
    """The convolution written out by torch, tap by tap."""
    inputs = torch.eye(12, dtype=A.dtype).reshape(12, 2, 6)
    outputs = torch.nn.functional.conv1d(inputs, A.reshape(2, 2, 5), padding=2)
    return torch.linalg.svdvals(outputs.reshape(12, -1))[0]


# the function, and the same by a full SVD
FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "spectral_norm": (spectral_norm, _norm),
    "singular_triplet σ": (lambda A: singular_triplet(A, K).sigma, lambda A: _svd(A)[0]),
    "singular_triplet u and v": (
        lambda A: _pairs(*tuple(singular_triplet(A, K))[1:]),
        lambda A: _pairs(*_svd(A)[1:]),
    ),
    "normalize": (normalize, lambda A: A / _norm(A)),
    "cap": (cap, lambda A: A / _norm(A).clamp_min(1.0)),
    "truncate": (lambda A: truncate(A, K), _truncated),
    "norm of W0 + BA": (
        lambda A: spectral_norm(Dense(A) + LowRank(A[:, :2], A[:2], 0.3)),
        lambda A: _norm(A + 0.3 * A[:, :2] @ A[:2]),
    ),
    "norm of a convolution": (lambda A: spectral_norm(_convolution(A)), _kernel_norm),
    "project_spectral_ball": (project_spectral_ball, _clip),
}


def _weighted(function: Function) -> Function:
    """Two numbers in which no two entries of the result weigh the same."""

    def value(A: Tensor) -> Tensor:
        flat = function(A).flatten()
        weights = torch.arange(1, 2 * len(flat) + 1, dtype=A.dtype, device=A.device).sin()
        return weights.reshape(2, -1) @ flat

    return value


def _total(function: Function) -> Function:
    return lambda A: function(A)[0]


def _backward(f: Function, A: Tensor, _: Tensor) -> Tensor:
    A = A.detach().clone().requires_grad_()
    return torch.autograd.grad(_total(f)(A), A)[0]


def _double_backward(f: Function, A: Tensor, T: Tensor) -> Tensor:
    A = A.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_total(f)(A), A, create_graph=True)
    return torch.autograd.grad((gradient * T).sum(), A)[0]


def _dual(f: Function, A: Tensor, T: Tensor) -> Tensor:
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(_total(f)(forward_ad.make_dual(A, T)))
        return torch.zeros_like(value) if tangent is None else tangent


def _linearize(f: Function, A: Tensor, T: Tensor) -> Tensor:
    return func.linearize(_total(f), A)[1](T)


def _traced(f: Function, A: Tensor, T: Tensor) -> Tensor:
    return make_fx(f)(A + T)(A)


def _traced_grad(f: Function, A: Tensor, T: Tensor) -> Tensor:
    return make_fx(func.grad(_total(f)))(A + T)(A)


def _fake(f: Function, A: Tensor, _: Tensor) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(A)
        value, gradient = f(fake), func.grad(_total(f))(fake)
    return torch.tensor([*value.shape, *gradient.shape])


def _meta(f: Function, A: Tensor, _: Tensor) -> Tensor:
    A = A.to("meta")
    return torch.tensor([*f(A).shape, *func.grad(_total(f))(A).shape])


Transform = Callable[[Function, Tensor, Tensor], Tensor]

TRANSFORMS: dict[str, Transform] = {
    "none": lambda f, A, T: f(A),
    "backward": _backward,
    "double backward": _double_backward,
    "dual numbers": _dual,
    "grad": lambda f, A, T: func.grad(_total(f))(A),
    "vjp": lambda f, A, T: func.vjp(_total(f), A)[1](A.new_ones(()))[0],
    "jvp": lambda f, A, T: func.jvp(_total(f), (A,), (T,))[1],
    "jacrev": lambda f, A, T: func.jacrev(f)(A),
    "jacfwd": lambda f, A, T: func.jacfwd(f)(A),
    "hessian": lambda f, A, T: func.hessian(_total(f))(A),
    "vmap": lambda f, A, T: func.vmap(f)(BATCH),
    "vmap(grad)": lambda f, A, T: func.vmap(func.grad(_total(f)))(BATCH),
    "vmap(jvp)": lambda f, A, T: func.vmap(lambda T: func.jvp(_total(f), (A,), (T,))[1])(BATCH),
    "linearize": _linearize,
    "make_fx": _traced,
    "make_fx(grad)": _traced_grad,
    "FakeTensor": _fake,
    "meta": _meta,
}

BACKENDS = ("eager", "aot_eager", "inductor")
PLAIN = "not compiled"
MODES = (
    PLAIN,
    *(f"compile(transform), {backend}" for backend in BACKENDS),
    "compile(transform), one graph",
    *(f"transform(compile), {backend}" for backend in BACKENDS),
)
VALUES = ("none", "vmap", "make_fx")  # no derivative in them
# compiled, they are what spectral_norm and the norm of W0 + BA are
ALIKE = ("singular_triplet σ", "norm of a convolution")
# a map breaks the graph, and the eager backend then compiles the solver in hundreds of pieces
MINUTES = ("hessian", "vmap", "vmap(grad)", "vmap(jvp)")
# what inductor, slow, is tried with: it takes over where aot_eager ends
SAMPLE = ("spectral_norm", "singular_triplet u and v")
SAMPLED = ("none", "backward", "dual numbers", "grad", "jvp")
UNCOMPILED = ("linearize", "make_fx", "make_fx(grad)", "FakeTensor", "meta")  # tracers themselves


def cells() -> Iterator[tuple[str, str, str]]:
    """Every (transform, mode, function) that is run."""
    for transform in TRANSFORMS:
        for mode in MODES[:1] if transform in UNCOMPILED else MODES:
            for name in FUNCTIONS:
                if name == "project_spectral_ball" and transform not in VALUES:
                    continue  # it has no gradient
                if mode != PLAIN and name in ALIKE:
                    continue
                if mode.endswith(", eager") and "W0" in name and transform in MINUTES:
                    continue
                if "inductor" not in mode or (name in SAMPLE and transform in SAMPLED):
                    yield transform, mode, name


def _compiled(mode: str) -> Callable[..., Callable[..., Tensor]]:
    backend = mode.partition(", ")[2]
    if backend == "one graph":
        return functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    return functools.partial(torch.compile, backend=backend)


def run(transform: str, mode: str, function: Function) -> Tensor:
    """The transform of the function, compiled as the mode says."""
    f, apply = _weighted(function), TRANSFORMS[transform]
    if mode == PLAIN:
        return apply(f, A, T)
    torch._dynamo.reset()  # type: ignore[attr-defined]
    if mode.startswith("transform"):
        return apply(_compiled(mode)(f), A, T)
    return _compiled(mode)(lambda A, T: apply(f, A, T))(A, T)


@functools.cache
def expected(transform: str, name: str) -> Tensor:
    """From the dense oracle, uncompiled, and in reverse mode alone."""
    f = _weighted(FUNCTIONS[name][1])
    gradient = func.grad(_total(f))
    if transform in ("dual numbers", "jvp", "linearize"):
        return (gradient(A) * T).sum()
    if transform == "vmap(jvp)":
        return torch.stack([(gradient(A) * x).sum() for x in BATCH])
    if transform in ("jacrev", "jacfwd"):
        return torch.stack([func.grad(lambda A, i=i: f(A)[i])(A) for i in range(2)])
    if transform == "hessian":
        return func.jacrev(gradient)(A)
    if transform == "double backward":
        return func.grad(lambda A: (gradient(A) * T).sum())(A)
    if transform == "vmap":
        return torch.stack([f(x) for x in BATCH])
    if transform == "vmap(grad)":
        return torch.stack([gradient(x) for x in BATCH])
    if transform in ("FakeTensor", "meta"):
        return torch.tensor([2, *A.shape])
    return f(A) if transform in ("none", "make_fx") else gradient(A)


def outcome(transform: str, mode: str, name: str) -> str:
    """What came of it: one of the three that are allowed, else it raises."""
    ours, _ = FUNCTIONS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        try:
            found = run(transform, mode, ours)
        except BulkedgeError:
            return REFUSED
        except Exception as error:
            if "\n  Explanation" in str(error) and "bulkedge: " in str(error):
                return REFUSED  # the compiler, asked for one graph, with the reason that we give
            if torch_refuses(transform, mode, type(error), broken="W0" in name):
                return TORCH
            raise
    torch.testing.assert_close(found, expected(transform, name), rtol=1e-8, atol=1e-8)
    return RIGHT


_uncompiled_norm = torch.compiler.disable(_norm)


def _inner(A: Tensor) -> Tensor:
    return 1 * _uncompiled_norm(A)


def _broken_norm(A: Tensor) -> Tensor:
    """A graph that breaks two calls down, as at the map of a norm."""
    return _inner(1 * A)


@functools.cache
def torch_refuses(transform: str, mode: str, kind: type[Exception], *, broken: bool) -> bool:
    """Whether torch's own SVD ends in the same kind of error, or one that breaks the graph does."""
    broken = broken and not mode.endswith("one graph")
    for function in (_norm, _broken_norm)[: 1 + broken]:
        try:
            run(transform, mode, function)
        except kind:
            return True
        except Exception:  # noqa: S112 — of another kind
            continue
    return False


Results = dict[tuple[str, str, str], str]


def render(results: Results) -> str:
    """The tables of the page, functions of one and the same table together."""
    tables: dict[str, list[str]] = {}
    for name in FUNCTIONS:
        rows = [f"| | {' | '.join(MODES)} |", "|---|" + "---|" * len(MODES)]
        for transform in TRANSFORMS:
            told = [results.get((transform, mode, name), NONE) for mode in MODES]
            rows.append(f"| {transform} | {' | '.join(told)} |")
        tables.setdefault("\n".join(rows), []).append(name)
    return "\n".join(f"### {', '.join(names)}\n\n{table}\n" for table, names in tables.items())


def stored() -> Results:
    """What the page says."""
    results: Results = {}
    names: list[str] = []
    for line in PAGE.read_text(encoding="utf-8").partition(MARK)[2].splitlines():
        if line.startswith("### "):
            names = line[4:].split(", ")
        transform, *told = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if transform in TRANSFORMS:
            for name in names:
                results |= {(transform, m, name): r for m, r in zip(MODES, told, strict=True)}
    return {cell: result for cell, result in results.items() if result != NONE}


def write(results: Results) -> None:
    """Put the results on the page, in place of those that it has of the same cells."""
    known = {cell: r for cell, r in (stored() | results).items() if cell in set(cells())}
    prose = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(f"{prose}{MARK}\n{render(known)}", encoding="utf-8")


if __name__ == "__main__":
    chosen = sys.argv[1:] or MODES
    write({cell: outcome(*cell) for cell in cells() if cell[1] in chosen})
