"""Ways in which a fast path once went wrong, or could: one test each."""

import copy
import gc
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from test_derivative import dense_outputs, loss, outputs
from torch.utils.checkpoint import checkpoint

from bulkedge import DegenerateWarning, InputError, spectral
from bulkedge._linmap import Counted
from bulkedge.intruder import certify
from bulkedge.triplet import (
    Auto,
    BlockKrylov,
    Dense,
    DenseSVD,
    GradientAscent,
    Lanczos,
    LowRank,
    Newton,
    Power,
    RayleighQuotient,
    Refined,
    Riemannian,
    Status,
    singular_triplet,
    thin_svd,
    truncate,
)
from cases import MATRICES, gaussian, generator, orthonormal, with_spectrum
from helpers import some

EVERY = [
    Auto(dense_below=4), BlockKrylov(), Lanczos(), Refined(), Power(), Newton(), RayleighQuotient(),
    GradientAscent(), Riemannian(),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_a_warm_start_at_a_lower_triplet_is_left(solver, dtype):
    sigma = torch.cat([torch.tensor([2.0, 1.9]), torch.linspace(1, 0.1, 148)]).to(dtype)
    before = singular_triplet(torch.diag(sigma))
    sigma[1] = 2.5
    found = singular_triplet(torch.diag(sigma), init=(before.u, before.v), solver=solver)
    assert float(found.sigma) == pytest.approx(2.5, rel=1e-5)


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_many_lower_vectors_as_a_start(solver):
    A = with_spectrum(90, 80, torch.linspace(3, 1, 80))
    U, _, Vt = torch.linalg.svd(A, full_matrices=False)
    k = 1 if isinstance(solver, GradientAscent) else 2
    found = singular_triplet(A, k, init=(U[:, 20:30], Vt[20:30].mT), solver=solver)
    torch.testing.assert_close(found.sigma, torch.linalg.svdvals(A)[:k], rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_the_exact_answer_as_a_start(solver):
    A = gaussian(200, 150)
    U, S, Vt = torch.linalg.svd(A, full_matrices=False)
    strict = not isinstance(solver, GradientAscent)
    found = singular_triplet(A, init=(U[:, :1], Vt[:1].mT), solver=solver, strict=strict)
    assert float(found.sigma) == pytest.approx(float(S[0]), rel=1e-9)


@pytest.mark.parametrize("relative_gap", [2e-6, 5e-6, 1e-5, 2e-5, 1e-4])
@pytest.mark.parametrize("n", [120, 250])
def test_a_pair_too_close_for_float32_is_told_apart_or_warned_of(n, relative_gap):
    for seed in range(4):
        rest = torch.linspace(0.5, 0.01, n - 2).double()
        sigma = torch.cat([torch.tensor([1 + relative_gap, 1]).double(), rest])
        A = with_spectrum(n + 20, n, sigma, seed).float()
        reference = torch.func.grad(loss(dense_outputs))(A.double())
        for solver in (None, Auto(dense_below=4), Lanczos(), BlockKrylov()):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                ours = torch.func.grad(loss(outputs))(A, solver=solver).double()
            error = float((ours - reference).norm() / reference.norm())
            assert error < 2e-2 or DegenerateWarning in [w.category for w in caught], (
                seed,
                solver,
                error,
            )


def test_multiple_values_are_all_found():
    for multiplicity, k in ((8, 6), (3, 3), (2, 4)):
        rest = torch.linspace(0.47, 0.01, 120 - multiplicity)
        A = with_spectrum(130, 120, torch.cat([torch.ones(multiplicity), rest]))
        expected = torch.linalg.svdvals(A)[:k]
        for solver in (Lanczos(), BlockKrylov(), Refined(), Auto(dense_below=4)):
            found = singular_triplet(A, k, solver=solver)
            torch.testing.assert_close(found.sigma, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("rank", [1, 5])
def test_more_triplets_than_rank(rank, dtype):
    A = (gaussian(400, rank) @ gaussian(rank, 300)).to(dtype)
    found = singular_triplet(A, rank + 2)
    assert found.status is Status.CONVERGED
    assert found.rank == rank
    torch.testing.assert_close(
        found.sigma[:rank].double(), torch.linalg.svdvals(A.double())[:rank], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("size", [12, 250])
def test_cotangents_of_any_size(factor, size):
    A = gaussian(size + 5, size).float()

    def scaled(factor):
        return torch.func.grad(lambda A: factor * sum(outputs(A, 2)[1].flatten()[:3]))(A)

    torch.testing.assert_close(scaled(factor) / factor, scaled(1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_cotangents_that_are_not_finite_come_out_not_finite(bad):
    """What a gradient scaler waits for, to skip the step."""
    A = gaussian(12, 9).requires_grad_()
    (bad * outputs(A)[1].sum()).backward()
    assert not torch.isfinite(A.grad).any()


def test_checkpointing_and_offloading():
    A = gaussian(9, 7).requires_grad_()
    (expected,) = torch.autograd.grad(loss(outputs)(A, 2), A)
    for reentrant in (False, True):
        value = checkpoint(lambda A: loss(outputs)(A, 2), A, use_reentrant=reentrant)
        A.grad = None
        value.backward()
        torch.testing.assert_close(A.grad, expected)
    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.clone(), lambda x: unpacked.append(1) or x
    ):
        value = singular_triplet(A).sigma.sum()
    value.backward()
    assert len(unpacked) == 11  # A, σ, u, v and the decomposition, once each


def test_frozen_weights_cost_no_gradient():
    W0, B, C = gaussian(30, 20), gaussian(30, 2).requires_grad_(), gaussian(2, 20).requires_grad_()
    formed = []
    original = Dense.pullback

    class Watched(Dense):
        def pullback(self, L, R, needs=()):
            gradients = original(self, L, R, needs)
            formed.extend(g for g in gradients if g is not None)
            return gradients

        def with_tensors(self, *tensors):
            return Watched(*tensors)

    loss(outputs)(Watched(W0) + LowRank(B, C), 2).backward()
    assert formed == []
    expected = torch.autograd.grad(loss(dense_outputs)(W0 + B @ C, 2), (B, C))
    torch.testing.assert_close((B.grad, C.grad), expected)


def test_a_map_of_ones_own_is_used():
    class Twice(Dense):
        def matmat(self, X):
            return 2 * super().matmat(X)

        def rmatmat(self, Y):
            return 2 * super().rmatmat(Y)

        def to_dense(self):
            return 2 * super().to_dense()

        def with_tensors(self, *tensors):
            return Twice(*tensors)

    for n in (5, 300):
        assert float(singular_triplet(Twice(torch.eye(n).double())).sigma) == pytest.approx(2)


def test_a_first_call_does_not_load_the_compiler():
    code = (
        "import sys, torch; from bulkedge import singular_triplet\n"
        "A = torch.randn(9, 7, requires_grad=True)\n"
        "singular_triplet(A).u.square()[0].sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_small_gauge_dependence_is_not_rounded_away():
    A = with_spectrum(
        150, 120, torch.cat([torch.tensor([2.0004, 2, 1]), torch.linspace(0.5, 0, 117)])
    )
    target = gaussian(150, 120)

    def mixed(function):
        def value(A):
            _, uv, uu = function(A, 2)
            return uu.sum() + 1e-3 * (uv[..., 0] * target.to(uv)).sum()

        return value

    with pytest.warns(DegenerateWarning, match="differ by 2.0e-04"):
        ours = torch.func.grad(mixed(outputs))(A.float()).double()
    theirs = torch.func.grad(mixed(dense_outputs))(A)
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


def test_loose_triplets_are_warned_of():
    A = gaussian(300, 200).float()
    solver = BlockKrylov(max_steps=8)
    with pytest.warns(DegenerateWarning, match="relative residual"):
        torch.func.grad(loss(outputs))(A, 3, solver=solver, strict=False)


def test_an_outlier_does_not_make_the_others_look_tied():
    sigma = torch.cat([torch.tensor([100.0]), torch.linspace(1, 0.1, 299)])
    A = with_spectrum(300, 300, sigma).float()
    ours = torch.func.grad(loss(outputs))(A, 4).double()  # a warning would be an error
    theirs = torch.func.grad(loss(dense_outputs))(A.double(), 4)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


def test_figures_of_a_batch_are_those_of_its_members():
    small = torch.diag(torch.tensor([1.0, 1e-3, 0, 0, 0, 0, 0, 0]).double())
    batch = torch.stack([1e6 * torch.eye(8).double(), small])
    found = singular_triplet(batch, 2)
    alone = singular_triplet(small, 2)
    torch.testing.assert_close(found.vector_errors[1], alone.vector_errors)
    assert found.rank == alone.rank == 2


def test_the_tangent_of_a_norm_where_vectors_have_none():
    A, direction = torch.ones(6, 5).double(), gaussian(6, 5)
    with pytest.warns(DegenerateWarning, match="theirs is NaN"):
        _, tangent = torch.func.jvp(lambda A: singular_triplet(A, 2).sigma, (A,), (direction,))
    torch.testing.assert_close(tangent[0], direction.sum() / 30**0.5)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_passes_and_residuals_are_the_measured_ones(solver, matrix, monkeypatch):
    products = []
    for name in ("matmat", "rmatmat"):
        for kind in (Dense, type(Dense(torch.ones(1, 1)).to(torch.float64))):
            original = vars(kind).get(name)
            monkeypatch.setattr(
                kind, name, lambda self, X, f=original: products.append(1) or f(self, X)
            )
    A = MATRICES[matrix](90, 70).float()
    found = singular_triplet(A, 4, solver=solver, strict=False)
    assert len(products) == found.passes
    u, v, wide = found.u.double(), found.v.double(), A.double()
    measured = torch.cat([wide @ v - u * found.sigma, wide.mT @ u - v * found.sigma]).norm(dim=0)
    scale = 1e-5 * max(1.0, float(found.sigma[0]))
    torch.testing.assert_close(found.residuals.double(), measured, rtol=0.01, atol=scale)
    floor = torch.linalg.svdvals(wide)[3] * (1 - 1e-6)
    # a tie of float32 is no reason to go on until the limit
    assert not isinstance(solver, Refined) or found.passes < 100
    assert not isinstance(solver, Refined) or found.sigma[-1] >= floor


def test_equal_input_gives_equal_bits():
    A = gaussian(300, 250).float()
    for solver in EVERY:
        strict = not isinstance(solver, GradientAscent)
        a, b = (singular_triplet(A, solver=solver, strict=strict) for _ in "ab")
        assert torch.equal(a.u, b.u)
        assert torch.equal(a.sigma, b.sigma)


def test_results_and_strategies_can_be_copied_and_pickled():
    found = singular_triplet(gaussian(6, 5), 2)
    assert torch.equal(copy.deepcopy(found).u, found.u)
    for strategy in (*EVERY, DenseSVD()):
        assert pickle.loads(pickle.dumps(strategy)) == strategy  # noqa: S301


def test_nothing_is_left_behind():
    A = gaussian(20, 15).requires_grad_()
    W = Dense(A) + LowRank(gaussian(20, 2), gaussian(2, 15))

    def once():
        loss(outputs)(W, 2).backward()

    once()
    gc.collect()
    before = len(gc.get_objects())
    gc.disable()
    try:
        for _ in range(5):
            once()
        assert len(gc.get_objects()) - before < 20
    finally:
        gc.enable()


BAD = {
    "class": ({"solver": BlockKrylov}, "expected solver to be an object such as BlockKrylov"),
    "name": ({"solver": "lanczos"}, "expected solver to be an object"),
    "swapped": ({"adjoint": BlockKrylov()}, "expected adjoint to be an object such as DeflatedCG"),
    "generator": ({"generator": 3}, "expected generator to be a torch.Generator"),
    "float_k": ({"k": 2.0}, "expected 1 ≤ k"),
    "init_matrix": ({"init": torch.ones(4, 3)}, "expected init to be a pair"),
    "init_half": ({"init": (None, torch.ones(3))}, "expected init to be a pair"),
}


@pytest.mark.parametrize("case", BAD)
def test_misuse_gets_one_clear_error(case):
    options, message = BAD[case]
    with pytest.raises(InputError, match=message):
        singular_triplet(torch.ones(4, 3), **options)


def test_odd_tensors_get_one_clear_error():
    with pytest.raises(InputError, match=r"expected a tensor with entries, got .* on meta; to_emp"):
        singular_triplet(torch.empty(3, 3, device="meta"))
    with pytest.raises(InputError, match=r"for a batch of shape \(2, 4, 3\)"):
        singular_triplet(torch.ones(2, 4, 3), init=(torch.ones(4), torch.ones(3)))


SPARSE = {
    "coo": lambda x: x.to_sparse_coo(),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
    "bsr": lambda x: x.to_sparse_bsr((2, 2)),
}
TAKES_A_MATRIX = {
    "singular_triplet": singular_triplet,
    "truncate": lambda A: truncate(A, 1),
    "thin_svd": thin_svd,
    "spectral_norm": spectral.spectral_norm,
    "certified": lambda A: spectral.spectral_norm(A, certified=True),
    "normalize": spectral.normalize,
    "cap": spectral.cap,
    "project": spectral.project_spectral_ball,
    "added": lambda A: Dense(torch.eye(4)) + A,
    "dense": Dense,
    "certify": lambda A: certify(A, torch.eye(4)[:, :1]),
}


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")
@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("function", TAKES_A_MATRIX)
def test_a_sparse_tensor_is_refused_with_the_way_to_go(function, layout):
    for given in some([torch.eye(4), torch.eye(4, dtype=torch.float64)]):
        with pytest.raises(InputError, match=r"torch\.sparse_.*write its products as a LinearMap"):
            TAKES_A_MATRIX[function](SPARSE[layout](given))


@pytest.mark.parametrize("function", [singular_triplet, spectral.normalize, spectral.cap])
def test_a_sparse_batch_is_refused_with_the_way_to_go(function):
    with pytest.raises(InputError, match=r"torch\.sparse_.*write its products as a LinearMap"):
        function(torch.ones(2, 3, 3).to_sparse())


def test_the_order_of_a_generator_is_respected():
    A = gaussian(250, 220)
    a, b = (singular_triplet(A, generator=generator(seed), solver=BlockKrylov()) for seed in (1, 2))
    assert not torch.equal(a.u, b.u)
    torch.testing.assert_close(a.sigma, b.sigma)


def test_vectors_of_a_cluster_span_its_space():
    A = with_spectrum(260, 250, torch.cat([torch.full((3,), 2.0), torch.linspace(1, 0, 247)]))
    found = singular_triplet(A.float(), 3)
    U = orthonormal(260, 250)[:, :3]
    torch.testing.assert_close(found.u.double() @ found.u.double().mT, U @ U.mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("A", [torch.eye(50), torch.eye(300), torch.eye(50).double()], ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_exact_ties_are_warned_of_by_their_gap(A, k):
    with pytest.warns(
        DegenerateWarning, match=r"more triplets \(larger k\)|use a loss of projectors"
    ):
        gradient = torch.func.grad(loss(outputs))(A, k)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("k", [1, 2])
def test_an_orthogonal_matrix_is_told_or_right(k):
    """As layers are initialised: in float32 its values differ by rounding alone."""
    A = orthonormal(40, 40).float()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = torch.func.grad(loss(outputs))(A, k).double()
        reference = torch.func.grad(loss(dense_outputs))(A.double(), k)
    right = float((ours - reference).norm() / reference.norm()) < 1e-2
    assert right or DegenerateWarning in [w.category for w in caught]


def test_a_result_is_a_start_and_unpacks():
    A = gaussian(500, 400)
    last = singular_triplet(A, 2)
    sigma, u, v = last
    assert (sigma is last.sigma, u is last.u, v is last.v) == (True, True, True)
    warm = singular_triplet(A + 1e-6, 2, init=last)
    assert warm.passes < last.passes


def test_a_refinement_that_gives_up_is_counted_and_short():
    """Values that coincide at the cut: no correction can tell the two vectors apart."""
    sigma = torch.tensor([*(2 - 0.1 * i for i in range(7)), 1, 1, *torch.linspace(0.5, 0.01, 41)])
    W = with_spectrum(80, 50, sigma).float()
    counted = Counted(Dense(W))
    found = singular_triplet(counted, k=8, solver=Refined(Lanczos()))
    assert found.passes == counted.passes[0]
    assert found.passes < 500  # one correction, not max_steps of them
    expected = torch.linalg.svdvals(W.double())[:8]
    torch.testing.assert_close(found.sigma.double(), expected, rtol=1e-5, atol=0)
