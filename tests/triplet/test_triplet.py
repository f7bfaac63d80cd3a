import math

import pytest
import torch

from bulkedge import ConvergenceError, InputError
from bulkedge.triplet import BlockKrylov, Dense, LowRank, Minres, Status, singular_triplet
from cases import gaussian, nearly_degenerate

BAD = {
    "k_zero": (gaussian(4, 3), 0, "expected 1 ≤ k ≤ 3"),
    "k_too_large": (gaussian(4, 3), 4, "expected 1 ≤ k ≤ 3 for shape .4, 3., got k=4"),
    "empty": (torch.zeros(0, 3), 1, "expected a matrix with entries, got shape .0, 3."),
    "list": ([[1.0]], 1, "expected a torch tensor or a LinearMap, got list"),
    "vector": (torch.zeros(3), 1, r"floating-point matrix, got shape \(3,\)"),
    "half_k": (torch.zeros(3, 3, dtype=torch.float16), 4, "expected 1 ≤ k ≤ 3"),
    "float8": (torch.zeros(3, 3).to(torch.float8_e4m3fn), 1, "floating dtype of at most 64 bits"),
    "integer": (torch.ones(3, 3, dtype=torch.int64), 1, "real floating-point"),
    "empty_batch": (torch.zeros(0, 3, 3), 1, "expected matrices with entries, got shape"),
    "batch_k": (torch.zeros(2, 3, 3), 4, "expected 1 ≤ k ≤ 3"),
    "complex": (torch.zeros(3, 3, dtype=torch.complex64), 1, "real floating-point"),
    "nan": (torch.tensor([[1.0, torch.nan]]), 1, "expected finite entries, got NaN or Inf"),
    "inf": (torch.tensor([[1.0, torch.inf]]), 1, "expected finite entries, got NaN or Inf"),
    "cancelling_infs": (
        torch.tensor([[-torch.inf, torch.inf]]),
        1,
        "expected finite entries, got NaN or Inf",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_error(case):
    A, k, message = BAD[case]
    with pytest.raises(InputError, match=message):
        singular_triplet(A, k)


def test_stopping_short_raises_with_the_partial_result():
    A = nearly_degenerate(200, 200)
    solver = BlockKrylov(max_steps=2)
    with pytest.raises(ConvergenceError, match="raise max_steps") as caught:
        singular_triplet(A, 3, solver=solver)
    partial = singular_triplet(A, 3, solver=solver, strict=False)
    assert partial.status is Status.MAX_STEPS
    assert torch.equal(caught.value.partial.u, partial.u)


def test_input_is_left_alone():
    A = gaussian(30, 20).requires_grad_()
    before = A.detach().clone()
    singular_triplet(A, 2).sigma.sum().backward()
    assert torch.equal(A.detach(), before)


BAD_INIT = {
    "rows": (torch.zeros(4, 1), torch.zeros(3, 1), r"shapes \(5, j\) and \(3, j\)"),
    "columns": (torch.zeros(5, 2), torch.zeros(3, 1), "got v of shape"),
    "none": (torch.zeros(5, 0), torch.zeros(3, 0), "got u of shape"),
    "swapped": (torch.zeros(3), torch.zeros(5), "got u of shape"),
    "dtype": (
        torch.zeros(5, dtype=torch.float64),
        torch.zeros(3),
        "expected init in torch.float32",
    ),
    "device": (torch.zeros(5, device="meta"), torch.zeros(3), "on cpu, got u .* on meta"),
    "nan": (torch.full((5,), torch.nan), torch.full((3,), torch.nan), "finite init"),
}


@pytest.mark.parametrize("case", BAD_INIT)
def test_bad_init_gets_one_clear_error(case):
    u, v, message = BAD_INIT[case]
    with pytest.raises(InputError, match=message):
        singular_triplet(torch.ones(5, 3), init=(u, v))


@pytest.mark.parametrize("shape", [(200, 150), (150, 200)], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_a_warm_start_saves_steps_and_is_left_alone(shape, k):
    A = gaussian(*shape)
    cold = singular_triplet(A, k, solver=BlockKrylov())
    nearby = A + 1e-6 * gaussian(*shape).flip(0)
    u, v = cold.u.clone().requires_grad_(), cold.v.clone().requires_grad_()
    for solver in (None, BlockKrylov()):
        warm = singular_triplet(nearby, k, init=(u, v), solver=solver)
        assert warm.steps < cold.steps
        assert torch.equal(u, cold.u)
        assert torch.equal(v, cold.v)
        torch.testing.assert_close(warm.sigma, torch.linalg.svdvals(nearby)[:k])
        expected = singular_triplet(nearby, k).u
        torch.testing.assert_close(warm.u @ warm.u.mT, expected @ expected.mT)


def test_a_zero_init_is_no_init():
    A = gaussian(40, 30)
    found = singular_triplet(A, init=(torch.zeros(40).double(), torch.zeros(30).double()))
    torch.testing.assert_close(found.sigma, torch.linalg.svdvals(A)[:1])


@pytest.mark.parametrize("shape", [(2, 3, 9, 6), (2, 6, 9), (1, 5, 5)], ids=str)
def test_batches_are_stacks(shape):
    A = torch.stack([gaussian(*shape[-2:]) + i for i in range(math.prod(shape[:-2]))])
    A = A.unflatten(0, shape[:-2])
    found = singular_triplet(A, 2)
    U, S, Vt = torch.linalg.svd(A, full_matrices=False)
    torch.testing.assert_close(found.sigma, S[..., :2])
    torch.testing.assert_close(
        (found.u * found.sigma[..., None, :]) @ found.v.mT,
        (U[..., :2] * S[..., None, :2]) @ Vt[..., :2, :],
    )
    assert found.residuals.shape == found.gaps.shape == found.sigma.shape
    assert found.status is Status.CONVERGED
    torch.testing.assert_close(
        found.vector_errors.max(), found.vector_errors.new_zeros(()), rtol=0, atol=1e-6
    )
    again = singular_triplet(A, 2, init=(found.u, found.v))
    torch.testing.assert_close(again.sigma, found.sigma)
    torch.autograd.gradcheck(lambda A: singular_triplet(A, 2).sigma, A.requires_grad_())


def test_what_a_vmapped_result_does_not_know():
    statuses = []

    def norm(A):
        result = singular_triplet(A)
        statuses.append(result.status)
        return result.sigma

    torch.func.vmap(norm)(torch.stack([gaussian(5, 4)] * 2))
    assert statuses == [Status.DEFERRED]
    with pytest.raises(
        ConvergenceError, match=r"matrix, k=1: largest residual .*: raise max_steps"
    ):
        torch.func.vmap(lambda A: singular_triplet(A, solver=BlockKrylov(max_steps=1)).sigma)(
            torch.stack([nearly_degenerate(50, 40)] * 2)
        )


COMPILED = {
    "default": {},
    "other": {"solver": BlockKrylov(rtol=1e-10), "adjoint": Minres()},
    "block": {"k": 2},
}


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("options", COMPILED)
def test_one_graph_under_compile(options):
    weight = gaussian(6, 5)

    def loss(A):
        t = singular_triplet(A, **COMPILED[options])
        return (t.u.mT @ weight @ t.v).square().sum() + t.sigma.sum()

    A = gaussian(6, 5).flip(0).requires_grad_()
    expected = loss(A)
    (gradient,) = torch.autograd.grad(expected, A)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(A), expected)
    torch.testing.assert_close(torch.autograd.grad(compiled(A), A)[0], gradient)
    torch.testing.assert_close(compiled(A.detach()), expected.detach())


@pytest.mark.filterwarnings("ignore")
def test_errors_come_through_a_compiled_graph():
    compiled = torch.compile(lambda A: singular_triplet(A).sigma, backend="aot_eager")
    with pytest.raises(InputError, match="expected finite entries, got NaN or Inf"):
        compiled(torch.full((4, 3), torch.nan))


@pytest.mark.filterwarnings("ignore")
def test_maps_and_generators_compile_with_a_break():
    source = torch.Generator()

    def norm(W0, B, A):
        tuned = Dense(W0) + LowRank(B, A)
        return singular_triplet(tuned, generator=source).sigma

    arguments = gaussian(6, 5), gaussian(6, 2), gaussian(2, 5)
    compiled = torch.compile(norm, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), norm(*arguments))


def test_the_registered_operators_keep_their_promises():
    from bulkedge.triplet._compiled import op_leading, op_outside_block, token

    A = gaussian(6, 5)
    outputs = op_leading(A, None, 2, token(BlockKrylov()), True)
    torch.library.opcheck(op_leading, (A, None, 2, token(BlockKrylov()), True))
    sigma, u, v, residuals, gaps, _, theta, Z = outputs
    known = sigma, u, v, residuals, gaps, theta, Z, A
    arguments = None, torch.ones_like(u), None, *known, token(Minres()), "nothing", False
    torch.library.opcheck(op_outside_block, arguments)


def test_a_result_prints_shapes_and_figures_but_no_vectors():
    found = singular_triplet(gaussian(300, 200), k=3)
    assert repr(found).startswith("SingularTriplets(sigma=[")
    assert "u=(300, 3), v=(200, 3), residuals≤" in repr(found)
    assert "status=CONVERGED" in repr(found)
    assert len(repr(found)) < 200
    many = singular_triplet(gaussian(30, 20), k=20)
    assert repr(many).count(",") < 20
    assert "…" in repr(many)
    shown = []
    torch.func.vmap(lambda A: shown.append(repr(singular_triplet(A))) or A)(
        gaussian(2, 20).view(2, 5, 4)
    )
    assert "status=DEFERRED" in shown[0]


def test_a_module_is_told_what_to_pass_instead():
    with pytest.raises(InputError, match=r"got Conv2d; pass Convolution\.of\(layer, input_si"):
        singular_triplet(torch.nn.Conv2d(2, 3, 3))
    with pytest.raises(InputError, match=r"got Linear; pass layer\.weight, or use spectral_cap"):
        singular_triplet(torch.nn.Linear(3, 4))
    with pytest.raises(InputError, match=r"got k=2\.0; k must be an integer"):
        singular_triplet(gaussian(4, 3), 2.0)
