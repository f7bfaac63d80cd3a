"""The top triplet and its gradient beside the alternatives, in one run.

    python benchmarks/triplet.py            # everything, a quarter of an hour
    python benchmarks/triplet.py gradient   # or one part: gradient, seeds, choose

`gradient` times forward and backward of u and v (float32, one thread) in turn with each peer, and
gives the median of the ratios; errors are relative, in the Frobenius norm, against float64.
`seeds` counts bad gradients over a thousand Gaussian matrices.  `choose` compares our own solvers.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import scipy.sparse.linalg
import torch
from common import store
from torch import Tensor

from bulkedge.triplet import (
    KKT,
    AugmentedLeastSquares,
    Auto,
    BlockKrylov,
    DeflatedCG,
    DenseSVD,
    ExplicitSVD,
    GradientAscent,
    Lanczos,
    Minres,
    Newton,
    Power,
    PushThrough,
    RayleighQuotient,
    Refined,
    Riemannian,
    Solver,
    singular_triplet,
)

SIZES = (256, 512, 1024, 2048, 4096)
REPEATS = {256: 9, 512: 7, 1024: 5, 2048: 3, 4096: 1}
DENSE_REFERENCE = 1024  # up to here float64 by LAPACK, beyond by our own solver in float64
AUGMENTED_LIMIT = 1024  # its matrix has 2n rows and columns
SEEDS = 1000


def rotated(sigma: Tensor, seed: int) -> Tensor:
    """A dense square matrix with these singular values: a few reflections on either side."""
    n, source = len(sigma), torch.Generator().manual_seed(seed)
    matrix = torch.diag(sigma.double())
    for side in (0, 1) * 2:
        w = torch.nn.functional.normalize(torch.randn(n, generator=source).double(), dim=0)
        matrix -= 2 * (torch.outer(w, w @ matrix) if side == 0 else torch.outer(matrix @ w, w))
    return matrix.float()


def gaussian(n: int, seed: int) -> Tensor:
    """Pure noise: the leading values crowd at the edge of the bulk."""
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed))


def decaying(n: int, seed: int) -> Tensor:
    """σ_i = 1/i."""
    return rotated(1 / torch.arange(1, n + 1), seed)


def spiked(n: int, seed: int) -> Tensor:
    """Noise with a spike at twice its edge: what a fine-tuned layer looks like."""
    source = torch.Generator().manual_seed(seed + 1)
    u, v = (torch.nn.functional.normalize(torch.randn(n, generator=source), dim=0) for _ in "uv")
    return gaussian(n, seed) + 4 * n**0.5 * torch.outer(u, v)


def nearly_degenerate(n: int, seed: int) -> Tensor:
    """σ₂ = 0.999 σ₁, the others spread below 0.9."""
    return rotated(torch.cat([torch.tensor([1.0, 0.999]), torch.linspace(0.9, 0, n - 2)]), seed)


SPECTRA: dict[str, Callable[[int, int], Tensor]] = {
    "gaussian": gaussian,
    "decaying": decaying,
    "spiked": spiked,
    "nearly degenerate": nearly_degenerate,
}


def through_triplet(A: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Ours."""
    found = singular_triplet(A, **options)
    return found.u[:, 0], found.v[:, 0]


def through_svd(A: Tensor) -> tuple[Tensor, Tensor]:
    """The full SVD and its derivative by autograd."""
    U, _, Vt = torch.linalg.svd(A, full_matrices=False)
    return U[:, 0], Vt[0]


def through_svd_lowrank(A: Tensor) -> tuple[Tensor, Tensor]:
    """The randomised SVD of torch with its defaults, differentiated through its steps."""
    U, _, V = torch.svd_lowrank(A)
    return U[:, 0], V[:, 0]


def through_seed(A: Tensor) -> tuple[Tensor, Tensor]:
    """The recipe of Scholz's note of 2023: power iteration, then dense least squares."""
    return through_triplet(
        A,
        solver=Power(oversample=0, rtol=1e-6, max_steps=100_000),
        adjoint=AugmentedLeastSquares(),
        strict=False,
    )


def gradient(method: Callable[..., tuple[Tensor, Tensor]], A: Tensor, **options: Any) -> Tensor:
    """That of ⟨φ, u⟩ + ⟨ψ, v⟩ for fixed φ and ψ, with the sign of u taken out."""
    source = torch.Generator().manual_seed(99)
    phi, psi = (torch.randn(n, generator=source).to(A) for n in A.shape)
    A = A.detach().requires_grad_()
    u, v = method(A, **options)
    sign = torch.sign(u.detach() @ phi)
    (sign * (u @ phi + v @ psi)).backward()
    return A.grad


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def error(found: Tensor, reference: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found.double() - reference).norm() / reference.norm())


def reference(A: Tensor) -> Tensor:
    """The gradient in float64."""
    dense = A.shape[0] <= DENSE_REFERENCE
    return gradient(through_svd if dense else through_triplet, A.double())


def gradients() -> list[dict[str, Any]]:
    """A row for each size and spectrum."""
    rows = []
    for n in SIZES:
        for name, make in SPECTRA.items():
            A = make(n, 0)
            truth = reference(A)
            peers = {"svd": through_svd, "svd_lowrank": through_svd_lowrank}
            if n <= AUGMENTED_LIMIT:
                peers["seed"] = through_seed
            found = singular_triplet(A)
            row = {
                "n": n,
                "spectrum": name,
                "relative_gap": float(found.gaps / found.sigma),
                "passes": found.passes,
            }
            methods = {"ours": through_triplet, **peers}
            times: dict[str, list[float]] = {method: [] for method in methods}
            for _ in range(REPEATS[n]):
                for method, through in methods.items():
                    started = time.perf_counter()
                    result = gradient(through, A)
                    times[method].append(time.perf_counter() - started)
                    row[f"{method}_error"] = error(result, truth)
            row["ms"] = 1e3 * statistics.median(times["ours"])
            for peer in peers:
                ratios = [p / o for p, o in zip(times[peer], times["ours"], strict=True)]
                row[f"{peer}_ratio"] = statistics.median(ratios)
            row |= forward_only(A, REPEATS[n])
            rows.append(row)
            print(row, flush=True)
    return rows


def forward_only(A: Tensor, repeats: int) -> dict[str, float]:
    """SciPy's svds, which has no gradient: time of (σ, u, v) over ours, and the angle of u."""
    array, wide = A.numpy(), A.double()
    u = singular_triplet(wide).u[:, 0]
    figures = {"u_error": sine(singular_triplet(A).u[:, 0], u)}
    for solver in ("arpack", "propack"):

        def peer(solver: str = solver) -> Any:
            start = numpy.random.default_rng(0).standard_normal(A.shape[0]).astype("float32")
            return scipy.sparse.linalg.svds(array, k=1, solver=solver, v0=start, maxiter=20_000)

        ratios = [seconds(peer) / seconds(lambda: singular_triplet(A)) for _ in range(repeats)]
        figures[f"{solver}_ratio"] = statistics.median(ratios)
        figures[f"{solver}_u_error"] = sine(torch.from_numpy(peer()[0][:, 0].copy()), u)
    return figures


def sine(a: Tensor, b: Tensor) -> float:
    """Sine of the angle between two unit vectors, exact for small ones."""
    a = a.double() / a.double().norm()
    return float((a - b * (a @ b)).norm())


def bad_gradients() -> dict[str, Any]:
    """Gaussian 256×256, float32, a thousand seeds: errors above 1e-3, ours and a default lstsq."""
    errors, warned, lstsq = [], 0, []
    for seed in range(SEEDS):
        A = gaussian(256, seed)
        truth = gradient(through_triplet, A.double())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            errors.append(error(gradient(through_triplet, A), truth))
        warned += bool(caught)
        if seed < SEEDS // 10:
            lstsq.append(error(by_default_lstsq(A), truth))
        if seed < 20:
            errors[-1] = max(errors[-1], error(gradient(through_svd, A.double()), truth))
    return {
        "seeds": SEEDS,
        "bad": sum(e > 1e-3 for e in errors),
        "warned": warned,
        "error_largest": max(errors),
        "error_median": statistics.median(errors),
        "default_lstsq_seeds": len(lstsq),
        "default_lstsq_bad": sum(not e <= 1e-3 for e in lstsq),
        "default_lstsq_error_largest": max(lstsq),
    }


def by_default_lstsq(A: Tensor) -> Tensor:
    """The gradient with the seeds' augmented system and torch's default driver of lstsq."""
    source = torch.Generator().manual_seed(99)
    (m, n) = A.shape
    phi, psi = (torch.randn(n, generator=source) for n in A.shape)
    found = singular_triplet(A)
    sigma, u, v = found.sigma[0], found.u[:, 0], found.v[:, 0]
    sign = torch.sign(u @ phi)
    K = torch.cat(
        [
            torch.cat([sigma * torch.eye(m), -A, u[:, None], torch.zeros(m, 1)], dim=1),
            torch.cat([-A.mT, sigma * torch.eye(n), torch.zeros(n, 1), v[:, None]], dim=1),
        ]
    )
    x = torch.linalg.lstsq(K, sign * torch.cat([phi, psi])[:, None]).solution[:, 0]
    p, q = x[:m], x[m : m + n]
    return torch.outer(p - u * (u @ p), v) + torch.outer(u, q - v * (v @ q))


SOLVERS: dict[str, Solver] = {
    "Auto": Auto(),
    "Lanczos": Lanczos(),
    "Refined(Lanczos)": Refined(Lanczos()),
    "BlockKrylov": BlockKrylov(),
    "Power": Power(),
    "Riemannian": Riemannian(),
    "RayleighQuotient": RayleighQuotient(),
    "Newton": Newton(),
    "GradientAscent": GradientAscent(),
    "DenseSVD": DenseSVD(),
}
ADJOINTS = {
    "DeflatedCG": DeflatedCG(),
    "Minres": Minres(),
    "PushThrough": PushThrough(),
    "ExplicitSVD": ExplicitSVD(),
    "KKT": KKT(),
    "AugmentedLeastSquares": AugmentedLeastSquares(),
}


def choose() -> dict[str, Any]:
    """Our own methods side by side at n = 512, and where dense ones stop paying."""
    n, forward, backward, crossover = 512, [], [], []
    for name, make in SPECTRA.items():
        A = make(n, 0)
        for k in (1, 10):
            for solver, method in SOLVERS.items():
                if solver == "GradientAscent" and k > 1:
                    continue  # minutes
                found = singular_triplet(A, k, solver=method, strict=False)
                spent = [
                    seconds(
                        lambda m=method, k=k, A=A: singular_triplet(A, k, solver=m, strict=False)
                    )
                    for _ in range(3)
                ]
                forward.append(
                    {
                        "spectrum": name,
                        "k": k,
                        "solver": solver,
                        "passes": found.passes,
                        "ms": 1e3 * statistics.median(spent),
                        "status": found.status.name,
                    }
                )
        truth = reference(A)
        for adjoint, method in ADJOINTS.items():
            options = {"solver": Refined(Lanczos()), "adjoint": method}
            whole = [
                seconds(lambda A=A, o=options: gradient(through_triplet, A, **o)) for _ in "ab"
            ]
            solve = [
                seconds(lambda A=A: singular_triplet(A, solver=Refined(Lanczos()))) for _ in "ab"
            ]
            backward.append(
                {
                    "spectrum": name,
                    "adjoint": adjoint,
                    "ms": 1e3 * max(0.0, min(whole) - min(solve)),
                    "error": error(gradient(through_triplet, A, **options), truth),
                }
            )
    for size in (32, 64, 96, 128, 192, 256, 384):
        A = gaussian(size, 0)
        ratios = [
            seconds(lambda A=A: singular_triplet(A, solver=DenseSVD()))
            / seconds(lambda A=A: singular_triplet(A, solver=Refined(Lanczos())))
            for _ in range(15)
        ]
        crossover.append({"n": size, "dense_over_lanczos": statistics.median(ratios)})
    return {"n": n, "forward": forward, "backward": backward, "crossover": crossover}


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or ["gradient", "seeds", "choose"]
    if "choose" in wanted:
        store("choose", choose())
    if "seeds" in wanted:
        store("bad_gradients", bad_gradients())
    if "gradient" in wanted:
        store("triplet", {"rows": gradients()})
