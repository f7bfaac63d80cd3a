"""Drift in training, against dense float64 formulas: the penalty, and the holder."""

import json

import pytest
import torch
from torch import nn

from bulkedge import InputError
from bulkedge.moments import Moments, to_dense
from bulkedge.tune import (
    AdaptedMatrix,
    DriftClip,
    DriftPenalty,
    FullMatrix,
    Monitor,
    full_matrices,
)
from bulkedge.tune import _drift as drift_module
from helpers import some

LIMIT = 0.02


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


class Network(nn.Module):
    """Two layers with the same inputs, one with others, and an embedding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 24)
        self.q, self.k = nn.Linear(24, 20), nn.Linear(24, 16)
        self.out = nn.Linear(20, 18)

    def forward(self, ids):
        x = self.table(ids) * torch.linspace(3, 0.1, 24)
        return self.out(self.q(x).relu()), self.k(x)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return Network().double().requires_grad_(False)


@pytest.fixture(scope="module")
def moments(network):
    ids = torch.arange(30).repeat(4)[torch.randperm(120)][:100].reshape(10, 10)
    with Moments(network) as found, torch.no_grad():
        network(ids)
    return found


def acting(network, name):
    weight = network.get_submodule(name).weight
    return weight.T if name == "table" else weight


def adapted(network, name, rank=3, strength=1.0, dtype=torch.float64):
    W0 = acting(network, name)
    m, n = W0.shape
    A, B = draw(rank, n, seed=1, dtype=dtype), strength * draw(m, rank, seed=2, dtype=dtype)
    return AdaptedMatrix(name, W0, A.requires_grad_(), B.requires_grad_(), lambda: 0.5)


def power(W0, moment):
    """``tr(W0 C W0ᵀ)``, with everything formed."""
    C = to_dense(moment).double()
    return float((W0.double() @ C @ W0.double().mT).trace())


def dense_drift(matrix, moment, output):
    """The definition, with everything formed."""
    D = matrix.scale * matrix.B.double() @ matrix.A.double()
    return (D @ to_dense(moment).double() @ D.mT).trace() / output


FORMS = {
    "dense": lambda moments: moments,
    "sketch": lambda moments: moments.sketched(24),
    "low_rank": lambda moments: moments.sketched(5),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", [["q", "k", "out"], ["table"]])
def test_the_penalty_is_the_sum_of_the_dense_ratios(network, moments, names, form):
    known = FORMS[form](moments)
    matrices = [adapted(network, name) for name in names]
    exact = sum(
        dense_drift(x, known[x.name].moment, power(acting(network, x.name), moments[x.name].moment))
        for x in matrices
    )
    (0.3 * exact).backward()
    expected = [x.grad.clone() for matrix in matrices for x in matrix.parameters]
    for matrix in matrices:
        for x in matrix.parameters:
            x.grad = None
    penalty = DriftPenalty(matrices, known, weight=0.3)
    value = penalty()
    value.backward()
    assert float(value.detach()) == pytest.approx(0.3 * float(exact.detach()), rel=1e-10)
    found = [x.grad for matrix in matrices for x in matrix.parameters]
    for got, want in some(zip(found, expected, strict=True)):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_one_product_with_the_moment_a_layer(network, moments, monkeypatch):
    calls = []
    times = drift_module.Shared.times
    monkeypatch.setattr(
        drift_module.Shared, "times", lambda self, A: calls.append(A.shape) or times(self, A)
    )
    penalty = DriftPenalty([adapted(network, name) for name in ("q", "k")], moments)
    penalty().backward()
    assert calls == [(3, 24), (3, 24)]


def test_layers_with_the_same_inputs_share_their_moment(network, moments):
    penalty = DriftPenalty([adapted(network, name) for name in ("q", "k", "out")], moments)
    first, second, other = (layer.moment for layer in penalty._layers)
    assert first is second
    assert other is not first


def test_a_weight_may_follow_a_schedule(network, moments):
    penalty = DriftPenalty([adapted(network, "q")], moments, weight=lambda step: float(step))
    assert [float(penalty().detach()) > 0 for _ in range(3)] == [False, True, True]
    again = DriftPenalty([adapted(network, "q")], moments, weight=lambda step: float(step))
    again.load_state_dict(json.loads(json.dumps(penalty.state_dict())))
    assert again.calls == 3
    (drift,) = penalty.values().values()
    assert float(penalty().detach()) == pytest.approx(3 * drift)


def test_weights_that_are_trained_in_full(network, moments):
    model = nn.Sequential()
    model.add_module("q", nn.Linear(24, 20).double())
    model.q.weight.data.copy_(network.q.weight)
    with pytest.warns(UserWarning, match=r"1 layer with a bias that is trained.* q.weight"):
        penalty = DriftPenalty(full_matrices(model), moments)
    assert float(penalty().detach()) == 0
    with torch.no_grad():
        model.q.weight += draw(20, 24)
    value = penalty()
    value.backward()
    W, W0, C = model.q.weight.detach(), network.q.weight, moments["q"].moment
    D = W - W0
    output = (W0 @ C @ W0.mT).trace()
    assert float(value.detach()) == pytest.approx(float((D @ C @ D.mT).trace() / output), rel=1e-10)
    torch.testing.assert_close(model.q.weight.grad, 2 * D @ C / output)


class Conv1D(nn.Module):
    """The layer of transformers that stores its weight as (in, out)."""

    def __init__(self, n, m):
        super().__init__()
        self.weight = nn.Parameter(draw(n, m, seed=5))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("m", [24, 14])
def test_a_weight_that_is_stored_transposed(m):
    model = nn.Sequential(Conv1D(24, m))
    with Moments(model) as moments, torch.no_grad():
        model(draw(200, 24) * torch.linspace(3, 0.1, 24).double())
    matrices = full_matrices(model)
    monitor = Monitor(matrices, moments=moments, top_k=2)
    W0 = model[0].weight.detach().clone().mT
    with torch.no_grad():
        model[0].weight += draw(24, m, seed=6) * torch.linspace(0, 0.5, 24).double()[:, None]
    monitor.check()
    D, C = model[0].weight.detach().mT - W0, moments["0"].moment
    right = float((D @ C @ D.mT).trace() / (W0 @ C @ W0.mT).trace())
    assert monitor.metrics()["bulkedge/highest_drift"] == pytest.approx(right, rel=1e-6)
    assert matrices[0].shape == (m, 24)
    DriftPenalty(matrices, moments)().backward()
    grad = 2 * (D @ C).mT / (W0 @ C @ W0.mT).trace()
    torch.testing.assert_close(model[0].weight.grad, grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e20, 1e-20])
def test_factors_of_very_different_sizes(network, moments, size):
    matrix = adapted(network, "q")
    want = DriftPenalty([matrix], moments)
    want().backward()
    B, A = (x.detach() for x in matrix.parameters)
    uneven = [x.float().requires_grad_() for x in (B * size, A / size)]
    W0 = network.q.weight.float()
    other = AdaptedMatrix("q", W0, uneven[1], uneven[0], lambda: 0.5)
    found = DriftPenalty([other], moments)
    found().backward()
    assert found.values()["q"] == pytest.approx(want.values()["q"], rel=1e-5)
    for x, y, by in zip(uneven, matrix.parameters, (size, 1 / size), strict=True):
        torch.testing.assert_close(x.grad.double() * by, y.grad, rtol=1e-4, atol=1e-6)
    DriftClip([other], moments, LIMIT).step()
    assert found.values()["q"] == pytest.approx(LIMIT, rel=1e-5)


# -- the holder -----------------------------------------------------------------------------------


def drift_of_q(matrix, network, moments):
    moment = moments["q"].moment
    return float(dense_drift(matrix, moment, power(network.q.weight, moment)).detach())


def clip_of(network, moments, name="q", limit=LIMIT, **options):
    matrix = adapted(network, name, **options)
    return matrix, DriftClip([matrix], moments, limit)


@pytest.mark.parametrize("name", ["q", "out", "table"])
@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_nearest_update_of_its_row_space(network, moments, name, rank, form):
    """The conditions that hold at the nearest point of a convex set, and nowhere else."""
    known = FORMS[form](moments)
    matrix, clip = clip_of(network, known, name, rank=rank)
    before = (matrix.scale * matrix.B @ matrix.A).detach()
    rows = torch.linalg.qr(matrix.A.detach().mT).Q
    assert clip.step() == 1
    after = (matrix.scale * matrix.B @ matrix.A).detach()
    C = to_dense(known[name].moment)
    output = known[name].output
    assert float((after @ C @ after.mT).trace()) / output == pytest.approx(LIMIT, rel=2e-6)
    torch.testing.assert_close(after @ rows @ rows.mT, after)  # the row space is its own
    change, normal = (before - after) @ rows, after @ C @ rows
    multiplier = float((change * normal).sum() / normal.square().sum())
    assert multiplier > 0
    torch.testing.assert_close(change, multiplier * normal, rtol=1e-6, atol=1e-9)
    assert clip.step() == 0


def test_scaling_would_move_the_weights_more_and_the_outputs_less(network, moments):
    matrix = adapted(network, "q", rank=6)
    with torch.no_grad():  # two rows along each third of the inputs, which are of falling size
        matrix.A.mul_(torch.eye(3).repeat_interleave(8, 1).repeat_interleave(2, 0))
    clip = DriftClip([matrix], moments, drift_of_q(matrix, network, moments) / 4)
    before = (matrix.scale * matrix.B @ matrix.A).detach()
    C, scaled = moments["q"].moment, before / 2
    clip.step()
    after = (matrix.scale * matrix.B @ matrix.A).detach()
    assert float((before - after).norm()) < 0.9 * float((before - scaled).norm())
    outputs = [float(((before - x) @ C @ (before - x).mT).trace()) for x in (after, scaled)]
    assert outputs[0] > outputs[1]


def test_what_is_below_its_limit_is_not_touched(network, moments):
    matrices = [adapted(network, "q"), adapted(network, "out", strength=1e-3)]
    kept = [x.clone() for x in matrices[1].parameters]
    clip = DriftClip(matrices, moments, LIMIT)
    assert clip.step() == clip.clipped == 1
    assert clip.drift["q"] > LIMIT > clip.drift["out"] > 0
    assert all(torch.equal(a, b) for a, b in zip(kept, matrices[1].parameters, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [1e-6, 0.02, 0.5])
def test_the_stored_factors_obey(network, moments, dtype, limit):
    matrix, clip = clip_of(network, moments, rank=4, dtype=dtype, limit=limit)
    clip.step()
    drift = drift_of_q(matrix, network, moments)
    assert 0.9 * limit < drift <= limit * (1 + 1e-9)


@pytest.mark.parametrize("which", "BA")
def test_a_frozen_factor_stays(network, moments, which):
    matrix, clip = clip_of(network, moments)
    frozen = matrix.parameters["BA".index(which)].requires_grad_(False)
    kept = frozen.clone()
    clip.step()
    assert torch.equal(frozen, kept)
    drift = drift_of_q(matrix, network, moments)
    assert drift == pytest.approx(LIMIT, rel=2e-6)


def test_rows_of_A_that_depend_on_each_other(network, moments):
    matrix, clip = clip_of(network, moments, rank=4)
    with torch.no_grad():
        matrix.A[3] = matrix.A[2]
        matrix.A[1] = 0
    clip.step()
    drift = drift_of_q(matrix, network, moments)
    assert drift == pytest.approx(LIMIT, rel=2e-6)


def test_tied_updates_are_all_held(network, moments):
    """Two layers of one shape with the same two factors, and moments of their own."""
    one = adapted(network, "q", strength=0.2)
    two = AdaptedMatrix("out", draw(20, 24), one.A, one.B, lambda: 0.5)
    one._base, two._base = draw(20, 24, seed=5), draw(20, 24, seed=6)
    inputs = {"q": draw(50, 24, seed=7), "out": draw(50, 24, seed=8) * torch.linspace(4, 0.1, 24)}
    layers = nn.ModuleDict({name: nn.Linear(24, 20, bias=False).double() for name in inputs})
    layers["q"].weight.data.copy_(one._base)
    layers["out"].weight.data.copy_(two._base)
    with Moments(layers) as known, torch.no_grad():
        for name, x in inputs.items():
            layers[name](x)
    clip = DriftClip([one, two], known, LIMIT)
    assert clip.step() == 2
    for matrix in (one, two):
        moment = known[matrix.name].moment
        drift = dense_drift(matrix, moment, power(matrix.base, moment))
        assert float(drift.detach()) <= LIMIT * (1 + 1e-9)


def test_a_state_goes_on(network, moments):
    _, clip = clip_of(network, moments)
    clip.step()
    _, again = clip_of(network, moments)
    again.load_state_dict(json.loads(json.dumps(clip.state_dict())))
    assert again.drift == clip.drift
    _, other = clip_of(network, moments, "out")
    with pytest.raises(InputError, match="only one side has"):
        other.load_state_dict(clip.state_dict())


def test_what_has_diverged_is_named(network, moments):
    matrix, clip = clip_of(network, moments)
    with torch.no_grad():
        matrix.B.mul_(1e9)
    with pytest.raises(InputError, match=r"q: expected a drift that can be lowered to its limit"):
        clip.step()
    with torch.no_grad():
        matrix.B[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"q: expected finite factors, got NaN"):
        clip.step()


def test_two_frozen_factors_beyond_the_limit(network, moments):
    A, B = draw(2, 24, seed=1), draw(20, 2, seed=2).requires_grad_()
    first = AdaptedMatrix("q", network.q.weight, A, B)
    other = AdaptedMatrix("k", network.k.weight, A, draw(16, 2, seed=3).requires_grad_())
    B.requires_grad_(False)
    other.parameters[0].requires_grad_(True)
    A.requires_grad_(True)
    with pytest.raises(InputError, match="expected a factor that is trained and its own"):
        DriftClip([first, other], moments, 1e-3).step()


# -- moments and models that do not fit -----------------------------------------------------------


def test_moments_of_the_bare_model_fit_one_with_a_head(network, moments):
    full = DriftPenalty([adapted(network, "q")], moments).values()["q"]
    inside = adapted(network, "q")
    inside.name = "base_model.model.bert.q"
    (found,) = DriftPenalty([inside], moments).values().values()
    assert found == pytest.approx(full)


def test_moments_that_do_not_fit(network, moments):
    other = AdaptedMatrix("q", draw(20, 24), draw(2, 24), draw(20, 2))
    with pytest.raises(InputError, match="q: expected moments of this model, got another one's"):
        DriftPenalty([other], moments)
    narrow = AdaptedMatrix("q", draw(20, 23), draw(2, 23), draw(20, 2))
    with pytest.raises(InputError, match="q: expected moments of 23 inputs, got 24"):
        DriftPenalty([narrow], moments)
    missing = AdaptedMatrix("unseen", draw(20, 24), draw(2, 24), draw(20, 2))
    with pytest.raises(InputError, match="unseen: expected moments of its inputs, got none"):
        DriftPenalty([missing], moments)
    with pytest.raises(InputError, match=r"expected moments to be Moments, got 'base\.moments'"):
        DriftPenalty([adapted(network, "q")], "base.moments")


def test_matrices_of_another_kind(moments):
    class Mine:
        name, shape = "q", (20, 24)

        def tuned_map(self):
            """What a monitor asks for."""

    with pytest.raises(InputError, match=r"q: expected an AdaptedMatrix or a FullMatrix, .* Mine"):
        DriftPenalty([Mine()], moments)


def test_a_penalty_of_what_is_frozen(network, moments):
    matrix = adapted(network, "q")
    for x in matrix.parameters:
        x.requires_grad_(False)
    with pytest.raises(InputError, match="q: expected weights that are trained, got frozen ones"):
        DriftPenalty([matrix], moments)()


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), "much", True])
def test_a_limit_is_a_positive_number(network, moments, limit):
    with pytest.raises(InputError, match="expected limit to be positive and finite, got"):
        DriftClip([adapted(network, "q")], moments, limit)


# -- the monitor ----------------------------------------------------------------------------------


def test_a_monitor_has_the_drift_of_each_layer_and_of_all(network, moments):
    matrices = [
        adapted(network, "q"),
        adapted(network, "out", strength=0.1),
        FullMatrix("k", network.k.weight, network.k.weight + 0.1 * draw(16, 24)),
    ]
    monitor = Monitor(matrices, moments=moments, top_k=3)
    monitor.check()
    exact = {
        x.name: float(dense_drift(x, moments[x.name].moment, moments[x.name].output).detach())
        for x in matrices[:2]
    }
    C, W0 = moments["k"].moment, network.k.weight
    D = matrices[2].weight - W0
    exact["k"] = float((D @ C @ D.mT).trace() / (W0 @ C @ W0.mT).trace())
    assert {name: x.drift for name, x in monitor.figures.items()} == pytest.approx(exact)
    outputs = {name: power(acting(network, name), moments[name].moment) for name in exact}
    whole = sum(exact[x] * outputs[x] for x in exact) / sum(outputs.values())
    metrics = monitor.metrics()
    assert metrics["bulkedge/drift"] == pytest.approx(whole)
    assert metrics["bulkedge/highest_drift"] == pytest.approx(max(exact.values()))
    assert "bulkedge/drift" not in Monitor(matrices, top_k=3).metrics()
    again = Monitor(matrices, moments=moments, top_k=3)
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert again.metrics()["bulkedge/drift"] == metrics["bulkedge/drift"]


def test_a_layer_whose_drift_is_not_known_is_in_no_figure(network, moments):
    matrices = [adapted(network, "q"), adapted(network, "out")]
    before = Monitor(matrices, every=1, top_k=2)
    before.check()
    resumed = Monitor(matrices, every=1, per_call=1, top_k=2, moments=moments)
    resumed.load_state_dict(before.state_dict())
    assert "bulkedge/drift" not in resumed.metrics()
    resumed.step()
    (known,) = [x.drift for x in resumed.figures.values() if x.drift is not None]
    assert resumed.metrics()["bulkedge/drift"] == pytest.approx(known)


@pytest.mark.parametrize("setting", [{"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}])
@pytest.mark.parametrize("user", ["clip", "penalty", "monitor"])
def test_a_trained_bias_beside_an_update_is_refused_by_name(setting, user):
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(16, 20))
    with Moments(base) as moments, torch.no_grad():
        base(torch.randn(60, 16))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], **setting))
    with pytest.raises(InputError, match=r"0: expected an update of the weight alone.*bias"):
        {
            "clip": lambda: DriftClip(model, moments, 0.1),
            "penalty": lambda: DriftPenalty(model, moments),
            "monitor": lambda: Monitor(model, moments=moments),
        }[user]()
