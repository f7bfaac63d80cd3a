"""What traces, fakes, batches or compiles a solve: right, or one clear error."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from bulkedge import DegenerateWarning, InputError, spectral_norm
from bulkedge.spectral import Convolution, Rigorous, project_spectral_ball
from bulkedge.triplet import Dense, LowRank, singular_triplet
from cases import gaussian, with_spectrum

A, T = gaussian(6, 5), gaussian(6, 5).flip(0)


def tuned(A):
    return spectral_norm(Dense(A) + LowRank(A[:, :2], A[:2]))


def exact(direction=T):
    U, _, Vt = torch.linalg.svd(A)
    return U[:, 0] @ direction @ Vt[0]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_dual_numbers_around_a_compiled_function():
    """A graph of ``eager`` calls the rule; in any other the tangent would be lost."""
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        norm = torch.compile(spectral_norm, backend=backend)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(A, T)
            if backend == "aot_eager":
                with pytest.raises(InputError, match="no forward mode around a compiled"):
                    norm(dual)
            else:
                tangent = forward_ad.unpack_dual(norm(dual)).tangent
                torch.testing.assert_close(tangent, exact())


@pytest.mark.filterwarnings("ignore")
def test_a_function_compiled_before_a_dual_level_is_refused_within_one():
    torch._dynamo.reset()
    norm = torch.compile(spectral_norm, backend="aot_eager")
    torch.testing.assert_close(norm(A), torch.linalg.matrix_norm(A, 2))
    with (
        forward_ad.dual_level(),
        pytest.raises(InputError, match="no forward mode around a compiled"),
    ):
        norm(forward_ad.make_dual(A, T))
    torch.testing.assert_close(norm(A), torch.linalg.matrix_norm(A, 2))


@pytest.mark.filterwarnings("ignore")
def test_a_second_backward_through_a_compiled_function():
    torch._dynamo.reset()
    norm = torch.compile(spectral_norm, backend="eager")
    X = A.clone().requires_grad_()
    (G,) = torch.autograd.grad(norm(X), X, create_graph=True)
    found = torch.autograd.grad((G * T).sum(), X)[0]
    reference = torch.func.grad(
        lambda A: (torch.func.grad(lambda A: torch.linalg.matrix_norm(A, 2))(A) * T).sum()
    )(A)
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_compiled_forward_mode_warns_of_ties():
    torch._dynamo.reset()
    tied = with_spectrum(6, 5, torch.tensor([2.0, 2.0, 1.0, 0.5, 0.2]))
    move = torch.compile(
        lambda A, T: torch.func.jvp(lambda A: singular_triplet(A, 2).u, (A,), (T,))[1],
        backend="aot_eager",
    )
    with pytest.warns(DegenerateWarning, match="differ by"):
        move(tied, T)


@pytest.mark.filterwarnings("ignore")
def test_forward_over_forward_is_refused_when_compiled():
    torch._dynamo.reset()
    twice = torch.func.jacfwd(torch.func.jacfwd(spectral_norm))
    with pytest.raises(InputError, match=r"jacfwd\(jacrev"):
        torch.compile(twice, backend="eager")(A)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["map", "generator"])
def test_what_one_graph_cannot_hold_is_named(kind):
    torch._dynamo.reset()
    source = torch.Generator()
    norm = tuned if kind == "map" else lambda A: singular_triplet(A, generator=source).sigma[0]
    with pytest.raises(torch._dynamo.exc.Unsupported, match="bulkedge: one graph can hold"):
        torch.compile(norm, backend="eager", fullgraph=True)(A)
    torch.testing.assert_close(torch.compile(norm, backend="eager")(A), norm(A))


def test_a_traced_graph_has_the_numbers_of_any_matrix():
    graph = make_fx(lambda A: spectral_norm(A))(A)
    torch.testing.assert_close(graph(T), torch.linalg.matrix_norm(T, 2))
    with pytest.raises(InputError, match="no reverse mode around a traced function"):
        graph(A.clone().requires_grad_()).backward()
    with pytest.raises(InputError, match="no forward mode around a compiled or traced"):
        torch.func.jvp(graph, (A,), (T,))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # torch's own
def test_a_linearized_function_is_linear():
    value, tangent = torch.func.linearize(spectral_norm, A)
    torch.testing.assert_close(value, torch.linalg.matrix_norm(A, 2))
    for direction in (T, 3 * T, torch.zeros_like(T)):
        torch.testing.assert_close(tangent(direction), exact(direction))


@pytest.mark.parametrize(
    "function", [tuned, lambda A: spectral_norm(Convolution(A.reshape(3, 2, 5), 6))]
)
def test_maps_are_refused_where_tensors_are_traced_or_faked(function):
    with pytest.raises(InputError, match="expected a matrix where torch traces, fakes or batches"):
        make_fx(function)(A)
    with FakeTensorMode() as mode, pytest.raises(InputError, match="expected a matrix where torch"):
        function(mode.from_tensor(A))
    with pytest.raises(InputError, match="expected a map with entries, got one on the meta"):
        function(A.to("meta"))


def test_a_batched_backward_of_a_map_is_refused():
    X = A.clone().requires_grad_()
    t = singular_triplet(Dense(X) + LowRank(X[:, :2], X[:2]))
    u = t.u.square().squeeze()
    with pytest.raises(InputError, match=r"batches tensors .*is_grads_batched"):
        torch.autograd.grad(u, X, torch.eye(6, dtype=u.dtype), is_grads_batched=True)


def test_shapes_and_dtypes_of_fakes_are_those_of_the_real_ones():
    real = singular_triplet(A, 2)
    with FakeTensorMode() as mode:
        fake = singular_triplet(mode.from_tensor(A), 2)
    for name in ("sigma", "u", "v", "residuals", "gaps"):
        a, b = getattr(real, name), getattr(fake, name)
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def test_what_has_to_look_at_numbers_says_so():
    def certified(A):
        return spectral_norm(A, certified=Rigorous()).upper

    def applied(function):
        return lambda A: A * function(A)

    for function, who in ((project_spectral_ball, "project_spectral_ball"), (certified, "a cert")):
        message = f"expected a tensor whose entries {who}.*call it outside, matrix by matrix"
        with pytest.raises(InputError, match=message):
            make_fx(applied(function))(A)
        with pytest.raises(InputError, match=message):
            torch.func.vmap(applied(function))(torch.stack([A, T]))
        with FakeTensorMode() as mode, pytest.raises(InputError, match=message):
            function(mode.from_tensor(A))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_projection_is_the_projection():
    torch._dynamo.reset()
    compiled = torch.compile(project_spectral_ball, backend="eager")
    torch.testing.assert_close(compiled(A), project_spectral_ball(A))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="branches on singular values"):
        torch.compile(lambda A: project_spectral_ball(A), backend="eager", fullgraph=True)(A)
