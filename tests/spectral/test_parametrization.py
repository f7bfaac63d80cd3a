import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

from bulkedge import InputError
from bulkedge.spectral import Convolution, Probable, Rigorous, spectral_cap
from bulkedge.triplet import singular_triplet
from cases import gaussian, orthonormal
from helpers import some


def norm(weight):
    return float(torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2))


def linear(rows=120, columns=150, scale=1.0, **options):
    layer = nn.Linear(columns, rows)
    with torch.no_grad():
        layer.weight.copy_(scale * gaussian(rows, columns))
    return spectral_cap(layer, **options)


@pytest.mark.parametrize("shape", [(150, 120), (120, 150), (1, 9), (9, 1), (4, 4)], ids=str)
def test_the_first_forward_is_capped_in_either_mode(shape):
    for training in (True, False):
        layer = linear(*shape).train(training)
        assert norm(layer.weight) == pytest.approx(1, abs=1e-4)


def test_it_stays_capped_while_weights_move():
    """Gaussian layers are the hardest: σ₁ and σ₂ lie within a percent."""
    layer = linear(300, 300)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    worst = 0.0
    for step in range(30):
        optimizer.zero_grad()
        (layer.weight * gaussian(300, 300).roll(step, 0).float()).sum().backward()
        optimizer.step()
        worst = max(worst, norm(layer.weight))
    assert worst <= 1 + 1e-4


def test_a_direction_that_the_start_cannot_see_is_found():
    """A spike orthogonal to all that was tracked: the explorer finds it within a few forwards."""
    U, V = orthonormal(200, 40, 1).float(), orthonormal(150, 40, 2).float()
    layer = nn.Linear(150, 200)
    with torch.no_grad():
        layer.weight.copy_((U[:, :39] * torch.linspace(2, 1, 39)) @ V[:, :39].mT)
    spectral_cap(layer)
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original += 3 * torch.outer(U[:, 39], V[:, 39])
    norms = [norm(layer.weight) for _ in range(12)]
    assert norms[-1] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ["block", "buried"])
def test_a_direction_that_overtakes_is_seen_at_once(case, training):
    """What was tracked stays nearly invariant, so its residual tells nothing."""
    U, V = orthonormal(256, 256, 1), orthonormal(256, 256, 2)
    if case == "block":
        W = torch.block_diag(1.5 * gaussian(128, 128), gaussian(128, 128).flip(0))
        change = torch.block_diag(torch.zeros(128, 128), 2 * gaussian(128, 128).flip(0))
    else:
        W = (U * torch.cat([torch.tensor([2.0]), torch.linspace(1, 0.1, 255)])) @ V.mT
        change = 2.2 * torch.outer(U[:, 200], V[:, 200])
    layer = nn.Linear(256, 256)
    with torch.no_grad():
        layer.weight.copy_(W)
    spectral_cap(layer)
    for _ in range(3):
        _ = layer.weight
    layer.train(training)
    with torch.no_grad():
        layer.parametrizations.weight.original += change
    assert norm(layer.weight) == pytest.approx(1, abs=1e-4)


def test_checkpoints_of_torchs_own_load():
    theirs = torch_spectral_norm(nn.Linear(20, 30))
    with torch.no_grad():
        theirs.parametrizations.weight.original.mul_(3)
    ours = spectral_cap(nn.Linear(20, 30), shrink_only=False)
    ours.load_state_dict(theirs.state_dict())
    assert norm(ours.eval().weight) == pytest.approx(1, abs=1e-4)


def test_evaluation_changes_no_state():
    layer = linear().eval()
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    for _ in range(3):
        layer(torch.randn(2, 150, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())
    assert torch.equal(layer.weight, layer.weight)


def test_double_use_in_one_forward():
    """torch's own raises here (pytorch#66363): its buffers change under the saved graph."""
    layer = linear(30, 30)
    x = torch.ones(2, 30)
    layer(layer(x)).sum().backward()
    first = layer.parametrizations.weight.original.grad.clone()
    layer.zero_grad()
    with parametrize.cached():
        assert layer.weight is layer.weight
        layer(layer(x)).sum().backward()
    torch.testing.assert_close(
        layer.parametrizations.weight.original.grad, first, rtol=1e-3, atol=1e-5
    )


def test_cached_solves_once(monkeypatch):
    calls = []
    from bulkedge.spectral import parametrization

    original = parametrization.track
    monkeypatch.setattr(
        parametrization, "track", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    layer = linear(20, 20)
    calls.clear()
    with parametrize.cached():
        layer(layer(torch.ones(1, 20)))
    assert len(calls) == 1


def test_the_gradient_is_that_of_the_dense_formula_to_second_order():
    layer = linear(12, 9, rtol=1e-10).double()
    original = layer.parametrizations.weight.original
    target = gaussian(12, 9)
    x = gaussian(3, 9)

    def penalty(weight):
        y = (x @ weight.mT).tanh().sum()
        return y

    ours = torch.autograd.grad(penalty(layer.weight), original, create_graph=True)[0]
    plain = original.detach().requires_grad_()
    theirs = torch.autograd.grad(
        penalty(plain / torch.linalg.matrix_norm(plain, 2)), plain, create_graph=True
    )[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    second = torch.autograd.grad((ours * target).sum(), original)[0]
    torch.testing.assert_close(
        second, torch.autograd.grad((theirs * target).sum(), plain)[0], rtol=1e-5, atol=1e-5
    )


def test_deepcopy_and_state_dict():
    layer = linear(40, 30)
    other = linear(40, 30, scale=5.0)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight, copy.deepcopy(layer).weight)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, copy.deepcopy(layer).weight)
    assert norm(other.weight) == pytest.approx(1, abs=1e-4)


def test_right_inverse():
    layer = linear(40, 30, bound=2.0)
    small = 0.1 * gaussian(40, 30).float()
    layer.weight = small
    assert torch.equal(layer.weight, small)
    layer.weight = 7 * orthonormal(40, 30).float()
    assert norm(layer.weight) == pytest.approx(2, abs=1e-4)
    parametrize.remove_parametrizations(layer, "weight")
    assert norm(layer.weight) == pytest.approx(2, abs=1e-4)


def test_in_place_of_torchs_own():
    for arguments in [
        (),
        ("weight",),
        ("weight", 1),
        ("weight", 3, 1e-12),
        ("weight", 1, 1e-12, 1),
    ]:
        a, b = nn.Linear(20, 30), nn.Linear(20, 30)
        b.load_state_dict(a.state_dict())
        spectral_cap(a, *arguments, shrink_only=False)
        torch_spectral_norm(b, *arguments)
        for _ in range(60):
            _ = b.weight, a.weight
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-3, atol=1e-4)


def test_transposed_convolutions_flatten_after_their_outputs():
    a = nn.ConvTranspose2d(3, 8, 3)
    spectral_cap(a)
    assert norm(a.weight.movedim(1, 0)) <= 1.0001


@pytest.mark.parametrize("stride", [1, 2])
def test_the_operator_norm_of_a_convolution(stride):
    layer = nn.Conv2d(3, 8, 3, stride=stride, padding=1)
    with torch.no_grad():
        layer.weight.mul_(5)
    reshaped = spectral_cap(copy.deepcopy(layer))
    spectral_cap(layer, input_size=(9, 10))
    operator = Convolution(layer.weight.detach(), (9, 10), stride=stride, padding=1)
    assert float(singular_triplet(operator).sigma) == pytest.approx(1, abs=1e-4)
    other = Convolution(reshaped.weight.detach(), (9, 10), stride=stride, padding=1)
    assert abs(float(singular_triplet(other).sigma) - 1) > 0.01
    layer(torch.ones(1, 3, 9, 10)).sum().backward()
    assert torch.isfinite(layer.parametrizations.weight.original.grad).all()


@pytest.mark.parametrize(
    "certified", [True, Rigorous(), Probable(failure=1e-9, rtol=1e-7)], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_certified_is_at_most_the_bound(certified, dtype):
    for seed in range(5):
        layer = nn.Linear(30, 40, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(gaussian(40, 30).roll(seed, 0))
        spectral_cap(layer, bound=0.7, certified=certified)
        assert norm(layer.weight) <= 0.7
        # and no smaller than rounding and the certificate ask for
        assert norm(layer.weight) >= 0.7 * (1 - 7 * torch.finfo(dtype).eps - 1e-7)


def test_half_precision_weights():
    layer = linear(40, 30).bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    assert norm(layer.weight) <= 1.01
    layer(torch.ones(2, 30, dtype=torch.bfloat16)).sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_compile():
    layer = linear(40, 30)
    x = gaussian(5, 30).float()
    expected = copy.deepcopy(layer)(x)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["good", "of another matrix", "NaN"])
@pytest.mark.parametrize("shape", [(40, 30), (12, 48), (3, 1)])
def test_compiled_steps_are_those_without_a_compiler(shape, start):
    torch.compiler.reset()  # a limit holds for all compiled modules of a process
    eager = linear(*shape, rtol=1e-4)
    cap = eager.parametrizations.weight[0]
    if start != "good":
        other = torch.randn(cap.start.shape, generator=torch.Generator().manual_seed(3))
        cap.start.copy_(torch.linalg.qr(other).Q if start != "NaN" else torch.nan)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = gaussian(5, shape[1]).float()
    for _ in range(3):
        for forward, one in ((eager, eager), (compiled, layer)):
            forward(x).square().sum().backward()
            weight = one.parametrizations.weight.original
            with torch.no_grad():
                weight -= 1e-2 * weight.grad
        ours, theirs = (one.parametrizations.weight for one in (layer, eager))
        torch.testing.assert_close(ours.original.grad, theirs.original.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[0].start, theirs[0].start, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_cap_is_one_operator_of_a_compiled_graph():
    layer, calls = linear(40, 30), []

    def backend(graph, inputs):
        def look(inner, _):
            calls.extend(str(node.target) for node in inner.graph.nodes if node.op != "placeholder")
            return make_boxed_func(inner.forward)

        return aot_autograd(
            fw_compiler=look, bw_compiler=lambda inner, _: make_boxed_func(inner.forward)
        )(graph, inputs)

    torch.compile(layer, fullgraph=True, backend=backend)(gaussian(5, 30).float())
    ours = [call for call in calls if call.startswith("bulkedge")]
    assert ours == ["bulkedge.track.default"]
    assert not any("qr" in call or "svd" in call or "mv" in call for call in calls)


def test_functional_transforms():
    layer = linear(12, 9, rtol=1e-10).double()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = gaussian(4, 9)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).tanh().sum()

    start = layer.parametrizations.weight[0].start.clone()
    name = "parametrizations.weight.original"
    whole = torch.func.grad(loss)(parameters, x)[name]
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)[name]
    torch.testing.assert_close(each.sum(dim=0), whole)
    loss(dict(layer.named_parameters()), x).backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, whole)
    layer.parametrizations.weight[0].start.copy_(start)


def test_a_printed_cap_tells_what_it_is():
    text = repr(spectral_cap(nn.Conv1d(2, 3, 3), bound=2.0, input_size=9, certified=True))
    for part in ("bound=2.0", "operator=(21, 18)", "Rigorous"):
        assert part in text
    assert "shrink_only=False" in repr(spectral_cap(nn.Linear(2, 2), shrink_only=False))


def test_zero_weight_is_capped_to_zero():
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    spectral_cap(layer)
    assert torch.equal(layer.weight, torch.zeros(3, 4))
    layer(torch.ones(1, 4)).sum().backward()
    assert torch.isfinite(layer.parametrizations.weight.original.grad).all()


def test_errors():
    with pytest.raises(InputError, match="expected a parameter 'bias' of at least two dimensions"):
        spectral_cap(nn.Linear(3, 3), "bias")
    with pytest.raises(InputError, match=r"expected a parameter 'nothing' .*got none"):
        spectral_cap(nn.Linear(3, 3), "nothing")
    for bound in (0.0, "1", torch.ones(1)):
        with pytest.raises(InputError, match="positive finite bound"):
            spectral_cap(nn.Linear(3, 3), bound=bound)
    with pytest.raises(InputError, match="expected n_power_iterations ≥ 1 or None, got 0"):
        spectral_cap(nn.Linear(3, 3), "weight", 0)
    with pytest.raises(InputError, match="expected certified to be True or a certificate"):
        spectral_cap(nn.Linear(3, 3), certified="yes")
    with pytest.raises(InputError, match="expected a dim of a 2-dimensional weight, got 2"):
        spectral_cap(nn.Linear(3, 3), dim=2)


def on_meta():
    with torch.device("meta"):
        return nn.Sequential(
            spectral_cap(nn.Linear(20, 30)),
            spectral_cap(nn.Linear(30, 20), shrink_only=False, certified=True),
            spectral_cap(nn.Conv2d(3, 4, 3, padding=1), input_size=(5, 5)),
        )


def test_a_layer_is_built_on_the_meta_device():
    model = on_meta()
    twin = [spectral_cap(nn.Linear(20, 30)), spectral_cap(nn.Linear(30, 20))]
    for layer, real in some(zip(model, twin, strict=False)):
        assert {k: x.shape for k, x in layer.state_dict().items()} == {
            k: x.shape for k, x in real.state_dict().items()
        }
    assert model[0](torch.empty(2, 20, device="meta")).shape == (2, 30)
    assert model[2](torch.empty(1, 3, 5, 5, device="meta")).is_meta
    model[0](torch.empty(2, 20, device="meta")).sum().backward()


@pytest.mark.parametrize("left", [torch.nan, torch.inf, -torch.inf, 1e38, 0.0, 3.0])
@pytest.mark.parametrize("training", [True, False])
def test_what_to_empty_leaves_in_the_start_does_not_matter(left, training):
    model = on_meta().to_empty(device="cpu").train(training)
    for layer, shape in zip(model, ((30, 20), (20, 30), (4, 3, 3, 3)), strict=True):
        cap = layer.parametrizations.weight
        with torch.no_grad():
            cap.original.copy_(gaussian(1, 600)[0, : cap.original.numel()].view(shape))
            cap[0].start.fill_(left)
            layer.bias.zero_()
    for _ in range(2):
        for layer in some(model[:2]):
            assert norm(layer.weight) == pytest.approx(1, abs=1e-4)
        operator = Convolution(model[2].weight.detach(), (5, 5), padding=1)
        assert float(singular_triplet(operator).sigma) == pytest.approx(1, abs=1e-4)
    if training:
        assert all(torch.isfinite(layer.parametrizations.weight[0].start).all() for layer in model)


def test_a_state_dict_goes_into_a_layer_from_the_meta_device():
    source = linear(30, 20, scale=3.0)
    with torch.device("meta"):
        layer = spectral_cap(nn.Linear(20, 30))
    layer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(layer.eval().weight, source.eval().weight)


def test_weights_that_are_not_finite_are_named_and_not_the_start():
    with torch.device("meta"):
        layer = spectral_cap(nn.Linear(20, 30))
    layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.parametrizations.weight.original.fill_(torch.nan)
        layer.parametrizations.weight[0].start.fill_(torch.nan)
    with pytest.raises(InputError, match="expected finite entries, got NaN or Inf"):
        _ = layer.weight


def test_fake_tensors_have_a_cap_of_their_shape():
    with FakeTensorMode():
        layer = spectral_cap(nn.Linear(20, 30))
        assert layer(torch.empty(2, 20)).shape == (2, 30)
        with pytest.raises(InputError, match="entries a certificate can look at"):
            spectral_cap(nn.Linear(20, 30), certified=True)
