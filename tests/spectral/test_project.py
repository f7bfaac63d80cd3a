import pytest
import torch
from torch import nn

from bulkedge import InputError
from bulkedge.spectral import hold_spectral_ball, project_spectral_ball
from cases import gaussian, with_spectrum


def norm(weight):
    return float(torch.linalg.matrix_norm(weight.detach(), 2))


def oracle(W, bound):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return (U * S.clamp_max(bound)) @ Vt


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (5, 5), (1, 4)], ids=str)
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.95])
def test_clip_is_the_nearest_point_of_the_ball(shape, quantile):
    W = gaussian(*shape)
    bound = float(torch.quantile(torch.linalg.svdvals(W), quantile))
    torch.testing.assert_close(project_spectral_ball(W, bound), oracle(W, bound))


@pytest.mark.parametrize("n", [40, 600])
def test_a_weight_far_outside_comes_back_exactly(n):
    """A step that overshoots by 1e5: what is left must not be the rounding of what was taken."""
    W = with_spectrum(n, n, torch.cat([torch.tensor([1e5]), torch.linspace(1, 0, n - 1)])).float()
    assert norm(project_spectral_ball(W, 0.5)) <= 0.5 * (1 + 1e-5)


def test_rescale_lies_on_the_ray_and_is_further_away():
    W = gaussian(40, 30)
    clipped, rescaled = (project_spectral_ball(W, 2.0, method) for method in ("clip", "rescale"))
    torch.testing.assert_close(rescaled / W, (rescaled[0, 0] / W[0, 0]).expand_as(W))
    for X in (clipped, rescaled):
        torch.testing.assert_close(torch.linalg.matrix_norm(X, 2), torch.tensor(2.0).double())
    assert (W - clipped).norm() < (W - rescaled).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(60, 40), (700, 600)], ids=str)
@pytest.mark.parametrize("projection", ["clip", "rescale", "held"])
def test_the_norm_exceeds_the_bound_by_rounding_alone(projection, shape, dtype):
    W = (0.3 * gaussian(*shape)).to(dtype)
    if projection == "held":
        weight = nn.Parameter(W.clone())
        hold_spectral_ball(torch.optim.SGD([weight], lr=0.1), 1.0)
        inside = weight.detach()
    else:
        inside = project_spectral_ball(W, 1.0, projection)
    norm, frobenius = (float(torch.linalg.matrix_norm(inside.double(), p)) for p in (2, "fro"))
    solved = 1e-11 if dtype is torch.float64 else 2e-5  # the tolerance of the triplets
    assert norm <= 1.0 + torch.finfo(dtype).eps / 2 * frobenius + solved


@pytest.mark.parametrize("method", ["clip", "rescale"])
def test_inside_the_ball_nothing_moves(method):
    W = gaussian(20, 30)
    norm = float(torch.linalg.matrix_norm(W, 2))
    assert torch.equal(project_spectral_ball(W, 1.01 * norm, method), W)


def test_kernels_and_half_precision():
    kernel = 3 * gaussian(8, 18).view(8, 2, 3, 3).bfloat16()
    projected = project_spectral_ball(kernel, 1.0)
    assert projected.dtype == torch.bfloat16
    assert projected.shape == kernel.shape
    assert float(torch.linalg.matrix_norm(projected.float().flatten(1), 2)) < 1.01


@pytest.mark.parametrize("method", ["clip", "rescale"])
def test_an_optimiser_is_held(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20))
    free = nn.Linear(20, 20)
    optimizer = torch.optim.Adam([*model.parameters(), *free.parameters()], lr=0.1)
    handle = hold_spectral_ball(optimizer, 1.5, parameters=model.parameters(), method=method)
    x = gaussian(64, 30).float()
    for _ in range(20):
        optimizer.zero_grad()
        free(model(x)).square().sum().neg().exp().add(free(model(x)).sum()).backward()
        optimizer.step()
        for layer in (model[0], model[2]):
            assert norm(layer.weight) <= 1.5 * (1 + 1e-4)
    assert norm(free.weight) > 1.6  # and only those it was told of
    handle.remove()
    with torch.no_grad():
        model[0].weight.mul_(10)
    optimizer.step()
    assert norm(model[0].weight) > 10


def test_the_update_of_the_seed_and_the_right_one():
    """docs/errata.md, A38: the raw gradient, then rescaling, can ascend; projection descends."""
    A = with_spectrum(6, 6, torch.tensor([1.0, 0.8, 0.5, 0.3, 0.2, 0.1]))
    U, _, Vt = torch.linalg.svd(A)
    top = torch.outer(U[:, 0], Vt[0])
    gradient = top + 0.5 * (A - top)  # of a linear loss

    def value(X):
        return float((gradient * X).sum())

    step = 1e-3
    raw = project_spectral_ball(A - step * gradient, 1.0, "rescale")
    raw = raw / torch.linalg.matrix_norm(A - step * gradient, 2)  # rescaled onto the sphere
    clipped = project_spectral_ball(A - step * gradient, 1.0)
    assert value(raw) > value(A)
    assert value(clipped) < value(A)


def test_the_weights_are_inside_from_the_start():
    layer = nn.Linear(10, 10)
    with torch.no_grad():
        layer.weight.mul_(10)
    hold_spectral_ball(torch.optim.SGD(layer.parameters(), lr=0.1), 1.0)
    assert norm(layer.weight) == pytest.approx(1, abs=1e-5)


def test_large_matrices_with_few_values_above_need_no_svd(monkeypatch):
    from bulkedge.spectral import project

    W = with_spectrum(700, 600, torch.cat([torch.full((5,), 3.0), torch.linspace(1, 0, 595)]))
    expected = oracle(W, 1.5)
    monkeypatch.setattr(project, "factored", None)
    torch.testing.assert_close(project_spectral_ball(W, 1.5), expected)
    monkeypatch.undo()
    torch.testing.assert_close(project_spectral_ball(W, 0.5), oracle(W, 0.5))


def test_errors():
    layer = nn.Linear(3, 3)
    for nothing in ([nn.Parameter(torch.ones(2, 2))], [layer.bias], []):
        with pytest.raises(InputError, match="weights of at least two dimensions that the optim"):
            hold_spectral_ball(torch.optim.SGD(layer.parameters(), lr=0.1), parameters=nothing)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    hold_spectral_ball(optimizer, parameters=layer.weight)
    layer.weight.grad = torch.full((3, 3), torch.nan)
    with pytest.raises(
        InputError, match=r"parameter 0 of group 0 of shape \(3, 3\): expected finite"
    ):
        optimizer.step()
    with pytest.raises(InputError, match='expected method="rescale" or "clip"'):
        project_spectral_ball(torch.ones(2, 2), 1.0, "shrink")
    with pytest.raises(InputError, match="positive finite bound"):
        hold_spectral_ball(torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1), -1.0)


def test_weights_that_are_held_already_are_refused():
    layers = nn.Linear(20, 10), nn.Linear(10, 5)
    optimizer = torch.optim.SGD([*layers[0].parameters(), *layers[1].parameters()], lr=0.1)
    handle = hold_spectral_ball(optimizer, 2.0, parameters=[layers[0].weight])
    hold_spectral_ball(optimizer, 1.0, parameters=[layers[1].weight])
    message = r"expected weights that hold_spectral_ball does not hold yet, got parameter 0 of grou"
    with pytest.raises(InputError, match=message):
        hold_spectral_ball(optimizer, 2.0, parameters=[layers[0].weight])
    handle.remove()
    hold_spectral_ball(optimizer, 2.0, parameters=[layers[0].weight])
