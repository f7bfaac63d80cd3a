"""Which optimisers a holder is attached to, in whatever wrapper, and which it refuses."""

import inspect

import pytest
import torch

from bulkedge import InputError, tune
from bulkedge.moments import Moments
from bulkedge.tune import (
    AdaptedMatrix,
    AdapterHolder,
    DriftClip,
    OrthonormalFactors,
    RankController,
    SpikeClip,
)

HOLDERS = {
    "SpikeClip": lambda matrices: SpikeClip(matrices, level=1.0, thresholds={"layer": 0.1}),
    "RankController": lambda matrices: RankController(
        matrices, level=1.0, start=2, thresholds={"layer": 0.1}
    ),
    "OrthonormalFactors": OrthonormalFactors,
    "DriftClip": lambda matrices: DriftClip(matrices, moments(), limit_of_drift()),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments():
    """Of inputs in all directions alike, so that drift is a ratio of norms."""
    base = torch.nn.ModuleDict({"layer": torch.nn.Linear(50, 60, bias=False).double()})
    base["layer"].weight.data.copy_(draw(60, 50))
    with Moments(base) as found, torch.no_grad():
        base["layer"](torch.eye(50, dtype=torch.float64))
    return found


def limit_of_drift():
    """At which the norm of the update is 0.1."""
    return 0.01 / float(draw(60, 50).square().sum())


def layer():
    A, B = draw(2, 50, seed=1).requires_grad_(), draw(60, 2, seed=2).requires_grad_()
    return AdaptedMatrix("layer", draw(60, 50), A, B)


def strongest(matrix):
    return float(torch.linalg.matrix_norm((matrix.B @ matrix.A).detach(), 2))


def frobenius(matrix):
    return float((matrix.B @ matrix.A).detach().norm())


class Averaging(torch.optim.SGD):
    """What schedulefree documents: parameters between ``eval()`` and ``train()`` are an average."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.averages = {}

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for x in group["params"]:
                self.averages.setdefault(x, x.clone()).lerp_(x, 0.1)

    @torch.no_grad()
    def eval(self):
        for x, average in self.averages.items():
            x.copy_(average)

    def train(self):
        """Back to the parameters that are trained."""


class Lightning:
    """As Lightning wraps an optimiser: it is ``.optimizer``, and ``step`` goes through."""

    def __init__(self, optimizer):
        self._optimizer = optimizer

    @property
    def optimizer(self):
        return self._optimizer

    def step(self):
        self._optimizer.step()


def prepared(optimizer):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


WRAPPERS = {
    "plain": lambda optimizer: optimizer,
    "accelerate": prepared,
    "lightning": Lightning,
    "both": lambda optimizer: Lightning(prepared(optimizer)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", HOLDERS)
def test_it_holds_through_wrappers(kind, wrapper):
    matrix = layer()
    holder = HOLDERS[kind]([matrix])
    optimizer = WRAPPERS[wrapper](torch.optim.SGD([matrix.A, matrix.B], lr=1.0))
    handle = holder.attach(optimizer)
    limit = 1.0 if kind == "OrthonormalFactors" else 0.1
    for _ in range(3):
        (-(matrix.B @ matrix.A).sum()).backward()
        optimizer.step()
        size = frobenius(matrix) if kind == "DriftClip" else strongest(matrix)
        assert size == pytest.approx(limit, rel=1e-6 if kind == "DriftClip" else 1e-9)
    handle.remove()
    optimizer.step()
    assert strongest(matrix) > 10 * limit


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", HOLDERS)
def test_averages_of_weights_are_refused_by_name(kind, wrapper):
    matrix = layer()
    holder = HOLDERS[kind]([matrix])
    optimizer = WRAPPERS[wrapper](Averaging([matrix.A, matrix.B], lr=1.0))
    with pytest.raises(InputError, match=r"got Averaging: it saves an average .*schedule-free"):
        holder.attach(optimizer)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_those_of_schedulefree_are_refused_by_name(name):
    schedulefree = pytest.importorskip("schedulefree")
    matrix = layer()
    optimizer = getattr(schedulefree, name)([matrix.A, matrix.B], lr=0.1)
    with pytest.raises(InputError, match=f"got {name}: it saves an average"):
        HOLDERS["SpikeClip"]([matrix]).attach(optimizer)


@pytest.mark.parametrize("thing", [object(), None, "adam"])
@pytest.mark.parametrize("kind", HOLDERS)
def test_what_is_no_optimiser_is_refused(kind, thing):
    with pytest.raises(InputError, match=r"expected an optimiser of torch, got \w+; call step\(\)"):
        HOLDERS[kind]([layer()]).attach(thing)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", HOLDERS)
def test_a_second_attachment_is_refused_while_the_first_is_there(kind, wrapper):
    matrix = layer()
    holder, other = HOLDERS[kind]([matrix]), HOLDERS[kind]([matrix])
    optimizer = torch.optim.SGD([matrix.A, matrix.B], lr=1.0)
    handle = holder.attach(WRAPPERS[wrapper](optimizer))
    before = len(optimizer._optimizer_step_post_hooks)
    with pytest.raises(InputError, match=rf"to which this {kind} is not attached yet.*remove\(\)"):
        holder.attach(optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == before
    other.attach(optimizer).remove()
    handle.remove()
    holder.attach(optimizer)


def test_every_holder_is_tried_here():
    found = {
        name
        for name in tune.__all__
        if inspect.isclass(x := getattr(tune, name))
        and issubclass(x, tune.AdapterHolder)
        and not inspect.isabstract(x)
    }
    assert found == set(HOLDERS)


def test_a_holder_that_cannot_begin_is_not_attached():
    """Frozen factors and a spike beyond the limit: the error, and no hook left behind."""
    A, B, other = draw(2, 50, seed=1), draw(60, 2, seed=2), draw(2, 50, seed=3).requires_grad_()
    base = draw(60, 50)
    matrices = [
        AdaptedMatrix("layer", base, A, B.requires_grad_(), lambda: 1.0),
        AdaptedMatrix("tied", base, other, B),
        AdaptedMatrix("free", base, A, draw(60, 2, seed=4)),
    ]
    clip = SpikeClip(matrices, thresholds=dict.fromkeys(("layer", "tied", "free"), 1e-3))
    optimizer = torch.optim.SGD([B, other], lr=1.0)
    with pytest.raises(InputError, match="layer: expected a factor that is trained and its own"):
        clip.attach(optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_a_holder_of_ones_own_is_one_short_class():
    class BoundedNorm(AdapterHolder):
        def step(self):
            for matrix in self.matrices:
                B, A = matrix.factors
                matrix.write(B / max(float(matrix.strengths.norm()), 1), A)

    matrix = layer()
    optimizer = torch.optim.SGD([matrix.A, matrix.B], lr=1.0)
    BoundedNorm([matrix]).attach(optimizer)
    for _ in range(3):
        assert float((matrix.B @ matrix.A).detach().norm()) <= 1 + 1e-12
        (-(matrix.B @ matrix.A).sum()).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", HOLDERS)
def test_one_of_something_else_is_refused(kind):
    other = layer()
    optimizer = torch.optim.SGD([other.A, other.B], lr=1.0)
    with pytest.raises(
        InputError, match=r"which has no trained factor of the 1 matrices, layer am"
    ):
        HOLDERS[kind]([layer()]).attach(optimizer)


@pytest.mark.parametrize("kind", HOLDERS)
def test_one_of_several_that_train_a_model_will_do(kind):
    """Some train A alone."""
    matrix = layer()
    holder = HOLDERS[kind]([matrix])
    optimizer = torch.optim.SGD([matrix.A], lr=1.0)
    holder.attach(optimizer)
    (matrix.B @ matrix.A).sum().backward()
    optimizer.step()
    size = frobenius(matrix) if kind == "DriftClip" else strongest(matrix)
    assert size == pytest.approx(1.0 if kind == "OrthonormalFactors" else 0.1)
