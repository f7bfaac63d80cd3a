"""Curvatures of outputs against gradients that autograd gives, token by token."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bulkedge import InputError
from bulkedge.moments import Moments, _losses, output_power, to_dense
from helpers import some, weights


class Net(nn.Module):
    """Attention over the positions that a mask leaves, between linear layers."""

    def __init__(self, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, 4)

    def forward(self, x, attention_mask=None):
        scores = self.q(x) @ self.k(x).mT
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -1e9)
        return self.o(scores.softmax(-1) @ self.v(x)).tanh()


def gradients(model, x, mask=None):
    """``g`` of every token of every layer, one text and one layer at a time, in float64."""
    model, found = model.double(), {}
    for i, rows in enumerate(x.double()):
        text = rows[None] if mask is None else rows[mask[i].bool()][None]
        for name in "qkvo":
            kept = []
            hook = getattr(model, name).register_forward_hook(lambda _m, _x, y, k=kept: k.append(y))
            loss = model(text).square().sum()
            hook.remove()
            (g,) = torch.autograd.grad(loss, kept[0])
            found.setdefault(name, []).append(g[0])
    model.float()
    return {name: torch.cat(parts) for name, parts in found.items()}


def loss_of(model, x, mask=None):
    y = model(x) if mask is None else model(x, attention_mask=mask) * mask[..., None]
    return y.square().sum()


def assert_curvatures(moments, expected, repeats=1):
    for name, g in some(expected.items()):
        layer = moments[name]
        assert layer.gradients == repeats * len(g)
        torch.testing.assert_close(
            to_dense(layer.curvature), g.mT @ g / len(g), rtol=2e-5, atol=1e-7
        )


@pytest.mark.parametrize("frozen", [False, True])
def test_they_are_second_moments_of_the_gradients(frozen):
    model, x = Net(), weights(3 * 5, 6).reshape(3, 5, 6)
    expected = gradients(model, x)
    model.requires_grad_(not frozen)
    with Moments(model, curvatures=True) as moments:
        for rows in x.split(2):
            loss_of(model, rows).backward()
    assert_curvatures(moments, expected)
    torch.testing.assert_close(
        moments["q"].moment.float(), x.reshape(-1, 6).mT @ x.reshape(-1, 6) / 15
    )


def test_padding_does_not_count():
    model, x = Net(), weights(2 * 5, 6).reshape(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with Moments(model, curvatures=True) as moments:
        loss_of(model, x, mask).backward()
    assert_curvatures(moments, gradients(model, x, mask))


def test_calls_without_a_backward_pass_and_without_gradients_add_none():
    model, x = Net(), weights(3 * 5, 6).reshape(3, 5, 6)
    with Moments(model, curvatures=True) as moments:
        loss_of(model, x)  # no backward pass
        with torch.no_grad():
            model(x)
        loss_of(model, x).backward()
    assert_curvatures(moments, gradients(model, x))
    assert moments["q"].count == 45
    with Moments(model) as plain:
        loss_of(model, x).backward()
    assert plain["q"].curvature is None
    assert plain["q"].gradients == 0


def test_gradient_checkpointing():
    class Checkpointed(Net):
        reentrant = False

        def forward(self, x, attention_mask=None):
            return checkpoint(super().forward, x, use_reentrant=self.reentrant)

    model, x = Checkpointed(), weights(3 * 5, 6).reshape(3, 5, 6)
    with Moments(model, curvatures=True) as moments:
        loss_of(model, x.requires_grad_()).backward()
    assert_curvatures(moments, gradients(Net(), x.detach()))
    model.reentrant = True
    with (
        pytest.raises(InputError, match=r"[qkvo]: gradient checkpointing .* use_reentrant=False"),
        Moments(model, curvatures=True),
    ):
        loss_of(model, x).backward()


def test_wide_outputs_and_other_layers_have_none():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 5))
    with Moments(model, curvatures=True, exact_width=7, rank=1) as moments:
        model(torch.arange(9)).sum().backward()
    known = {name: layer.curvature is not None for name, layer in moments.layers.items()}
    assert known == {"0": False, "1": False, "2": True}


def test_gradients_that_are_not_finite_are_named():
    model = Net()
    with (
        pytest.raises(InputError, match="o: expected finite gradients, got NaN or infinity"),
        Moments(model, curvatures=True),
    ):
        (loss_of(model, weights(5, 6)[None]) * float("inf")).backward()


@pytest.fixture(scope="module")
def measured():
    model, x = Net(), weights(3 * 5, 6).reshape(3, 5, 6)
    with Moments(model, curvatures=True) as moments:
        loss_of(model, x).backward()
    return model, moments


def test_files_merges_and_sketches_keep_them(measured, tmp_path):
    model, moments = measured
    with Moments(model, curvatures=True) as others:
        loss_of(model, weights(7, 6, seed=1)[None]).backward()
    both = moments.merge(others, weights=[2, 1])
    one, other = moments["k"], others["k"]
    expected = (30 * one.curvature + 7 * other.curvature) / 37
    torch.testing.assert_close(both["k"].curvature, expected)
    assert both["k"].gradients == 22
    both.save(tmp_path / "a.moments")
    found = Moments.load(tmp_path / "a.moments")
    torch.testing.assert_close(found["k"].curvature, both["k"].curvature, rtol=1e-6, atol=1e-9)
    assert found["k"].gradients == 22
    thin = moments.sketched(2)
    thin.save(tmp_path / "b.moments")
    again = Moments.load(tmp_path / "b.moments")["k"].curvature
    torch.testing.assert_close(to_dense(again), to_dense(thin["k"].curvature))
    with Moments(model) as plain, torch.no_grad():
        model(weights(7, 6)[None])
    with pytest.raises(InputError, match="q: only some of the moments to be merged have curv"):
        moments.merge(plain)


class Output:
    """What a model of transformers returns."""

    def __init__(self, **fields):
        vars(self).update(fields)


def test_losses_have_the_curvatures_that_they_are_for():
    torch.manual_seed(0)
    size, W = (400, 10), torch.randn(3, 5)
    inputs = {"attention_mask": torch.ones(size, dtype=torch.long)}
    inputs["attention_mask"][:, 7:] = 0
    layer = nn.Linear(3, 5, bias=False)
    layer.weight.data = W.mT
    x, generator = torch.randn(3).expand(*size, 3), torch.Generator().manual_seed(0)
    p = (x[0, 0] @ W).softmax(0)
    exact = {_losses.drawn_tokens: p.diag() - torch.outer(p, p), _losses.moved_states: torch.eye(5)}
    for loss, expected in exact.items():

        def network(attention_mask, **_):
            y = layer(x)
            return Output(logits=y, hidden_states=(None, y))

        with Moments(layer, curvatures=True) as moments:
            loss(network, inputs, generator).backward()
        # all positions count here: the layer was called without the model, and its mask
        found = moments[""].curvature.float() * 10 / 7
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_models_have_the_losses_of_their_class():
    classes = {name: type(name, (), {}) for name in ("LlamaForCausalLM", "GPT2LMHeadModel")}
    assert all(_losses.loss_of(x()) is _losses.drawn_tokens for x in classes.values())
    for name in ("BertModel", "BertForMaskedLM"):
        assert _losses.loss_of(type(name, (), {})()) is _losses.moved_states


def test_the_output_of_a_streamed_layer_is_that_of_its_inputs(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 6), nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3))
    x = weights(50, 200)
    with Moments(model, rank=1, exact_width=2) as moments, torch.no_grad():
        model(x[:20])
        with pytest.raises(RuntimeError):
            model(x[:, :7])
        model(x[20:])
    y = (x @ model[0].weight.mT).detach()
    assert moments["0"].output == pytest.approx(float(y.square().sum(dim=1).mean()), rel=1e-5)
    assert moments["0"].moment.loss > 0.1
    sketched = output_power(model[0].weight, moments["0"].moment)
    assert abs(moments["0"].output / sketched - 1) > 1e-3
