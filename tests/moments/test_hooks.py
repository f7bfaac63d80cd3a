"""When inputs count: once each, whatever calls the layers, and of the layers that are meant."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bulkedge import InputError, RecipeError
from bulkedge.moments import Moments, to_dense
from helpers import weights


def moment_of(rows):
    return rows.double().mT @ rows.double() / len(rows)


def assert_moment(layer, rows):
    assert layer.count == len(rows)
    torch.testing.assert_close(layer.moment, moment_of(rows), rtol=1e-6, atol=1e-6)


class Pair(nn.Module):
    def __init__(self, width=5):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, attention_mask=None):
        return self.b(self.a(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(reentrant):
    model, x = Pair(), weights(6, 5).requires_grad_()
    with Moments(model) as moments:
        for _ in range(2):
            checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert_moment(moments["a"], torch.cat([x, x]).detach())
    assert moments["b"].count == 12


def test_a_call_that_fails_and_is_tried_again_counts_once():
    class Failing(Pair):
        left = 1

        def forward(self, x):
            x = self.a(x)
            if self.left:
                self.left -= 1
                raise MemoryError
            return self.b(x)

    model, x = Failing(), weights(6, 5)
    with Moments(model) as moments, torch.no_grad():
        try:
            model(x)
        except MemoryError:
            model(x)  # while the first error is handled
    for name in "ab":
        assert moments[name].count == 6
    assert_moment(moments["a"], x)


def test_a_model_that_calls_itself_counts_each_call():
    class Nested(Pair):
        def forward(self, x, again=True):
            return super().forward(self(x, again=False) if again else x)

    model, x = Nested(), weights(6, 5)
    with Moments(model) as moments, torch.no_grad():
        model(x)
        first = Pair.forward(model, x)
    assert moments["a"].count == moments["b"].count == 18
    assert_moment(moments["a"], torch.cat([x, first, x]))


def test_layers_called_without_the_model_do_not_pile_up():
    model = Pair()
    with Moments(model) as moments, torch.no_grad():
        for seed in range(9):
            x = weights(6, 5, seed=seed)
            model.a(x), model.b(x)
        assert len(moments.collector._pass.calls["a"]) == 1
    layers = moments.layers
    assert layers["a"].count == 54
    assert layers["a"].moment is layers["b"].moment


def test_inference_mode_and_none_may_take_turns():
    model, x = Pair(), weights(6, 5)
    with Moments(model) as moments:
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                model(x)
    assert_moment(moments["a"], torch.cat([x, x, x]))
    assert not moments["a"].moment.requires_grad


def test_a_square_batch_takes_the_order_of_others():
    model = Pair()
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0]])  # (batch, length)
    x, y = weights(3, 3, 5), weights(3, 2, 5, seed=1)  # (length, batch)
    with Moments(model) as moments, torch.no_grad():
        model(y, attention_mask=mask[:2])
        model(x, attention_mask=mask)
    assert_moment(moments["a"], torch.cat([y[mask[:2].mT.bool()], x[mask.mT.bool()]]))


@pytest.mark.filterwarnings("ignore:b. each batch had")
def test_a_square_batch_before_the_order_is_known_is_an_error():
    model, mask = Pair(), torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0]])
    with Moments(model), torch.no_grad():
        model(weights(3, 3, 5), attention_mask=mask)
        with pytest.raises(InputError, match="a: the length is in front of the batch, and an "):
            model(weights(3, 2, 5), attention_mask=mask[:2])


def test_square_batches_alone_are_taken_as_batch_first_with_a_warning():
    model, mask = Pair(), torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0]])
    x = weights(3, 3, 5)
    moments = Moments(model)
    moments.__enter__()
    with torch.no_grad():
        model(x, attention_mask=mask)
    with pytest.warns(UserWarning, match="a: each batch had as many texts as tokens; if this "):
        moments.__exit__(None, None, None)
    assert_moment(moments["a"], x[mask.bool()])


class Many(nn.Module):
    """One tensor, of which layers of three kinds make different inputs; and a layer without any."""

    def __init__(self):
        super().__init__()
        self.one, self.three = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 3)
        self.strided = nn.Conv1d(4, 4, 3, stride=2)
        self.line, self.empty = nn.Linear(12, 4), nn.Linear(4, 4)

    def forward(self, x):
        self.one(x), self.three(x), self.strided(x), self.line(x)
        return self.empty(x[:0].mT)


def test_one_tensor_may_be_several_inputs():
    model, x = Many(), weights(2, 4, 12)
    with Moments(model) as moments, torch.no_grad():
        model(x)
    layers = moments.layers
    counts = {"one": 24, "three": 20, "strided": 10, "line": 8}
    assert {name: layer.count for name, layer in layers.items()} == counts
    for name in counts:
        with Moments(model, include=name) as alone, torch.no_grad():
            model(x)
        assert torch.equal(layers[name].moment, alone[name].moment)


def test_weights_in_parametrized_layers_are_measured():
    model = Pair()
    nn.utils.parametrizations.weight_norm(model.a)
    assert Moments(model).collector.unmeasured == []
    model.loose = nn.Parameter(torch.zeros(2, 2))
    assert Moments(model).collector.unmeasured == ["loose"]


class Named(nn.Module):
    """Names that adapters and wrappers have, too."""

    def __init__(self):
        super().__init__()
        self.explora_proj, self.lora_head = nn.Linear(5, 5), nn.Linear(5, 5)
        self.module, self.mybase_layer = Pair(), nn.Linear(5, 5)
        self.a = nn.Linear(5, 5)
        self.base_layer = nn.Linear(5, 5)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def test_ordinary_layers_with_names_of_wrappers_are_kept_apart():
    model = Named()
    with Moments(model) as moments, torch.no_grad():
        model(weights(6, 5))
    assert set(moments.layers) == {
        "explora_proj", "lora_head", "module.a", "b", "mybase_layer", "a", ""
    }  # fmt: skip


def test_layers_are_chosen_by_globs():
    model = Pair()
    with Moments(model, exclude="b") as moments, torch.no_grad():
        model(weights(6, 5))
    assert set(moments.layers) == {"a"}
    with pytest.raises(RecipeError, match="'c' matches no layer with a weight"):
        Moments(model, exclude="c")
    with pytest.raises(RecipeError, match="exclude leaves out all 2 layers"):
        Moments(model, exclude="*")


def test_what_hides_the_inputs_is_refused_by_name():
    model = Pair()
    model.a.weight = nn.Parameter(torch.zeros(5, 5, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="a: its weight is packed; load the model unquantised"):
        Moments(model)
    assert set(Moments(model, include="b").collector.layers) == {"b"}
    with pytest.raises(InputError, match="a: its weight is on the meta device; load the model"):
        Moments(Pair().to("meta"))
    model = Pair()
    model.a._is_replica = True  # as in nn.DataParallel on several GPUs
    with Moments(model), pytest.raises(InputError, match=r"a: runs in a copy by nn.DataParallel"):
        model(weights(2, 5))
    with pytest.raises(InputError, match=r"expected a model before torch\.compile"):
        Moments(torch.compile(Pair(), backend="eager"))


WIDE, RANK = 300, 12


def falling(rows, width):
    return weights(rows, width) * torch.arange(1, width + 1) ** -0.5


@pytest.fixture(scope="module")
def streamed():
    model, x = nn.Sequential(nn.Linear(WIDE, 4), nn.Linear(4, 3)), falling(500, WIDE)
    with Moments(model, rank=RANK, exact_width=100) as moments, torch.no_grad():
        for part in x.split(90):
            model(part)
    return moments, x, model


def test_a_wide_input_is_sketched_while_the_model_runs(streamed):
    moments, x, model = streamed
    total, _ = moments.collector.sums["0"]
    assert total.shape == (WIDE, 3 * RANK + 33)
    C, found = moment_of(x), moments["0"].moment
    torch.testing.assert_close((found.vectors.square() @ found.values + found.rest), C.diagonal())
    loss = float((to_dense(found) - C).norm() / C.norm())
    assert found.loss == pytest.approx(loss, rel=0.25)  # by 32 probes
    values, V = torch.linalg.eigh(C)
    low = C - (V[:, -RANK:] * values[-RANK:]) @ V[:, -RANK:].mT
    best = float((low - torch.diag(low.diagonal())).norm() / C.norm())
    assert best < loss < 2 * best
    weight = model[0].weight.detach().double()
    output = float((x.double() @ weight.mT).square().sum() / len(x))
    assert moments["0"].output == pytest.approx(output, rel=3 * loss)
    assert moments["1"].moment.shape == (4, 4)


def test_streams_of_few_inputs_lose_nothing_but_float32():
    model, x = nn.Linear(WIDE, 4), weights(10, WIDE)
    with Moments(model, rank=RANK, exact_width=100) as moments, torch.no_grad():
        model(x)
    found, C = moments[""].moment, moment_of(x)
    assert float((to_dense(found) - C).norm() / C.norm()) < 1e-3
    assert found.loss < 1e-3


def test_a_rank_makes_sketches_of_what_was_summed_up_exactly():
    model, x = nn.Linear(60, 4), falling(200, 60)
    with Moments(model, rank=8) as moments, torch.no_grad():
        model(x)
    assert moments[""].moment.vectors.shape == (60, 8)
    C = moment_of(x)
    loss = float((to_dense(moments[""].moment) - C).norm() / C.norm())
    assert loss == pytest.approx(moments[""].moment.loss, rel=1e-4)
    with pytest.raises(InputError, match="expected rank ≥ 1, got 0"):
        Moments(model, rank=0)
