"""docs/errata.md, entry by entry: the printed formula fails, the corrected one holds.

The oracles know nothing of the formulas: fourth-order central differences through LAPACK's SVD,
autograd through dense torch functions, and sums over an explicit SVD.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cases import gaussian, generator, with_spectrum
from helpers import some

SHAPES = [(5, 7), (7, 5), (6, 6)]
SPECTRUM = torch.tensor([2.0, 1.3, 0.9, 0.6, 0.4, 0.2], dtype=torch.float64)
TIGHT = 1e-12  # algebra and autograd
DIFFERENCED = 1e-9  # central differences
XI = 0.7

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
top_and_interior = pytest.mark.parametrize("k", [0, 2], ids=["top", "interior"])


class Triplet(NamedTuple):
    sigma: Tensor
    u: Tensor
    v: Tensor


def matrix(shape: tuple[int, int]) -> Tensor:
    return with_spectrum(*shape, SPECTRUM)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def block(*rows: list[Tensor]) -> Tensor:
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def direction(shape: tuple[int, int]) -> Tensor:
    """Of a change of A."""
    return unit(random(*shape, seed=27))


def cotangents(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return random(shape[0], seed=11), random(shape[1], seed=111)


def triplet(A: Tensor, k: int = 0, like: Tensor | None = None) -> Triplet:
    """The k-th triplet by LAPACK, with the sign of u that of `like`."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    sign = 1.0 if like is None else torch.vdot(like, U[:, k]).detach().real.sign()
    return Triplet(S[k], sign * U[:, k], sign * Vh[k].conj())


def central_difference(function, x: Tensor, h: float = 1e-3) -> Tensor:
    """∂function/∂x, shape function(x).shape + x.shape, error O(h⁴)."""
    columns = []
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=x.dtype)
        step[i] = h
        step = step.view_as(x)
        near = function(x + step) - function(x - step)
        far = function(x + 2 * step) - function(x - 2 * step)
        columns.append((8 * near - far) / (12 * h))
    return torch.stack(columns, dim=-1).reshape(columns[0].shape + x.shape)


def along(function, h: float = 1e-3) -> Tensor:
    """d function(t)/dt at t = 0."""
    return central_difference(function, scalar(0.0), h)


def error(got: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((got - expected).norm() / expected.norm())


def away(x: Tensor, d: Tensor) -> Tensor:
    """x without its component along the unit vector d."""
    return x - d * (d @ x)


def loss(A: Tensor, xi: float, phi: Tensor, psi: Tensor, k: int, like: Tensor) -> Tensor:
    sigma, u, v = triplet(A, k, like)
    return xi * sigma + phi @ u + psi @ v


def true_vjp(A: Tensor, xi: float, phi: Tensor, psi: Tensor, k: int = 0) -> Tensor:
    """Oracle: autograd through the dense SVD."""
    A = A.detach().clone().requires_grad_()
    like = triplet(A.detach(), k).u
    return torch.autograd.grad(loss(A, xi, phi, psi, k, like), A)[0]


def saddle(A: Tensor, sigma: Tensor | float) -> Tensor:
    """The documents' K."""
    m, n = A.shape
    return block(
        [sigma * torch.eye(m, dtype=A.dtype), -A],
        [-A.mH, sigma * torch.eye(n, dtype=A.dtype)],
    )


def saddle_pinv(A: Tensor, sigma: Tensor | float) -> Tensor:
    return torch.linalg.pinv(saddle(A, sigma), hermitian=True, rtol=1e-10)


def shifted(A: Tensor, sigma: Tensor | float) -> Tensor:
    """σ² − AAᵀ."""
    return sigma**2 * eye(A.shape[0]) - A @ A.mT


def schur_pinv(A: Tensor, sigma: Tensor | float) -> Tensor:
    """(σ² − AAᵀ)⁺."""
    return torch.linalg.pinv(shifted(A, sigma), hermitian=True, rtol=1e-10)


def constrained_solve(A: Tensor, t: Triplet, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """K[p; q] = [P_u a; P_v b] with p ⊥ u, q ⊥ v, by the deflated K."""
    sigma, u, v = t
    w = torch.cat([u, v])
    rhs = torch.cat([away(a, u), away(b, v)])
    pq = torch.linalg.solve(saddle(A, sigma) + sigma * torch.outer(w, w), rhs)
    return pq[: len(u)], pq[len(u) :]


def assemble(t: Triplet, xi: float | Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The corrected VJP from a solution."""
    return xi * torch.outer(t.u, t.v) + torch.outer(p, t.v) + torch.outer(t.u, q)


def assemble_projected(t: Triplet, xi: float, p: Tensor, q: Tensor) -> Tensor:
    return assemble(t, xi, away(p, t.u), away(q, t.v))


def vjp(A: Tensor, t: Triplet, xi: float | Tensor, phi: Tensor, psi: Tensor) -> Tensor:
    return assemble(t, xi, *constrained_solve(A, t, phi, psi))


def parts(x: Tensor, m: int) -> Triplet:
    """Of a state."""
    return Triplet(x[0], x[1 : m + 1], x[m + 1 :])


def state(t: Triplet) -> Tensor:
    return torch.cat([t.sigma.reshape(1), t.u, t.v])


def residual_map(A: Tensor, x: Tensor) -> Tensor:
    """The documents' f at the state x = (σ, u, v)."""
    sigma, u, v = parts(x, A.shape[0])
    first = (sigma - u @ A @ v).reshape(1)
    return torch.cat([first, sigma**2 * u - sigma * A @ v, sigma**2 * v - sigma * A.mT @ u])


def printed_jacobian(A: Tensor, x: Tensor) -> Tensor:
    """The state block that both documents print, as H_f and again inside J_f."""
    m, n = A.shape
    sigma, u, v = parts(x, m)
    first = torch.cat([scalar(1.0)[None], 2 * sigma * u - A @ v, 2 * sigma * v - A.mT @ u])
    return block(
        [first[None]],
        [-(A @ v)[:, None], sigma**2 * eye(m), -sigma * A],
        [-(A.mT @ u)[:, None], -sigma * A.mT, sigma**2 * eye(n)],
    )


def near(t: Triplet, distance: float) -> Tensor:
    x = state(t)
    return x + distance * unit(random(len(x), seed=21))


def generic_state(shape: tuple[int, int]) -> Tensor:
    """Unit vectors that are no singular vectors, a σ that is no singular value."""
    m, n = shape
    u, v = unit(random(m, seed=22)), unit(random(n, seed=23))
    return torch.cat([scalar(1.1)[None], u, v])


def squared_error(A: Tensor, x: Tensor) -> Tensor:
    sigma, u, v = parts(x, A.shape[0])
    return (A - sigma * torch.outer(u, v)).square().sum() / 2


def as_sorted(eigenvalues: Tensor) -> Tensor:
    """Complex numbers in an order that rounding does not change."""
    return torch.tensor(
        sorted(eigenvalues.tolist(), key=lambda z: (round(z.real, 6), round(z.imag, 6))),
        dtype=torch.complex128,
    )


def projected_cotangents(t: Triplet) -> tuple[Tensor, Tensor]:
    phi, psi = cotangents((len(t.u), len(t.v)))
    return away(phi, t.u), away(psi, t.v)


class Pieces(NamedTuple):
    """The solutions of the four systems of the note, each without its null vector."""

    x: Tensor
    y: Tensor
    w: Tensor
    z: Tensor


def pieces(A: Tensor, t: Triplet) -> Pieces:
    phi, psi = projected_cotangents(t)
    R_m, R_n = schur_pinv(A, t.sigma), schur_pinv(A.mT, t.sigma)
    return Pieces(t.sigma * R_m @ phi, R_m @ A @ psi, R_n @ A.mT @ phi, t.sigma * R_n @ psi)


def stacked_least_squares(X: Tensor, alpha: Tensor, b: Tensor) -> Tensor:
    """argmin ‖[X; α I] y − [b; 0]‖², the documents' reformulation."""
    columns = X.shape[1]
    M = torch.cat([X, alpha * eye(columns)])
    rhs = torch.cat([b, zeros(columns)])
    # torch's default driver assumes full rank and may give NaN without it
    return torch.linalg.lstsq(M, rhs[:, None], driver="gelsd").solution[:, 0]


def least_squares(M: Tensor, b: Tensor) -> Tensor:
    """The minimum-norm one."""
    return torch.linalg.pinv(M, rtol=1e-10) @ b


@every_shape
@top_and_interior
def test_the_two_oracles_agree(shape, k):
    A = matrix(shape)
    phi, psi = cotangents(shape)
    like = triplet(A, k).u
    differenced = central_difference(lambda B: loss(B, XI, phi, psi, k, like), A)
    assert error(true_vjp(A, XI, phi, psi, k), differenced) < DIFFERENCED


# --- the problem, its Jacobian, the iterations ---------------------------------------------------


@every_shape
def test_A01_without_a_sign_constraint_sigma_may_end_negative(shape):
    A = matrix(shape)

    def alternate(sigma, constrained):
        v = unit(random(shape[1], seed=31))
        for _ in range(80):
            sign = 1.0 if constrained else float(torch.as_tensor(sigma).sign())
            u = sign * unit(A @ v)  # the exact minimiser over u, then over v, then over σ
            v = sign * unit(A.mT @ u)
            sigma = u @ A @ v
        return sigma, squared_error(A, state(Triplet(sigma, u, v)))

    best = SPECTRUM[1 : min(shape)].square().sum() / 2
    free, free_value = alternate(-1.0, constrained=False)
    bound, bound_value = alternate(-1.0, constrained=True)
    assert abs(free + SPECTRUM[0]) < TIGHT
    assert abs(bound - SPECTRUM[0]) < TIGHT
    assert abs(free_value - best) < TIGHT
    assert abs(bound_value - best) < TIGHT


@every_shape
def test_A02_the_quadratic_form_is_the_bilinear_one(shape):
    A = matrix(shape)
    m = shape[0]
    H = -saddle(A, scalar(0.0))
    pairs = [(unit(random(m, seed=s)), unit(random(shape[1], seed=s + 200))) for s in range(1, 101)]
    for u, v in pairs:
        w = torch.cat([u, v])
        assert abs(w @ H @ w / 2 - u @ A @ v) < TIGHT
        assert u @ A @ v < SPECTRUM[0]
    sigma, u, v = triplet(A)
    assert abs(u @ A @ v - SPECTRUM[0]) < TIGHT
    assert abs(sigma - SPECTRUM[0]) < TIGHT


@every_shape
def test_A03_the_gradient_has_norm_factors_off_the_spheres(shape):
    A = matrix(shape)
    m = shape[0]

    def printed(x):
        sigma, u, v = parts(x, m)
        return torch.cat(
            [
                (sigma - u @ A @ v)[None],
                sigma**2 * u - sigma * A @ v,
                sigma**2 * v - sigma * A.mT @ u,
            ]
        )

    def corrected(x):
        sigma, u, v = parts(x, m)
        return torch.cat(
            [
                (sigma * (u @ u) * (v @ v) - u @ A @ v)[None],
                sigma**2 * (v @ v) * u - sigma * A @ v,
                sigma**2 * (u @ u) * v - sigma * A.mT @ u,
            ]
        )

    on = generic_state(shape)
    off = on.clone()
    off[1:] *= 1.5
    for x in (on, off):
        truth = central_difference(lambda x: squared_error(A, x), x)
        assert error(corrected(x), truth) < DIFFERENCED
    assert error(printed(on), central_difference(lambda x: squared_error(A, x), on)) < DIFFERENCED
    assert error(printed(off), truth) > 0.1
    sigma, u, v = parts(on, m)
    over_A = central_difference(lambda B: squared_error(B, on), A)
    assert error(A - sigma * torch.outer(u, v), over_A) < DIFFERENCED


@every_shape
@pytest.mark.parametrize("place", ["triplet", "elsewhere"])
def test_A04_the_hessian_is_symmetric_and_has_a_rank_one_term(shape, place):
    A = matrix(shape)
    m = shape[0]
    x = state(triplet(A)) if place == "triplet" else generic_state(shape)
    sigma, u, v = parts(x, m)

    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(squared_error(A, x), x)[0]

    truth = central_difference(gradient, x)
    printed = printed_jacobian(A, x)
    corrected = printed.clone()
    corrected[1:, 0] = corrected[0, 1:]
    corrected[1 : m + 1, m + 1 :] += 2 * sigma**2 * torch.outer(u, v)
    corrected[m + 1 :, 1 : m + 1] += 2 * sigma**2 * torch.outer(v, u)
    assert error(corrected, truth) < DIFFERENCED
    assert error(printed, truth) > 0.1
    assert error(printed, printed.mT) > 0.1
    assert error(corrected, corrected.mT) < TIGHT
    # making the printed matrix symmetric does not repair it
    assert error((printed + printed.mT) / 2, truth) > 0.1


@every_shape
def test_A05_jacobian_of_f_is_not_its_transpose(shape):
    A = matrix(shape)
    for x in (generic_state(shape), state(triplet(A))):
        truth = central_difference(lambda x: residual_map(A, x), x)
        assert error(printed_jacobian(A, x), truth) > 0.1
        assert error(printed_jacobian(A, x).mT, truth) < DIFFERENCED

    # what is printed is already the matrix of the adjoint solve; transposing it "again" is wrong
    t = triplet(A)
    phi, psi = cotangents(shape)
    rhs = torch.cat([scalar(XI)[None], phi, psi])

    def adjoint(M):
        solution = torch.linalg.solve(M, rhs)
        first, p, q = parts(solution, shape[0])
        return assemble(t, first, t.sigma * p, t.sigma * q)

    truth = true_vjp(A, XI, phi, psi)
    J_f = printed_jacobian(A, state(t))
    assert error(adjoint(J_f), truth) < TIGHT
    assert error(adjoint(J_f.mT), truth) > 0.1


@every_shape
def test_A06_the_three_terms_over_A_share_one_layout(shape):
    A = matrix(shape)
    x = generic_state(shape)
    sigma, u, v = parts(x, shape[0])
    phi, psi = cotangents(shape)
    weights = torch.cat([scalar(XI)[None], phi, psi])
    truth = central_difference(lambda B: weights @ residual_map(B, x), A)
    printed = [-XI * torch.outer(v, u), -sigma * torch.outer(v, phi), -sigma * torch.outer(u, psi)]
    corrected = -XI * torch.outer(u, v) - sigma * torch.outer(phi, v) - sigma * torch.outer(u, psi)
    assert error(corrected, truth) < DIFFERENCED
    if shape[0] == shape[1]:  # the dangerous case: the sum runs
        assert error(sum(printed), truth) > 0.1
        assert error(sum(printed), truth.mT) > 0.1
    else:
        assert [tuple(term.shape) for term in printed] == [shape[::-1], shape[::-1], shape]


@every_shape
@top_and_interior
def test_A07_jacobian_of_f_is_regular_where_K_is_singular(shape, k):
    A = matrix(shape)
    m, n = shape
    t = triplet(A, k)
    sigma = t.sigma
    others = SPECTRUM[[i for i in range(min(shape)) if i != k]]
    root = torch.sqrt((1 - 8 * sigma**2).to(torch.complex128))
    predicted = torch.cat(
        [
            torch.stack([2 * sigma**2 + 0j, (1 + root) / 2, (1 - root) / 2]),
            torch.cat([sigma**2 + sigma * others, sigma**2 - sigma * others]) + 0j,
            (sigma**2 + 0j).expand(abs(m - n)),
        ]
    )
    J = printed_jacobian(A, state(t)).mT
    assert error(as_sorted(torch.linalg.eigvals(J)), as_sorted(predicted)) < TIGHT
    assert torch.linalg.svdvals(J)[-1] > 0.05
    assert torch.linalg.svdvals(saddle(A, sigma))[-1] < TIGHT
    # σ ≠ 0 is needed: at σ = 0, u = 0 any v is a root
    degenerate = torch.cat([zeros(m + 1), unit(random(n, seed=24))])
    assert residual_map(A, degenerate).norm() == 0


@every_shape
def test_A08_the_gradient_scheme_is_stable_only_at_the_top_with_a_small_step(shape):
    A = matrix(shape)
    t = triplet(A)

    def radius(k, eta):
        J = printed_jacobian(A, state(triplet(A, k))).mT
        return float(torch.linalg.eigvals(eye(len(J)) - eta * J).abs().max())

    def run(eta):
        x = near(t, 1e-2)
        for _ in range(2000):
            x = x - eta * residual_map(A, x)
        return float(residual_map(A, x).norm())

    limit = float(1 / (2 * t.sigma**2))
    assert radius(0, 0.99 * limit) < 1 < radius(0, 1.01 * limit)
    assert run(0.5 * limit) < TIGHT
    assert not run(1.1 * limit) < 0.1
    for k in range(1, min(shape)):
        assert all(radius(k, eta) > 1 for eta in (1e-4, 1e-2, 0.99 * limit))

    # no step keeps the norms; a retraction does, and keeps the fixed point
    x = generic_state(shape)
    x = x - 0.5 * limit * residual_map(A, x)
    assert abs(x[1 : shape[0] + 1].norm() - 1) > 1e-2
    m = shape[0]
    x = near(t, 1e-2)
    for _ in range(2000):
        x = x - 0.5 * limit * residual_map(A, x)
        x = torch.cat([x[:1], unit(x[1 : m + 1]), unit(x[m + 1 :])])
    assert residual_map(A, x).norm() < TIGHT


@every_shape
def test_A09_diagonal_newton_is_unstable_and_gauss_seidel_is_not(shape):
    A = matrix(shape)
    m, n = shape
    t = triplet(A)

    def jacobi(x):
        sigma, u, v = parts(x, m)
        return torch.cat([(u @ A @ v)[None], A @ v / sigma, A.mT @ u / sigma])

    # λ² − λ + 2 = 0 from (σ, ‖u‖, ‖v‖), −1 from ‖u‖ against ‖v‖, ± σ_i/σ from the rest
    moduli = torch.linalg.eigvals(central_difference(jacobi, state(t))).abs().sort().values
    ratios = SPECTRUM[1 : min(shape)] / SPECTRUM[0]
    predicted = torch.cat(
        [
            zeros(abs(m - n)),
            torch.cat([ratios, ratios]).sort().values,
            torch.tensor([1.0, 2**0.5, 2**0.5], dtype=torch.float64),
        ]
    )
    torch.testing.assert_close(moduli, predicted, rtol=0, atol=DIFFERENCED)
    assert abs(moduli[-1] - 2**0.5) < DIFFERENCED

    x = near(t, 1e-6)
    for _ in range(60):
        x = jacobi(x)
    assert not (x - state(t)).norm() < 0.1

    # with the norms restored: u and v of two different chains, here of opposite sign
    u = unit(random(m, seed=25))
    v = -unit(A.mT @ u)
    for _ in range(100):
        u, v = unit(A @ v), unit(A.mT @ u)
    assert abs(u @ A @ v + t.sigma) < TIGHT

    u = unit(random(m, seed=25))
    v = -unit(A.mT @ u)
    for _ in range(100):
        u = unit(A @ v)
        v = A.mT @ u
        sigma, v = v.norm(), unit(v)
    assert abs(sigma - t.sigma) < TIGHT
    assert residual_map(A, state(Triplet(sigma, u, v))).norm() < TIGHT


@every_shape
def test_A10_full_newton_converges_quadratically_to_unit_vectors(shape):
    A = matrix(shape)
    t = triplet(A)
    x = near(t, 0.2)
    assert abs(x[1 : shape[0] + 1].norm() - 1) > 1e-2
    errors = []
    for _ in range(7):
        errors.append(float((x - state(t)).norm()))
        x = x - torch.linalg.solve(printed_jacobian(A, x).mT, residual_map(A, x))
    assert all(b < a**2 + 1e-14 for a, b in pairwise(errors)), errors
    assert errors[-1] < 1e-13
    assert abs(x[1 : shape[0] + 1].norm() - 1) < 1e-13

    # the printed matrix in its place is no Newton method
    J = printed_jacobian(A, state(t)).mT
    assert torch.linalg.eigvals(eye(len(J)) - torch.linalg.solve(J.mT, J)).abs().max() > 1.1


@every_shape
@top_and_interior
def test_A11_the_symmetric_embedding_and_rayleigh_iteration(shape, k):
    A = matrix(shape)
    m, n = shape
    H = -saddle(A, scalar(0.0))
    S = SPECTRUM[: min(shape)]
    predicted = torch.cat([S, -S, zeros(abs(m - n))]).sort().values
    assert error(torch.linalg.eigvalsh(H), predicted) < TIGHT
    sigma, u, v = triplet(A, k)
    minus = torch.cat([u, -v])
    assert (H @ minus + sigma * minus).norm() < TIGHT

    target = torch.cat([u, v]) / 2**0.5
    w = unit(target + 0.25 * unit(away(random(m + n, seed=26), target)))
    errors = []
    for _ in range(4):
        errors.append(float(away(w, target).norm()))
        if errors[-1] < 1e-13:
            break
        w = unit(torch.linalg.solve(H - (w @ H @ w) * eye(m + n), w))
    # cubic, and to the pair it started at, the third as gladly as the first
    assert all(b < 3 * a**3 + 1e-14 for a, b in pairwise(errors)), errors
    assert errors[-1] < 1e-13


@every_shape
def test_A12_the_chain_for_d_sigma_keeps_its_sigma(shape):
    A = matrix(shape)
    sigma, u, v = triplet(A)
    D = direction(shape)
    du, dv = cotangents(shape)

    def printed(du, dv):
        return du @ u + u @ D @ v + v @ dv

    def corrected(du, dv):
        return sigma * (du @ u) + u @ D @ v + sigma * (v @ dv)

    truth = along(lambda t: (u + t * du) @ (A + t * D) @ (v + t * dv))
    assert error(corrected(du, dv), truth) < DIFFERENCED
    assert error(printed(du, dv), truth) > 0.1
    # on the tangent space the lost factor meets a zero, and the end of the chain is right
    tangent = away(du, u), away(dv, v)
    truth = along(lambda t: triplet(A + t * D).sigma)
    for value in (printed(*tangent), corrected(*tangent), u @ D @ v):
        assert error(value, truth) < DIFFERENCED


# --- the linear system ---------------------------------------------------------------------------


@every_shape
def test_A13_K_is_singular_and_a_plain_solve_is_noise(shape):
    A = matrix(shape)
    m, n = shape
    sigma, u, v = triplet(A)
    K = saddle(A, sigma)
    plus, minus = torch.cat([u, v]), torch.cat([u, -v])
    assert (K @ plus).norm() < TIGHT
    assert (K @ minus - 2 * sigma * minus).norm() < TIGHT
    others = SPECTRUM[1 : min(shape)]
    predicted = torch.cat(
        [
            torch.stack([0 * sigma, 2 * sigma]),
            torch.cat([sigma - others, sigma + others]),
            sigma.expand(abs(m - n)),
        ]
    )
    eigenvalues = torch.linalg.eigvalsh(K)
    assert error(eigenvalues, predicted.sort().values) < TIGHT
    assert abs(eigenvalues[1] - (SPECTRUM[0] - SPECTRUM[1])) < TIGHT

    naive, pseudo = [], []
    for seed in range(20):
        A = with_spectrum(m, n, SPECTRUM, seed)
        t = triplet(A)
        phi, psi = random(m, seed=seed + 100), random(n, seed=seed + 200)
        truth = true_vjp(A, 0.0, phi, psi)
        K = saddle(A, t.sigma)
        rhs = torch.cat([phi, psi])
        pq = saddle_pinv(A, t.sigma) @ rhs
        pseudo.append(error(assemble_projected(t, 0.0, pq[:m], pq[m:]), truth))
        try:
            pq = torch.linalg.solve(K, rhs)
        except torch.linalg.LinAlgError:
            naive.append(torch.inf)
        else:
            naive.append(error(assemble_projected(t, 0.0, pq[:m], pq[m:]), truth))
    assert sorted(naive)[10] > 0.05
    assert max(pseudo) < TIGHT


@every_shape
def test_A14_the_augmented_matrix_has_a_left_inverse_only(shape):
    A = matrix(shape)
    m, n = shape
    t = triplet(A)
    sigma, u, v = t

    def augmented(sigma, A, scale):
        rows = zeros(2, m + n)
        rows[0, :m], rows[1, m:] = scale * u, scale * v
        return torch.cat([saddle(A, sigma), rows])

    Kt = augmented(sigma, A, 1.0)
    assert Kt.shape == (m + n + 2, m + n)
    with pytest.raises(RuntimeError, match="must be batches of square matrices"):
        torch.linalg.inv(Kt)
    assert torch.linalg.svdvals(Kt)[-1] > 0.5

    D = direction(shape)
    dsigma = u @ D @ v
    none = zeros(2)
    c = torch.cat([D @ v - dsigma * u, D.mT @ u - dsigma * v, none])
    moved = torch.linalg.lstsq(Kt, c[:, None], driver="gelsd").solution[:, 0]
    truth = along(lambda s: torch.cat(triplet(A + s * D, like=u)[1:]))
    assert error(moved, truth) < DIFFERENCED

    # the transposed system has many solutions; the projected formula does not care which
    null_1 = torch.cat([u, v, none])
    null_2 = torch.cat([u, -v, torch.stack([-2 * sigma, 2 * sigma])])
    phi, psi = cotangents(shape)
    rhs = torch.cat([phi, psi])
    wide = torch.linalg.lstsq(Kt.mT, rhs[:, None], driver="gelsd").solution[:, 0]
    other = wide + 0.8 * null_1 - 0.5 * null_2
    truth = true_vjp(A, XI, phi, psi)
    for null in (null_1, null_2):
        assert (Kt.mT @ null).norm() < TIGHT
        assert abs(null @ c) < TIGHT
    for solution in (wide, other):
        assert (Kt.mT @ solution - rhs).norm() < TIGHT
        p, q = solution[:m], solution[m : m + n]
        assert error(assemble_projected(t, XI, p, q), truth) < TIGHT
    assert error(assemble(t, XI, other[:m], other[m : m + n]), truth) > 0.1

    # rows of norm 1 beside a K of norm 2σ: the condition number follows the scale of A
    big = augmented(100 * sigma, 100 * A, 1.0)
    scaled = augmented(100 * sigma, 100 * A, 100 * sigma)
    assert error(torch.linalg.cond(scaled), torch.linalg.cond(augmented(sigma, A, sigma))) < TIGHT
    assert torch.linalg.cond(big) > 10 * torch.linalg.cond(scaled)


@every_shape
def test_A15_K_inverse_of_the_constraint_block_is_infinite(shape):
    A = matrix(shape)
    sigma, u, v = triplet(A)
    W = torch.block_diag(u[:, None], v[:, None])
    # each column has a component on the null vector: no X solves K X = W
    remainder = saddle(A, sigma) @ saddle_pinv(A, sigma) @ W - W
    for column in some(remainder.mT):
        assert abs(column.norm() - 0.5**0.5) < TIGHT

    U, V = u[:, None], v[:, None]
    finite = block([U, -U], [-V, V]) / (4 * sigma)
    assert error(saddle_pinv(A, sigma) @ W, finite) < TIGHT

    norms = []
    for ratio in (1.1, 1.01):
        tau = ratio * sigma
        solved = torch.linalg.solve(saddle(A, tau), W)
        expected = block([tau * U, sigma * U], [sigma * V, tau * V]) / (tau**2 - sigma**2)
        assert error(solved, expected) < TIGHT
        norms.append(float(solved.norm()))
    assert norms[1] > 9 * norms[0]


@every_shape
def test_A16_the_block_inverse_holds_off_the_spectrum(shape):
    A = matrix(shape)
    m, n = shape
    sigma, u, v = triplet(A)
    I_m, I_n = eye(m), eye(n)

    def blocks(tau, inverse):
        R_m, R_n = inverse(shifted(A, tau)), inverse(shifted(A.mT, tau))
        return block([tau * R_m, R_m @ A], [R_n @ A.mT, tau * R_n])

    def factored(tau):
        left = torch.block_diag(
            torch.linalg.inv(tau * I_m - A @ A.mT / tau),
            torch.linalg.inv(tau * I_n - A.mT @ A / tau),
        )
        right = block([I_m, A / tau], [A.mT / tau, I_n])
        return left @ right

    tau = 1.3 * sigma
    truth = torch.linalg.inv(saddle(A, tau))
    assert error(blocks(tau, torch.linalg.inv), truth) < TIGHT
    assert error(factored(tau), truth) < TIGHT

    # at τ = σ both diagonal blocks are singular, as K is
    for M in (shifted(A, sigma), shifted(A.mT, sigma), saddle(A, sigma)):
        assert torch.linalg.svdvals(M)[-1] < TIGHT
    # with ⁺ they give K⁺ on u⊥ × v⊥, which lacks the mode [u; −v]
    at_sigma = blocks(sigma, lambda M: torch.linalg.pinv(M, hermitian=True, rtol=1e-10))
    minus = torch.cat([u, -v]) / 2**0.5
    complete = at_sigma + torch.outer(minus, minus) / (2 * sigma)
    assert error(complete, saddle_pinv(A, sigma)) < TIGHT
    assert error(at_sigma, saddle_pinv(A, sigma)) > 0.05


@every_shape
def test_A17_push_through_holds_off_the_spectrum_and_on_the_complement(shape):
    A = matrix(shape)
    sigma = triplet(A).sigma

    def transposed(tau):
        B = A / tau
        M_m, M_n = torch.linalg.inv(shifted(B, 1.0)), torch.linalg.inv(shifted(B.mT, 1.0))
        return block([M_m, B @ M_n], [B.mT @ M_m, M_n]) / tau

    tau = 1.3 * sigma
    assert error(transposed(tau), torch.linalg.inv(saddle(A, tau))) < TIGHT
    # at σ itself the inverse in it does not exist; the identity survives with ⁺
    assert torch.linalg.svdvals(shifted(A / sigma, 1.0))[-1] < TIGHT
    left, right = schur_pinv(A, sigma) @ A, A @ schur_pinv(A.mT, sigma)
    assert left.norm() > 0.5
    assert error(left, right) < TIGHT


@every_shape
def test_A18_the_blocks_are_resolvents_and_no_projectors(shape):
    A = matrix(shape)
    sigma, u, _ = triplet(A)
    M = sigma**2 * schur_pinv(A, sigma)  # (I − ÃÃᵀ)⁺
    assert error(M @ M, M) > 0.3
    values = sigma**2 / (sigma**2 - SPECTRUM[1 : min(shape)].square())
    ones = torch.ones(max(0, shape[0] - shape[1]), dtype=torch.float64)
    predicted = torch.cat([zeros(1), values, ones]).sort().values
    assert error(torch.linalg.eigvalsh(M), predicted) < TIGHT
    # off σ, where the printed inverse exists, it is no more idempotent
    M = torch.linalg.inv(shifted(A / (1.3 * sigma), 1.0))
    assert error(M @ M, M) > 0.3
    # the projector in this story is P_u
    P = eye(shape[0]) - torch.outer(u, u)
    assert error(P @ P, P) < TIGHT


# --- the vector-Jacobian product -----------------------------------------------------------------


@every_shape
def test_A19_the_first_term_is_projected_on_the_left(shape):
    A = matrix(shape)
    _, u, v = triplet(A)
    p, _ = cotangents(shape)
    D = direction(shape)
    dsigma = along(lambda t: triplet(A + t * D).sigma)
    measured = p @ (D @ v - dsigma * u)
    assert error((torch.outer(away(p, u), v) * D).sum(), measured) < DIFFERENCED
    assert error((torch.outer(p, v) * D).sum(), measured) > 0.01


@every_shape
def test_A20_the_second_term_needs_its_transpose(shape):
    A = matrix(shape)
    _, u, v = triplet(A)
    _, q = cotangents(shape)
    D = direction(shape)
    dsigma = along(lambda t: triplet(A + t * D).sigma)
    measured = q @ (D.mT @ u - dsigma * v)
    P_v = eye(shape[1]) - torch.outer(v, v)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        u[:, None] @ q[:, None] @ P_v
    corrected = u[:, None] @ q[:, None].mT @ P_v
    assert error((corrected * D).sum(), measured) < DIFFERENCED


@every_shape
@top_and_interior
def test_A21_each_vector_feeds_both_terms(shape, k):
    A = matrix(shape)
    t = triplet(A, k)
    phi, psi = cotangents(shape)
    none_u, none_v = 0 * phi, 0 * psi
    true_u = true_vjp(A, 0.0, phi, none_v, k)
    true_v = true_vjp(A, 0.0, none_u, psi, k)
    p, q = constrained_solve(A, t, phi, psi)  # φ̃ and ψ̃

    assert error(torch.outer(p, t.v), true_u) > 0.1
    assert error(torch.outer(t.u, q), true_v) > 0.1
    assert error(torch.outer(p, t.v) + torch.outer(t.u, q), true_u + true_v) < TIGHT

    # no better with only the cotangent in question in the solve
    x, w = constrained_solve(A, t, phi, none_v)
    y, z = constrained_solve(A, t, none_u, psi)
    assert error(torch.outer(x, t.v), true_u) > 0.1
    assert error(torch.outer(t.u, z), true_v) > 0.1
    assert error(torch.outer(x, t.v) + torch.outer(t.u, w), true_u) < TIGHT
    assert error(torch.outer(y, t.v) + torch.outer(t.u, z), true_v) < TIGHT


def scaled_systems(A: Tensor, t: Triplet) -> Pieces:
    """Px = φ, Py = Ãψ, Qz = Ãᵀφ, Qw = ψ on the complement."""
    phi, psi = projected_cotangents(t)
    B = A / t.sigma
    P, Q = schur_pinv(B, 1.0), schur_pinv(B.mT, 1.0)
    return Pieces(x=P @ phi, y=P @ B @ psi, z=Q @ B.mT @ phi, w=Q @ psi)


@every_shape
def test_A22_the_last_formula_of_the_note_lost_a_factor_sigma(shape):
    A = matrix(shape)
    t = triplet(A)
    phi, psi = cotangents(shape)
    x, y, w, z = scaled_systems(A, t)
    truth = true_vjp(A, XI, phi, psi)
    assert error(assemble(t, XI, x + y, z + w), truth) > 0.1
    assert error(assemble(t, XI, (x + y) / t.sigma, (z + w) / t.sigma), truth) < TIGHT
    p, _ = constrained_solve(A, t, phi, psi)
    assert abs((x + y).norm() / p.norm() - t.sigma) < TIGHT
    # and the letters w, z stand for each other's solution of section 3
    first = pieces(A, t)
    assert error(w / t.sigma, first.z) < TIGHT
    assert error(z / t.sigma, first.w) < TIGHT


@every_shape
def test_A23_the_scaled_systems_need_projected_right_hand_sides(shape):
    A = matrix(shape)
    t = triplet(A)
    phi, psi = cotangents(shape)
    B = A / t.sigma
    P, Q = shifted(B, 1.0), shifted(B.mT, 1.0)
    along_u, along_v = (t.u @ phi).abs(), (t.v @ psi).abs()
    for M, rhs, expected in (
        (P, phi, along_u),
        (P, B @ psi, along_v),
        (Q, B.mT @ phi, along_u),
        (Q, psi, along_v),
    ):
        assert expected > 0.1
        assert abs((M @ least_squares(M, rhs) - rhs).norm() - expected) < TIGHT
    x, y, w, z = scaled_systems(A, t)
    p, q = (x + y) / t.sigma, (z + w) / t.sigma
    assert error(assemble(t, XI, p, q), true_vjp(A, XI, phi, psi)) < TIGHT


@every_shape
@top_and_interior
def test_A24_the_four_systems_are_consistent_after_projection_only(shape, k):
    A = matrix(shape)
    t = triplet(A, k)
    sigma, u, v = t
    S_m, S_n = shifted(A, sigma), shifted(A.mT, sigma)

    def remainders(phi, psi):
        systems = ((S_m, sigma * phi), (S_m, A @ psi), (S_n, A.mT @ phi), (S_n, sigma * psi))
        return torch.stack([(S @ least_squares(S, b) - b).norm() for S, b in systems])

    phi, psi = cotangents(shape)
    on_u, on_v = sigma * (u @ phi).abs(), sigma * (v @ psi).abs()
    assert min(on_u, on_v) > 0.05
    assert error(remainders(phi, psi), torch.stack([on_u, on_v, on_u, on_v])) < TIGHT
    assert remainders(away(phi, u), away(psi, v)).max() < TIGHT
    x, y, w, z = pieces(A, t)
    assert error(assemble(t, XI, x + y, w + z), true_vjp(A, XI, phi, psi, k)) < TIGHT


@every_shape
@top_and_interior
def test_A25_one_solve_does_the_work_of_four(shape, k):
    A = matrix(shape)
    t = triplet(A, k)
    phi, psi = projected_cotangents(t)
    x, y, w, z = pieces(A, t)
    assert error(A @ z / t.sigma, y) < TIGHT
    assert error(A.mT @ x / t.sigma, w) < TIGHT
    p = schur_pinv(A, t.sigma) @ (t.sigma * phi + A @ psi)
    assert error(p, x + y) < TIGHT
    assert error((A.mT @ p + psi) / t.sigma, w + z) < TIGHT


@every_shape
def test_A26_forming_the_gram_matrix_squares_no_relevant_condition_number(shape):
    m, n = shape
    p = min(shape)
    gap = 1e-3

    def conditions(smallest):
        spectrum = torch.linspace(0.9, 0.5, p, dtype=torch.float64)
        spectrum[0], spectrum[1], spectrum[-1] = 1.0, 1.0 - gap, smallest
        A = with_spectrum(m, n, spectrum)
        t = triplet(A)
        sigma, u, v = t
        S = torch.linalg.eigvalsh(shifted(A, sigma))[1:]
        K = torch.linalg.eigvalsh(saddle(A, sigma))[1:-1]  # between [u; v] and [u; −v]
        second = 1.0 - gap
        floor = 0.0 if m > n else smallest
        assert error(S[-1] / S[0], scalar((1 - floor**2) / (1 - second**2))) < 1e-10
        assert error(K[-1] / K[0], scalar((1 + second) / gap)) < 1e-10

        # the m-side Schur system with the Gram matrix formed, against sums over the known SVD
        phi, psi = cotangents(shape)
        S_u = shifted(A, sigma) + sigma**2 * torch.outer(u, u)
        rhs = sigma * away(phi, u) + A @ away(psi, v)
        solved = torch.cholesky_solve(rhs[:, None], torch.linalg.cholesky(S_u))[:, 0]
        truth, _ = explicit_svd(A, 0, phi, psi)
        return S[-1] / S[0], K[-1] / K[0], error(solved, truth)

    S, K, wrong = conditions(1e-1)
    S_tiny, K_tiny, wrong_tiny = conditions(1e-7)
    assert 3.9 < K / S < 4.1
    # cond(A)² rises from 1e2 to 1e14, and nothing happens
    assert abs(S_tiny / S - 1) < 0.02
    assert error(K_tiny, K) < 1e-10
    assert max(wrong, wrong_tiny) < 1e-11  # rounding over gap


@every_shape
@top_and_interior
def test_A27_the_argmin_is_a_maximum_or_a_saddle(shape, k):
    A = matrix(shape)
    t = triplet(A, k)
    sigma, u, _ = t
    _, psi = projected_cotangents(t)
    y = pieces(A, t).y

    def objective(y):
        return (-A.mT @ y - psi).square().sum() - sigma**2 * y.square().sum()

    assert central_difference(objective, y).norm() < DIFFERENCED  # stationary
    curvature = torch.linalg.eigvalsh(-shifted(A, sigma))
    counts = [int((curvature > TIGHT).sum()), int((curvature.abs() <= TIGHT).sum())]
    assert counts == [k, 1]  # the rest, m − k − 1, is negative
    moves = [away(random(shape[0], seed=s), u) for s in range(40, 60)]
    changes = torch.stack([objective(y + d) - objective(y) for d in moves])
    assert changes.min() < -0.1
    if k == 0:
        assert changes.max() < 0
        # the same equation as a minimisation: on u⊥, with the signs the other way round
        assert all(-objective(y + d) > -objective(y) for d in moves)
    else:
        higher = triplet(A, 0).u
        assert objective(y + higher) > objective(y) + 0.1


@every_shape
def test_A28_no_stacked_least_squares_gives_the_shifted_system(shape):
    A = matrix(shape)
    t = triplet(A)
    sigma = t.sigma
    phi, psi = projected_cotangents(t)
    x, y, w, z = pieces(A, t)

    def six(alpha, sign):
        forward_mu, forward_nu = least_squares(A, sigma * phi), least_squares(A.mT, sigma * psi)
        yield stacked_least_squares(A.mT, alpha, sign * psi), y
        yield stacked_least_squares(A, alpha, sign * phi), w
        yield stacked_least_squares(A.mT, alpha, sign * forward_mu), x
        yield stacked_least_squares(A, alpha, sign * forward_nu), z
        yield stacked_least_squares(A, alpha, sign * sigma * phi), A.mT @ x
        yield stacked_least_squares(A.mT, alpha, sign * sigma * psi), A @ z

    # as printed: opposite to the solution, so worse than answering zero
    for printed, truth in some(six(sigma**2, -1)):
        assert printed @ truth < 0
        assert error(printed, truth) > 1
    ridge = A @ A.mT + sigma**4 * eye(shape[0])
    solved = stacked_least_squares(A.mT, sigma**2, -psi)
    assert error(ridge @ solved, -A @ psi) < TIGHT
    # no real α, and no sign of the right-hand side, mends it
    for alpha in some(torch.logspace(-3, 3, 61, dtype=torch.float64)):
        assert all(error(got, truth) > 1 for got, truth in six(alpha, -1))
        assert all(error(got, truth) > 0.1 for got, truth in six(alpha, +1))

    # α = iσ does, in the bilinear normal equations, which no least-squares routine solves
    M = torch.cat([A.mT + 0j, 1j * sigma * torch.eye(shape[0], dtype=torch.complex128)])
    b = torch.cat([-psi, zeros(shape[0])]) + 0j
    bilinear = torch.linalg.pinv(M.mT @ M, rtol=1e-10) @ (M.mT @ b)
    assert error(bilinear, y + 0j) < TIGHT
    hermitian = torch.linalg.lstsq(M, b[:, None], driver="gelsd").solution[:, 0]
    assert error(hermitian, y + 0j) > 1
    # what does work
    assert error(least_squares(shifted(A, sigma), A @ psi), y) < TIGHT


@every_shape
def test_A29_the_ridge_system_is_singular_at_minus_an_eigenvalue(shape):
    X = matrix(shape)
    n = shape[1]
    gram = X.mT @ X
    eigenvalues = torch.linalg.eigvalsh(gram)
    for value in some(eigenvalues[eigenvalues > 1e-3]):
        assert torch.linalg.svdvals(gram + value * eye(n))[-1] > 0.99 * value
        assert torch.linalg.svdvals(gram - value * eye(n))[-1] < TIGHT
    # at λ = 0 full column rank decides
    assert bool(torch.linalg.eigvalsh(gram)[0] > 1e-3) == (n <= shape[0])

    # a minimum exists down to λ = −σ_min², not only for λ ≥ 0
    smallest, lowest = eigenvalues[0].clamp(min=0), torch.linalg.eigh(gram).eigenvectors[:, 0]
    y = random(shape[0], seed=28)

    def rise(lam):
        def objective(beta):
            return (X @ beta - y).square().sum() + lam * beta.square().sum()

        beta = torch.linalg.solve(gram + lam * eye(n), X.mT @ y)
        assert error((gram + lam * eye(n)) @ beta, X.mT @ y) < TIGHT
        moves = [lowest, *(unit(random(n, seed=s)) for s in range(40, 60))]
        return min(float(objective(beta + d) - objective(beta)) for d in moves)

    assert rise(-smallest + 0.02) > 0.015
    assert rise(-smallest - 0.02) < -0.015


@every_shape
@top_and_interior
def test_A30_the_four_systems_are_singular_and_well_conditioned(shape, k):
    A = matrix(shape)
    t = triplet(A, k)
    for B in (A, A.mT):
        S = shifted(B, t.sigma)
        values = torch.linalg.svdvals(S)
        assert values[-1] < TIGHT  # not small: zero
        assert values[0] / values[-2] < 10
        rhs = S @ random(B.shape[0], seed=29)  # consistent
        assert error(S @ least_squares(S, rhs), rhs) < TIGHT


@every_shape
def test_A31_one_cotangent_alone_still_gives_two_outer_products(shape):
    A = matrix(shape)
    t = triplet(A)
    phi, psi = cotangents(shape)
    for a, b in ((phi, 0 * psi), (0 * phi, psi)):
        p, q = constrained_solve(A, t, a, b)
        truth = true_vjp(A, 0.0, a, b)
        assert error(assemble(t, 0.0, p, q), truth) < TIGHT
        assert error(torch.outer(p, t.v), truth) > 0.1
        assert error(torch.outer(t.u, q), truth) > 0.1
    # x and w vanish with φ, y and z with ψ: what is left is one solve and one product
    x, y, w, z = pieces(A, t)
    for got, expected in zip(constrained_solve(A, t, phi, 0 * psi), (x, w), strict=True):
        assert error(got, expected) < TIGHT
    for got, expected in zip(constrained_solve(A, t, 0 * phi, psi), (y, z), strict=True):
        assert error(got, expected) < TIGHT
    assert error(XI * torch.outer(t.u, t.v), true_vjp(A, XI, 0 * phi, 0 * psi)) < TIGHT


@every_shape
def test_A32_forward_substitution_loses_what_A_cannot_reach(shape):
    A = matrix(shape)
    m, n = shape
    t = triplet(A)
    sigma = t.sigma
    phi, psi = projected_cotangents(t)
    x, _, _, z = pieces(A, t)
    mu, nu = least_squares(A, sigma * phi), least_squares(A.mT, sigma * psi)
    printed_x = schur_pinv(A, sigma) @ A @ mu
    printed_z = schur_pinv(A.mT, sigma) @ A.mT @ nu
    A_plus = torch.linalg.pinv(A, rtol=1e-10)
    assert error(printed_x + (phi - A @ A_plus @ phi) / sigma, x) < TIGHT
    assert error(printed_z + (psi - A_plus @ A @ psi) / sigma, z) < TIGHT
    lost_x, lost_z = error(printed_x, x), error(printed_z, z)
    assert lost_x > 0.1 if m > n else lost_x < TIGHT
    assert lost_z > 0.1 if m < n else lost_z < TIGHT


@every_shape
def test_A33_x_follows_from_mu_by_a_product_not_by_a_solve(shape):
    A = matrix(shape)
    t = triplet(A)
    sigma = t.sigma
    phi, _ = projected_cotangents(t)
    x, _, w, _ = pieces(A, t)
    mu = schur_pinv(A.mT, sigma) @ (sigma * A.mT @ phi)
    assert error(A.mT @ x, mu) < TIGHT
    assert error(sigma * w, mu) < TIGHT
    assert error((sigma * phi + A @ mu) / sigma**2, x) < TIGHT
    solved = error(least_squares(A.mT, mu), x)
    assert solved > 0.1 if shape[0] > shape[1] else solved < TIGHT


@every_shape
def test_A34_the_equation_for_nu_lives_on_the_other_side(shape):
    A = matrix(shape)
    m, n = shape
    t = triplet(A)
    sigma = t.sigma
    _, psi = projected_cotangents(t)
    _, y, _, z = pieces(A, t)
    nu = schur_pinv(A, sigma) @ (sigma * A @ psi)
    assert error(A @ z, nu) < TIGHT
    assert error(sigma * y, nu) < TIGHT
    assert error((sigma * psi + A.mT @ nu) / sigma**2, z) < TIGHT
    S_n = shifted(A.mT, sigma)
    if m == n:  # runs, and means something else
        assert error(S_n @ A @ nu, sigma * A @ psi) > 0.1
    else:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            S_n @ A @ nu


@every_shape
def test_A35_the_last_stack_is_neither_a_product_nor_a_backslash(shape):
    A = matrix(shape)
    n = shape[1]
    t = triplet(A)
    sigma = t.sigma
    phi, _ = projected_cotangents(t)
    x, _, w, _ = pieces(A, t)
    mu = A.mT @ x
    stack = torch.cat([A, sigma**2 * eye(n)])
    top = torch.stack([-sigma * phi, -phi], dim=1)
    rhs = torch.cat([top, zeros(n, 2)])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        stack @ rhs
    solved = torch.linalg.lstsq(stack, rhs, driver="gelsd").solution
    assert error(solved[:, 0], mu) > 1
    assert error(solved[:, 1], w) > 1
    # and the two columns are parallel: μ = σw, one right-hand side is enough
    assert error(solved[:, 0], sigma * solved[:, 1]) < TIGHT
    assert error(mu, sigma * w) < TIGHT
    assert error(schur_pinv(A.mT, sigma) @ A.mT @ phi, w) < TIGHT


# --- spectral normalisation ----------------------------------------------------------------------


def normalised(A: Tensor) -> Tensor:
    return A / torch.linalg.matrix_norm(A, ord=2)


@every_shape
def test_A36_spectral_normalisation_divides_by_the_square(shape):
    A = matrix(shape)
    g, u, v = triplet(A)
    V = random(*shape, seed=30)
    truth = central_difference(lambda B: (V * normalised(B)).sum(), A)
    inner = (V * A).sum()
    printed = V / g - inner / g * torch.outer(u, v)
    corrected = V / g - inner / g**2 * torch.outer(u, v)
    assert error(corrected, truth) < DIFFERENCED
    assert error(printed, truth) > 0.1
    # A/‖A‖ does not feel the length of A
    assert abs((corrected * A).sum()) < TIGHT
    assert abs((printed * A).sum()) > 0.1


@every_shape
def test_A37_at_norm_one_the_formula_holds_but_is_no_tangent_projection(shape):
    A = normalised(matrix(shape))
    _, u, v = triplet(A)
    V = random(*shape, seed=30)
    printed = V - (V * A).sum() * torch.outer(u, v)
    truth = central_difference(lambda B: (V * normalised(B)).sum(), A, h=5e-4)
    assert error(printed, truth) < DIFFERENCED
    radial = u @ printed @ v
    assert abs(radial - (u @ V @ v - (V * A).sum())) < TIGHT
    assert abs(radial) > 0.1
    assert error(V - (u @ V @ v) * torch.outer(u, v), truth) > 0.05


@every_shape
def test_A38_a_raw_gradient_with_rescaling_can_ascend(shape):
    A = normalised(matrix(shape))
    _, u, v = triplet(A)
    uv = torch.outer(u, v)
    V = uv + (A - uv) / 2  # the gradient of the linear loss ⟨V, ·⟩, at every point
    through_norm = V - (V * A).sum() * uv
    tangent = V - (u @ V @ v) * uv

    def value(direction, eta):
        return (V * normalised(A - eta * direction)).sum()

    def slope(direction):
        return along(lambda eta: value(direction, eta))

    rest = (A - uv).square().sum()
    assert error(slope(V), rest / 4) < DIFFERENCED  # uphill
    assert error(slope(through_norm), -(rest + rest**2) / 4) < DIFFERENCED
    assert error(slope(tangent), -rest / 4) < DIFFERENCED
    start = value(V, 0.0)
    assert value(V, 0.1) > start + 1e-3
    assert value(through_norm, 0.1) < start - 1e-3
    assert value(tangent, 0.1) < start - 1e-3

    # the slopes for a loss of any gradient
    W = unit(random(*shape, seed=30))
    through_norm = W - (W * A).sum() * uv
    tangent = W - (u @ W @ v) * uv
    for direction, expected in (
        (W, -(W.square().sum() - (W * A).sum() * (u @ W @ v))),
        (through_norm, -through_norm.square().sum()),
        (tangent, -(W.square().sum() - (u @ W @ v) ** 2)),
    ):
        measured = along(lambda eta, d=direction: (W * normalised(A - eta * d)).sum())
        assert error(measured, expected) < DIFFERENCED


@every_shape
def test_A38_the_update_needs_a_step_size_and_rescaling_is_no_projection(shape):
    A = normalised(matrix(shape))
    goal = normalised(A + 0.05 * gaussian(*shape))

    def value(A):
        return 50 * (normalised(A) - goal).square().sum()

    def step(eta):
        B = A.clone().requires_grad_()
        return value(A - eta * torch.autograd.grad(value(B), B)[0])

    assert step(1.0) > value(A)  # as printed
    assert step(1e-3) < value(A)

    # the nearest matrix of norm ≤ 1 has its singular values clipped
    far = 2 * matrix(shape)
    U, S, Vh = torch.linalg.svd(far, full_matrices=False)
    clipped = (U * S.clamp(max=1.0)) @ Vh
    assert abs(torch.linalg.matrix_norm(clipped, ord=2) - 1) < TIGHT
    assert (clipped - far).norm() < 0.9 * (normalised(far) - far).norm()


@every_shape
def test_A39_warm_power_iteration_and_the_frozen_gradient(shape):
    A = matrix(shape)
    m, n = shape
    sigma, u_true, v_true = triplet(A)
    second = triplet(A, 1).v
    # only the second vector contaminates: the rate is then seen at once
    v = unit(v_true + 1e-3 * second)
    rate = float(SPECTRUM[1] / SPECTRUM[0])
    vectors, values = [], []
    for _ in range(4):
        vectors.append(float(away(v, v_true).norm()))
        u = unit(A @ v)
        v = unit(A.mT @ u)
        values.append(float(sigma - (A @ v).norm()))
    for before, after in some(pairwise(vectors)):
        assert abs(after / before - rate**2) < 1e-5
    for before, after in some(pairwise(values)):
        assert abs(after / before - rate**4) < 1e-5

    # far from convergence, with u and v held fixed
    u, v = unit(u_true + 0.3 * random(m, seed=32)), unit(v_true + 0.3 * random(n, seed=33))
    V = random(m, n, seed=30)
    estimate = u @ A @ v
    frozen = V / estimate - (V * A).sum() / estimate**2 * torch.outer(u, v)
    truth = central_difference(lambda B: (V * B).sum() / (u @ B @ v), A)
    assert error(frozen, truth) < DIFFERENCED
    # which is the gradient of A/‖A‖₂ at convergence only
    assert error(frozen, central_difference(lambda B: (V * normalised(B)).sum(), A)) > 0.05


# --- use this ------------------------------------------------------------------------------------


def explicit_svd(A: Tensor, k: int, phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    others = [i for i in range(len(S)) if i != k]
    s, W, Z = S[others], U[:, others], Vh[others].mT
    a, b, gaps = W.mT @ phi, Z.mT @ psi, S[k] ** 2 - s**2
    p = W @ ((S[k] * a + s * b) / gaps) + (phi - U @ (U.mT @ phi)) / S[k]
    q = Z @ ((s * a + S[k] * b) / gaps) + (psi - Vh.mT @ (Vh @ psi)) / S[k]
    return p, q


def schur_left(A: Tensor, t: Triplet, phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    sigma, u, v = t
    phi, psi = away(phi, u), away(psi, v)
    S = shifted(A, sigma) + sigma**2 * torch.outer(u, u)
    p = torch.linalg.solve(S, sigma * phi + A @ psi)
    return p, (A.mT @ p + psi) / sigma


def schur_right(A: Tensor, t: Triplet, phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    q, p = schur_left(A.mT, Triplet(t.sigma, t.v, t.u), psi, phi)
    return p, q


def bordered(A: Tensor, t: Triplet, phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    sigma, u, v = t
    m, n = A.shape
    E = torch.block_diag(u[:, None], v[:, None])
    none = zeros(2, 2)
    M = block([saddle(A, sigma), E], [E.mT, none])
    solution = torch.linalg.solve(M, torch.cat([phi, psi, none[0]]))
    assert error(solution[m + n :], torch.stack([u @ phi, v @ psi])) < TIGHT
    return solution[:m], solution[m : m + n]


@every_shape
@top_and_interior
def test_vjp_by_every_recommended_system(shape, k):
    A = matrix(shape)
    t = triplet(A, k)
    phi, psi = cotangents(shape)
    truth = true_vjp(A, XI, phi, psi, k)
    for solve in (schur_left, schur_right, constrained_solve, bordered):
        p, q = solve(A, t, phi, psi)
        assert error(assemble(t, XI, p, q), truth) < TIGHT, solve.__name__
        assert max(abs(t.u @ p), abs(t.v @ q)) < TIGHT, solve.__name__
    assert error(assemble(t, XI, *explicit_svd(A, k, phi, psi)), truth) < TIGHT
    pq = saddle_pinv(A, t.sigma) @ torch.cat([phi, psi])
    assert error(assemble(t, XI, pq[: shape[0]], pq[shape[0] :]), truth) < TIGHT
    rhs = torch.cat([scalar(XI)[None], phi, psi])
    first, p, q = parts(torch.linalg.solve(printed_jacobian(A, state(t)), rhs), shape[0])
    assert error(assemble(t, first, t.sigma * p, t.sigma * q), truth) < TIGHT
    # positive definite at the top, and there only
    S = shifted(A, t.sigma) + t.sigma**2 * torch.outer(t.u, t.u)
    assert bool(torch.linalg.cholesky_ex(S).info == 0) == (k == 0)


@every_shape
@top_and_interior
def test_jvp_by_the_same_solve(shape, k):
    A = matrix(shape)
    t = triplet(A, k)
    D = direction(shape)
    dsigma = t.u @ D @ t.v
    du, dv = constrained_solve(A, t, D @ t.v, D.mT @ t.u)
    for i, moved in enumerate((dsigma, du, dv)):
        measured = along(lambda s, i=i: triplet(A + s * D, k, like=t.u)[i])
        assert error(moved, measured) < DIFFERENCED


@every_shape
@top_and_interior
def test_double_backward(shape, k):
    A = matrix(shape)
    t = triplet(A, k)
    _, u, v = t
    phi, psi = cotangents(shape)
    G = random(*shape, seed=34)

    leaves = [x.clone().requires_grad_() for x in (A, scalar(XI), phi, psi)]
    value = loss(leaves[0], *leaves[1:], k, u)
    first = torch.autograd.grad(value, leaves[0], create_graph=True)[0]
    truth = torch.autograd.grad((G * first).sum(), leaves)

    p, q = constrained_solve(A, t, phi, psi)
    p_bar, q_bar = G @ v, G.mT @ u
    a, b = constrained_solve(A, t, p_bar, q_bar)
    sigma_bar = -(a @ p + b @ q)
    u_bar = XI * G @ v + G @ q - (u @ phi) * a - (u @ p_bar) * p
    v_bar = XI * G.mT @ u + G.mT @ p - (v @ psi) * b - (v @ q_bar) * q
    direct = torch.outer(a, q) + torch.outer(p, b)
    grad_A = direct + vjp(A, t, sigma_bar, u_bar, v_bar)
    for got, expected in zip((grad_A, u @ G @ v, a, b), truth, strict=True):
        assert error(got, expected) < 1e-11
    # the raw uᵀφ and vᵀψ matter here, though not in the first order
    u_bar, v_bar = u_bar + (u @ phi) * a, v_bar + (v @ psi) * b
    assert error(direct + vjp(A, t, sigma_bar, u_bar, v_bar), truth[0]) > 0.01

    # the oracle itself, by differences
    like = u
    measured = central_difference(
        lambda B: (G * vjp(B, triplet(B, k, like), XI, phi, psi)).sum(), A
    )
    assert error(grad_A, measured) < DIFFERENCED


@every_shape
def test_complex_matrices_keep_the_relative_phase(shape):
    m, n = shape
    A = torch.complex(matrix(shape), 0.3 * random(m, n, seed=335))
    f, g = (
        torch.complex(random(m, seed=336), random(m, seed=37)),
        torch.complex(random(n, seed=338), random(n, seed=39)),
    )

    def of(sigma, u, v):
        """Real, and blind to a common phase of u and v."""
        return XI * sigma + (torch.vdot(f, u) * torch.vdot(v, g)).real

    truth = torch.view_as_complex(
        central_difference(lambda B: of(*triplet(torch.view_as_complex(B))), torch.view_as_real(A))
    )
    sigma, u, v = triplet(A)
    leaves = [u.clone().requires_grad_(), v.clone().requires_grad_()]
    phi, psi = torch.autograd.grad(of(sigma, *leaves), leaves)
    assert abs((torch.vdot(u, phi) + torch.vdot(v, psi)).imag) < TIGHT  # the gauge condition

    def close(p, q):
        return torch.outer(XI * u + p, v.conj()) + torch.outer(u, q.conj())

    pq = saddle_pinv(A, sigma.to(A.dtype)) @ torch.cat([phi, psi])
    assert error(close(pq[:m], pq[m:]), truth) < DIFFERENCED
    # p ⊥ u and q ⊥ v, right for real matrices, loses the relative phase of u and v
    p, q = pq[:m] - u * torch.vdot(u, pq[:m]), pq[m:] - v * torch.vdot(v, pq[m:])
    separate = close(p, q)
    phase = 1j * (torch.vdot(u, phi) - torch.vdot(v, psi)).imag / (2 * sigma)
    assert error(separate, truth) > 0.01
    assert error(separate + phase * torch.outer(u, v.conj()), truth) < DIFFERENCED


@every_shape
@top_and_interior
def test_second_order_perturbation_leaves_a_cubic_remainder(shape, k):
    A = matrix(shape)
    t = triplet(A, k)
    sigma, u, v = t
    m = shape[0]
    D = direction(shape)
    K_plus = saddle_pinv(A, sigma)
    s1 = u @ D @ v
    c1 = torch.cat([D @ v - s1 * u, D.mT @ u - s1 * v])
    first = K_plus @ c1
    u1, v1 = first[:m], first[m:]
    s2 = c1 @ first / 2
    c2 = torch.cat([D @ v1 - s1 * u1 - s2 * u, D.mT @ u1 - s1 * v1 - s2 * v])
    second = K_plus @ c2
    assert (saddle(A, sigma) @ second - c2).norm() < TIGHT  # solvable
    u2 = away(second[:m], u) - u * (u1 @ u1) / 2
    v2 = away(second[m:], v) - v * (v1 @ v1) / 2
    # the [u; −v] component of the equation holds as well
    assert (saddle(A, sigma) @ torch.cat([u2, v2]) - c2).norm() < TIGHT

    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    others = [i for i in range(len(S)) if i != k]
    s, a, b = S[others], (U.mT @ D @ v)[others], (Vh @ D.mT @ u)[others]
    within = (sigma * (a**2 + b**2) + 2 * s * a * b) / (2 * (sigma**2 - s**2))
    outside = (D @ v - U @ (U.mT @ D @ v)).square().sum()
    outside = outside + (D.mT @ u - Vh.mT @ (Vh @ D.mT @ u)).square().sum()
    assert error(within.sum() + outside / (2 * sigma), s2) < TIGHT

    def remainder(h, order):
        moved = triplet(A + h * D, k, like=u)
        guess = (
            sigma + h * s1 + order * h**2 * s2,
            u + h * u1 + order * h**2 * u2,
            v + h * v1 + order * h**2 * v2,
        )
        return torch.stack([(x - y).norm() for x, y in zip(moved, guess, strict=True)])

    for order, slope in ((1, 3), (0, 2)):
        observed = torch.log2(remainder(2e-3, order) / remainder(1e-3, order))
        assert (observed - slope).abs().max() < 0.1, (order, observed)


# --- the page ------------------------------------------------------------------------------------


def test_the_page_names_every_test_and_only_tests_that_exist():
    page = (Path(__file__).parents[1] / "docs/errata.md").read_text()
    named = set(re.findall(r"tests/test_errata\.py::(test_\w+)", page))
    defined = {name for name in globals() if name.startswith("test_")}
    assert named <= defined, named - defined
    entries = {name for name in defined if re.match(r"test_A\d\d_", name)}
    assert entries <= named, entries - named
    assert {name[6:8] for name in entries} == {f"{i:02}" for i in range(1, 40)}
