"""Triplets of many weights: right, with honest residuals, and cheap from step to step."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bulkedge import InputError
from bulkedge.triplet import Status
from bulkedge.tune import LeadingTriplets
from cases import orthonormal
from helpers import some


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(weight, found, k, rtol):
    """Every matrix of a batch against its SVD, and its residuals against their definition."""
    W = weight.detach().double()
    S = torch.linalg.svdvals(W)
    u, v, sigma = found.u.double(), found.v.double(), found.sigma.double()
    assert found.sigma.shape == (*weight.shape[:-2], k)
    torch.testing.assert_close(sigma, S[..., :k], rtol=5 * rtol, atol=1e-5)
    left = torch.linalg.vector_norm(W @ v - u * sigma[..., None, :], dim=-2)
    right = torch.linalg.vector_norm(W.mT @ u - v * sigma[..., None, :], dim=-2)
    assert bool((left <= rtol * S[..., :1] + 1e-5).all())
    assert bool((right <= 1e-4 * S[..., :1]).all())
    torch.testing.assert_close(found.residuals.double(), left, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_kinds_of_weights(k, dtype):
    weights = [
        draw(60, 40), draw(40, 60), draw(60, 40, seed=1), draw(4, 30, 50), draw(2, 3, 8, 9),
        draw(96, 64).unflatten(0, (4, -1)), draw(3, 3), torch.zeros(20, 10),
    ]  # fmt: skip
    weights = [weight.to(dtype).requires_grad_() for weight in weights]
    found = LeadingTriplets(weights, k, rtol=1e-3, max_steps=300)()
    for weight, triplets in some(zip(weights, found, strict=True)):
        assert triplets.status is Status.CONVERGED
        check(weight, triplets, k, 1e-3)


def test_a_warm_start_costs_one_iteration_and_misses_no_newcomer():
    """The weight moves a little; then a direction that the block has never seen overtakes all."""
    weight = draw(80, 60) + 30 * orthonormal(80, 1).float() @ orthonormal(60, 1, 1).float().mT
    tracker = LeadingTriplets([weight], rtol=1e-2)
    tracker()
    weight += 1e-3 * draw(80, 60, seed=2)
    assert tracker()[0].steps == 1
    u, v = orthonormal(80, 2, 5)[:, 1:].float(), orthonormal(60, 2, 6)[:, 1:].float()
    weight += 90 * u @ v.mT
    (found,) = tracker()
    check(weight, found, 1, 1e-2)
    assert float((found.u.mT @ u).abs()) > 0.9


def test_where_steps_do_not_suffice_the_status_says_so():
    found = LeadingTriplets([draw(200, 200)], rtol=1e-6, max_steps=2)()[0]
    assert found.status is Status.MAX_STEPS
    assert float(found.residuals[0]) > 1e-6 * float(found.sigma[0])


def test_large_weights_are_not_stacked(monkeypatch):
    monkeypatch.setattr("bulkedge.tune.triplets.STACKED", 100)
    weights = [draw(30, 20), draw(30, 20, seed=1)]
    tracker = LeadingTriplets(weights, rtol=1e-3, max_steps=300)
    assert len(tracker._groups(weights)) == 2
    for weight, found in zip(weights, tracker(), strict=True):
        check(weight, found, 1, 1e-3)


@pytest.mark.parametrize("shape", [(3,), (0, 4), (2, 1, 5)])
def test_what_is_refused(shape):
    with pytest.raises(InputError, match="expected real weights of shape"):
        LeadingTriplets([torch.zeros(shape)], 2)


def test_weights_may_change_dtype_between_calls():
    layers = nn.Sequential(nn.Linear(20, 30), nn.Linear(20, 30))
    tracker = LeadingTriplets([layer.weight for layer in layers], rtol=1e-4, max_steps=300)
    tracker()
    layers.double()
    for layer, found in some(zip(layers, tracker(), strict=True)):
        exact = torch.linalg.svdvals(layer.weight.detach())[0]
        torch.testing.assert_close(found.sigma[0], exact, rtol=1e-6, atol=0)
    layers[0].float()  # no longer of one group
    assert [found.sigma.dtype for found in tracker()] == [torch.float32, torch.float64]


def test_a_function_gives_the_weights_that_a_model_has_now():
    model = nn.Linear(20, 30)
    tracker = LeadingTriplets(lambda: [model.weight], rtol=1e-4, max_steps=300)
    tracker()
    model.load_state_dict({k: 5 * v for k, v in model.state_dict().items()}, assign=True)
    exact = torch.linalg.svdvals(model.weight.detach())[0]
    torch.testing.assert_close(tracker()[0].sigma[0], exact, rtol=1e-6, atol=0)


def test_a_weight_without_numbers_is_named():
    fine, bad = draw(30, 20), draw(30, 20, seed=1)
    tracker = LeadingTriplets([fine, bad])
    bad[3, 3] = torch.nan
    with pytest.raises(InputError, match="weight 1: expected finite entries, got NaN"):
        tracker()
    with pytest.raises(InputError, match="weight 0: expected parameters in memory"):
        LeadingTriplets([torch.empty(3, 3, device="meta")])


def test_a_weight_that_is_spread_is_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        spread = distribute_tensor(draw(30, 20), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(InputError, match="weight 0: expected a whole tensor, got one that is"):
            LeadingTriplets([spread])
    finally:
        dist.destroy_process_group()
