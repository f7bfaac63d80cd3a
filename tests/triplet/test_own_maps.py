"""Maps of one's own: derivatives of any order without a rule of their own, and clear errors."""

import pytest
import torch
from torch.autograd import forward_ad

from bulkedge import InputError, singular_triplet, spectral_norm, truncate
from bulkedge._linmap import Counted, Dense, RowScaled
from bulkedge.intruder import certify
from bulkedge.triplet import LinearMap, LowRank
from cases import gaussian, with_spectrum

M, N = 9, 6


class Own(LinearMap):
    """A map with the members that have no default, from a function that forms the matrix."""

    def __init__(self, *tensors):
        self._tensors = tensors
        self.shape = self.formed().shape
        self.dtype, self.device = tensors[-1].dtype, tensors[-1].device

    def matmat(self, X):
        return self.formed() @ X

    def rmatmat(self, Y):
        return self.formed().mT @ Y

    def to_dense(self):
        return self.formed()

    @property
    def tensors(self):
        return self._tensors

    def with_tensors(self, *tensors):
        return type(self)(*tensors)


class Columns(Own):
    def formed(self):
        W0, d = self._tensors
        return W0 * d


class Exponential(Own):
    def formed(self):
        return self._tensors[0].exp()


class Factors(Own):
    def formed(self):
        B, A, gate = self._tensors
        return gate.sigmoid() * (B @ A.tanh())


class ByPullback(Columns):
    """With a pullback of its own, and products without a derivative."""

    def matmat(self, X):
        return (self.formed() @ X).detach()

    def pullback(self, L, R, needs=()):
        W0, d = self._tensors
        G = L @ R.mT
        return G * d, (G * W0).sum(dim=0)


W = with_spectrum(M, N, torch.tensor([3.0, 2.2, 1.5, 1.0, 0.6, 0.3]))
d = 1 + 0.3 * gaussian(N, 1)[:, 0]
OWN = {
    "columns": Columns(W, d),
    "exponential": Exponential(W),
    "factors": Factors(W, gaussian(N, N), d[0]),
    "by its pullback": ByPullback(W, d),
}
HOLDERS = {
    "itself": lambda A: A,
    "sum": lambda A: A + LowRank(gaussian(M, 1), gaussian(1, N), 0.3),
    "scaled": lambda A: -2.0 * A,
    "adjoint": lambda A: A.T,
    "row scaled": lambda A: RowScaled(A, 1 + 0.1 * gaussian(M, 1)[:, 0]),
    "counted": Counted,
    "all": lambda A: (Counted(RowScaled(2 * A, gaussian(M, 1)[:, 0].cos())) - Dense(W)).T,
}


def even(sigma, u, v):
    """A loss of everything that no sign changes."""
    weights = torch.arange(len(u) * len(v)).reshape(len(u), len(v)).to(u).sin()
    return sigma[0] * (weights * (u @ v.mT)).sum() + (sigma * u[0] ** 2).sum()


def by_map(made, tensors, k):
    return even(*singular_triplet(made.with_tensors(*tensors), k))


def by_svd(made, tensors, k):
    dense = made.with_tensors(*tensors).to_dense()
    U, S, Vt = torch.linalg.svd(dense, full_matrices=False)
    return even(S[:k], U[:, :k], Vt[:k].mT)


def tangent(f, x, t):
    return torch.func.jvp(f, (x,), (t,))[1]


def dual(f, x, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


def slope(f, x, t):
    return torch.func.grad(f)(x)


MODES = {
    "jvp": tangent,
    "dual numbers": dual,
    "grad": slope,
    "grad of jvp": lambda f, x, t: torch.func.grad(lambda y: tangent(f, y, t))(x),
    "jvp of grad": lambda f, x, t: tangent(torch.func.grad(f), x, t),
    "jvp of grad of grad": lambda f, x, t: tangent(
        torch.func.grad(lambda y: (torch.func.grad(f)(y) * t).sum()), x, t
    ),
    "vmap of jvp": lambda f, x, t: torch.func.vmap(lambda s: tangent(f, x, s * t))(
        torch.tensor([1.0, -2.0], dtype=x.dtype)
    ),
    "vmap of jvp at several points": lambda f, x, t: torch.func.vmap(
        lambda s: tangent(f, x + s * t, t)
    )(torch.tensor([0.0, 0.01], dtype=x.dtype)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("own", OWN)
def test_derivatives_of_every_mode(own, holder, mode):
    """In the direction of each tensor alone: of a product, the other one is constant."""
    made = HOLDERS[holder](OWN[own])
    for i, x in enumerate(made.tensors):
        t = torch.arange(x.numel()).to(x).cos().reshape(x.shape)

        def at(y, path, i=i):
            return path(made, [*made.tensors[:i], y, *made.tensors[i + 1 :]], 2)

        found = MODES[mode](lambda y: at(y, by_map), x, t)
        expected = MODES[mode](lambda y: at(y, by_svd), x, t)
        atol = 1e-9 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=atol)
