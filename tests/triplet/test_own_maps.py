"""Maps of one's own: derivatives of any order without a rule of their own, and clear errors."""

import pytest
import torch
from torch.autograd import forward_ad

from bulkedge import InputError, singular_triplet, spectral_norm, truncate
from bulkedge._linmap import Counted, Dense, RowScaled
from bulkedge.intruder import certify
from bulkedge.spectral import Probable
from bulkedge.triplet import BlockKrylov, LinearMap, LowRank, Refined
from cases import gaussian, with_spectrum
from helpers import some

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
    if own == "by its pullback" and holder in ("row scaled", "all"):
        pytest.skip("a RowScaled differentiates matmat, too")
    made = HOLDERS[holder](OWN[own])
    for i, x in some(enumerate(made.tensors)):
        t = torch.arange(x.numel()).to(x).cos().reshape(x.shape)

        def at(y, path, i=i):
            return path(made, [*made.tensors[:i], y, *made.tensors[i + 1 :]], 2)

        found = MODES[mode](lambda y: at(y, by_map), x, t)
        expected = MODES[mode](lambda y: at(y, by_svd), x, t)
        atol = 1e-9 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=atol)


class Written(Columns):
    """The same, with products that subclasses get wrong."""

    def matmat(self, X):
        return self._tensors[0] @ (self._tensors[1][:, None] * X)

    def rmatmat(self, Y):
        return self._tensors[1][:, None] * (self._tensors[0].mT @ Y)


class Short(Written):
    def matmat(self, X):
        return super().matmat(X)[:-1]


class ShortTransposed(Written):
    def rmatmat(self, Y):
        return super().rmatmat(Y)[1:]


class Flat(Written):
    def matmat(self, X):
        return super().matmat(X).flatten()


class Narrow(Written):
    def matmat(self, X):
        return super().matmat(X).float()


class NarrowTransposed(Written):
    def rmatmat(self, Y):
        return super().rmatmat(Y).float()


class Elsewhere(Written):
    def rmatmat(self, Y):
        return super().rmatmat(Y).to("meta")


class Lying(Written):
    def to_dense(self):
        return self.formed().mT


class Array(Written):
    def matmat(self, X):
        return super().matmat(X).numpy(force=True)


def by_name(value):
    return getattr(value, "__name__", "")


WRONG_KINDS = {
    Short: r"Short\.matmat to return W X of shape \(30, .*, got shape \(29, ",
    ShortTransposed: r"ShortTransposed\.rmatmat to return Wᵀ Y of shape \(20, .*, got shape \(19, ",
    Flat: r"Flat\.matmat to return W X of shape \(30, .*, got shape \(\d+,\) in",
    Narrow: r"Narrow\.matmat .* in torch\.float64 on cpu, got .* in torch\.float32 on cpu",
    NarrowTransposed: r"NarrowTransposed\.rmatmat .* in torch\.float64 on cpu, .* torch\.float32",
    Elsewhere: r"Elsewhere\.rmatmat .* on cpu, got .* on meta; correct it, or the shape, dtype",
    Lying: r"Lying\.to_dense to return W of shape \(30, 20\) .*, got shape \(20, 30\)",
    Array: r"Array\.matmat .*, got (an object of ndarray|an error: Cannot access data)",
}


def detached(A):
    return A.with_tensors(*(x.detach() for x in A.tensors))


USES = {
    "values": lambda A: singular_triplet(A, 2, solver=BlockKrylov()),
    "values in float32": lambda A: singular_triplet(A, 2, solver=Refined(BlockKrylov())),
    "vectors": lambda A: singular_triplet(A, 2).u[0].pow(2).sum().backward(),
    "norm": lambda A: spectral_norm(A, certified=Probable()),
    "truncation": lambda A: truncate(A, 2).sum().backward(),
    "certificate": lambda A: certify(detached(A), torch.linalg.qr(gaussian(30, 1)).Q),
    "product": lambda A: (A @ gaussian(20, 1), gaussian(1, 30) @ A, A.to_dense()),
    "tangent": lambda A: A.pushforward(*A.tensors).matmat(gaussian(20, 3)),
}
HELD = {
    "itself": lambda A: A,
    "sum": lambda A: A + Dense(gaussian(30, 20)),
    "times": lambda A: 2 * A,
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("kind", "message"), WRONG_KINDS.items(), ids=by_name)
def test_a_product_of_the_wrong_kind_is_named(kind, message, use, held):
    """Wherever it is met: not every use needs all of them."""
    A = HELD[held](kind(gaussian(30, 20), torch.ones(20, dtype=torch.float64, requires_grad=True)))
    if use != "product" and not multiplies(use, kind):
        USES[use](A)
        return
    with pytest.raises(InputError, match=message):
        USES[use](A)


def multiplies(use, kind):
    """Whether a use needs the member that this class gets wrong."""
    member = next(name for name in ("matmat", "rmatmat", "to_dense") if name in vars(kind))
    products = ("matmat", "rmatmat")
    needed = {"values": products, "values in float32": products, "tangent": ("matmat",)}
    return member in needed.get(use, (*products, "to_dense"))


class Detached(Written):
    def matmat(self, X):
        return self._tensors[0] @ (self._tensors[1].detach()[:, None] * X)


class Unrecorded(Written):
    @torch.no_grad()
    def matmat(self, X):
        return super().matmat(X)


class Listed(Written):
    def matmat(self, X):
        return self._tensors[0] @ (torch.tensor(self._tensors[1].tolist()).to(X)[:, None] * X)


class ByNumpy(Written):
    def matmat(self, X):
        return torch.from_numpy(self.formed().numpy(force=True) @ X.numpy(force=True))


class NumpyBefore(Written):
    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.matrix = self.formed().numpy(force=True)

    def matmat(self, X):
        return torch.from_numpy(self.matrix) @ X


class Fixed(Written):
    def with_tensors(self, *tensors):
        return self


UNRECORDED = {
    Detached: r"Detached\.matmat to have a derivative .* got none by tensors\[1\]; write",
    Unrecorded: r"Unrecorded\.matmat to have a derivative .* got none by .*tensors\[1\]; write",
    Listed: r"Listed\.matmat to have a derivative .*; write matmat and with_tensors with torch",
    ByNumpy: r"ByNumpy\.matmat to have a derivative .* an error: .* without detach\(\) or NumPy",
    NumpyBefore: r"NumpyBefore\.with_tensors to make a map of any .* in the products alone",
    Fixed: r"Fixed\.with_tensors to return a map made of the tensors that it is given",
}
WAYS = {
    "backward": lambda f, x: f(x.requires_grad_()).backward(),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: tangent(f, x, x),
    "dual numbers": lambda f, x: dual(f, x, x),
    "vmap of jvp": lambda f, x: torch.func.vmap(lambda x: tangent(f, x, x))(
        torch.stack([x, 2 * x])
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("kind", "message"), UNRECORDED.items(), ids=by_name)
def test_a_product_without_a_derivative_is_named(kind, message, k, way):
    def f(x):
        found = singular_triplet(-2.0 * kind(W, x).T + Dense(W.mT), k)
        return found.sigma.sum() if k == 1 else found.u[0].pow(2).sum()

    if kind is NumpyBefore and way != "backward":
        pytest.skip("no map can be made of such tensors, so there is nothing to multiply")
    with pytest.raises(InputError, match=message):
        WAYS[way](f, d.clone())


class Gated(Written):
    """A map of which one tensor matters only if it is switched on."""

    def matmat(self, X):
        return self._tensors[0] @ X

    def rmatmat(self, Y):
        return self._tensors[0].mT @ Y

    def formed(self):
        return self._tensors[0]


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_that_does_not_matter_has_the_derivative_zero(way):
    """And a constant one needs none."""
    WAYS[way](lambda x: singular_triplet(Gated(W, x)).sigma.sum(), d.clone())
    WAYS[way](lambda x: singular_triplet(Detached(x, d)).sigma.sum(), W.clone())
    assert float(tangent(lambda x: singular_triplet(Gated(W, x)).sigma[0], d, d)) == 0.0


class Halfway(Columns):
    """A pullback that forgets how its result depends on L and R."""

    def pullback(self, L, R, needs=()):
        return tuple(gradient.detach() for gradient in super().pullback(L, R, needs))


class BySparse(Columns):
    """Torch differentiates a sparse product once."""

    def matmat(self, X):
        W0, d = self._tensors
        places = torch.arange(N).expand(2, N)
        diagonal = torch.sparse_coo_tensor(places, d, (N, N), check_invariants=False)
        return W0 @ torch.sparse.mm(diagonal, X)


ONCE = {
    Halfway: r"pullback of Halfway, .* differentiable itself, got a gradient of tensors\[1\]",
    BySparse: r"pullback of BySparse, by default the .* itself, got a gradient of tensors\[1\]",
}


@pytest.mark.parametrize("way", ["jvp", "grad of grad", "jvp of grad", "double backward", "vmap"])
@pytest.mark.parametrize(("kind", "message"), ONCE.items(), ids=by_name)
def test_a_pullback_without_a_derivative_is_named(kind, message, way):
    """The first derivative in reverse mode needs none."""
    if kind is BySparse and way == "vmap":
        pytest.skip("torch has no vmap of a sparse product")

    def f(x):
        return singular_triplet(kind(W, x) + Dense(W), 2).u[0].pow(4).sum()

    def slope_of(x):
        return (torch.func.grad(f)(x) * d).sum()

    def double_backward(x):
        x.requires_grad_()
        (G,) = torch.autograd.grad(f(x), x, create_graph=True)
        G.sum().backward()

    ways = {
        "jvp": lambda x: tangent(f, x, x),
        "grad of grad": torch.func.grad(slope_of),
        "jvp of grad": lambda x: tangent(slope_of, x, x),
        "double backward": double_backward,
        "vmap": lambda x: torch.func.vmap(torch.func.grad(slope_of))(torch.stack([x, 2 * x])),
    }
    dense = torch.func.grad(lambda x: singular_triplet(W * x + W, 2).u[0].pow(4).sum())
    torch.testing.assert_close(torch.func.grad(f)(d), dense(d))
    with pytest.raises(InputError, match=message):
        ways[way](d.clone())


class OneGradient(Columns):
    def pullback(self, L, R, needs=()):
        return (super().pullback(L, R, needs)[1],)


def test_gradients_that_do_not_fit_the_tensors_are_named():
    with pytest.raises(
        InputError, match=r"OneGradient\.pullback to return a gradient, or None, for"
    ):
        torch.func.grad(lambda x: singular_triplet(OneGradient(W, x)).sigma[0])(d)


def test_a_derivative_at_a_tangent_of_zero_is_not_lost():
    """The transpose of forward mode is reverse mode."""

    def value(x):
        return singular_triplet(Columns(W, x)).sigma[0]

    found = torch.func.grad(lambda t: tangent(value, d, t))(torch.zeros_like(d))
    torch.testing.assert_close(found, torch.func.grad(value)(d))
    t = torch.zeros_like(d).requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(tangent(value, d, t), t)[0], found)
