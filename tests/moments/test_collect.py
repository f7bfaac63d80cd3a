"""Sums of inputs against what the layers were called with."""

import pytest
import torch
from torch import nn

from bulkedge import CheckpointError, InputError, RecipeError
from bulkedge.moments import Moments
from bulkedge.moments._inputs import input_rows
from helpers import some


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """Three projections of one input, then one of another; a mask as in transformers."""

    def __init__(self, width=6):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, 4)

    def forward(self, x, attention_mask=None):
        return self.o(torch.tanh(self.q(x) + self.k(x) * self.v(x)))


def moment_of(rows):
    return rows.double().mT @ rows.double() / len(rows)


def test_the_moment_is_that_of_the_inputs():
    model, x = Attention(), draw(3, 5, 6)
    with Moments(model) as moments, torch.no_grad():
        model(x)
        model(2 * x)
    expected = moment_of(torch.cat([x, 2 * x]).reshape(-1, 6))
    for name in "qkv":
        torch.testing.assert_close(moments[name].moment, expected, rtol=1e-6, atol=1e-6)
        assert moments[name].count == 30
    assert moments["o"].count == 30


@pytest.mark.parametrize("how", ["keyword", "position"])
def test_padding_does_not_count(how):
    model, x = Attention(), draw(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    with Moments(model) as moments, torch.no_grad():
        model(x, attention_mask=mask) if how == "keyword" else model(x, mask)
    expected = moment_of(x[mask.bool()])
    torch.testing.assert_close(moments["q"].moment, expected, rtol=1e-6, atol=1e-6)
    assert moments["q"].count == 6


def test_layers_with_the_same_input_share_one_sum(tmp_path):
    model, x = Attention(), draw(3, 5, 6)
    with Moments(model) as moments, torch.no_grad():
        for _ in range(3):
            model(x)
    assert moments["q"].moment is not moments["o"].moment
    layers = moments.layers
    assert layers["q"].moment is layers["k"].moment is layers["v"].moment
    moments.save(tmp_path / "base.moments")
    found = Moments.load(tmp_path / "base.moments").layers
    assert found["q"].moment is found["v"].moment
    torch.testing.assert_close(found["q"].moment, layers["q"].moment, rtol=1e-6, atol=1e-6)


class Choosing(nn.Module):
    """Two layers with one input, then with different ones; and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.twice = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, y=None):
        return self.a(x) + self.b(x if y is None else y) + self.twice(self.twice(x))


def test_layers_whose_inputs_part_ways_are_told_apart():
    model, x, y = Choosing(), draw(4, 3), draw(5, 3, seed=1)
    with Moments(model) as moments, torch.no_grad():
        model(x)
        model(x, y[:4])
        model(x)
        model.b(y)  # not through the model
    a = moment_of(torch.cat([x, x, x]))
    b = moment_of(torch.cat([x, y[:4], x, y]))
    torch.testing.assert_close(moments["a"].moment, a, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments["b"].moment, b, rtol=1e-6, atol=1e-6)
    assert [moments[name].count for name in ("a", "b", "twice")] == [12, 17, 24]


def test_an_input_changed_in_place_is_another_one():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            first = self.a(x)
            x.mul_(2)
            return first + self.b(x)

    model, x = InPlace(), draw(4, 3)
    with Moments(model) as moments, torch.no_grad():
        model(x.clone())
    torch.testing.assert_close(moments["b"].moment, 4 * moments["a"].moment)


CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 4, 3),
    "strided": nn.Conv2d(3, 4, (3, 2), stride=2, padding=1),
    "dilated": nn.Conv2d(2, 4, 3, dilation=2, padding="same"),
    "circular": nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
    "one": nn.Conv1d(3, 4, 5, padding=2, stride=3),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_patches_are_what_a_kernel_is_multiplied_with(kind):
    layer = CONVOLUTIONS[kind]
    x = draw(2, layer.in_channels, *([9] * (layer.weight.ndim - 2)))
    with torch.no_grad():
        y = layer(x)
        rows = input_rows(layer, x, None)
        product = rows @ layer.weight.flatten(1).mT + layer.bias
        expected = y.flatten(2).mT.reshape(-1, 4)
    torch.testing.assert_close(product, expected)
    with Moments(layer) as moments, torch.no_grad():
        layer(x)
    torch.testing.assert_close(moments[""].moment, moment_of(rows), rtol=1e-5, atol=1e-5)


def test_an_embedding_counts_its_indices():
    model = nn.Embedding(5, 3)
    with Moments(model) as moments:
        model(torch.tensor([[0, 1, 1], [4, 1, 0]]))
    assert moments[""].moment.tolist() == pytest.approx([2 / 6, 3 / 6, 0, 0, 1 / 6])


def test_names_are_those_of_the_model_that_peft_has_wrapped():
    peft = pytest.importorskip("peft")
    model = Attention()
    plain = Moments(model)
    x = draw(2, 3, 6)
    with plain, torch.no_grad():
        model(x)
    names = set(plain.layers)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q", "v"], r=2))
    with Moments(wrapped) as moments, torch.no_grad():
        wrapped(x)
    assert set(moments.layers) == names
    for name in some(names):
        torch.testing.assert_close(moments[name].moment, plain[name].moment)


def test_moments_of_several_texts():
    model, x, y = nn.Linear(3, 2), draw(4, 3), draw(8, 3, seed=1)
    one, other, both = Moments(model), Moments(model), Moments(model)
    with torch.no_grad():
        with one, both:
            model(x)
        with other, both:
            model(y)
    torch.testing.assert_close(one.merge(other)[""].moment, both[""].moment)
    weighted = one.merge(other, weights=[2, 1])[""]
    expected = (2 * 4 * one[""].moment + 8 * other[""].moment) / 16
    torch.testing.assert_close(weighted.moment, expected)
    with pytest.raises(InputError, match="expected 2 positive weights"):
        one.merge(other, weights=[1, 0])
    other_model = nn.Linear(3, 2)
    stranger = Moments(other_model)
    with stranger, torch.no_grad():
        other_model(x)
    with pytest.raises(InputError, match="are of different models"):
        one.merge(stranger)


def test_what_cannot_be_measured_is_an_error_with_its_name(tmp_path):
    model = Attention()
    with pytest.raises(InputError, match="expected a model with linear layers"):
        Moments(nn.ReLU())
    with pytest.raises(RecipeError, match="'p' matches no layer with a weight"):
        Moments(model, modules="p")
    with pytest.raises(InputError, match="q: expected finite inputs"), Moments(model):
        model(draw(1, 2, 6) * float("nan"))
    with pytest.raises(InputError, match="q: no inputs of this layer were seen"):
        Moments(model)["q"]
    with pytest.raises(InputError, match="expected layers that have run, got none"):
        Moments(model).save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_moments_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="no moments; collect them again"):
        Moments.load(path)
    model = nn.Linear(3, 2)
    with Moments(model) as moments, torch.no_grad():
        model(draw(4, 3))
    moments.save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | {"moment.0": -torch.eye(3)}, path, metadata)
    with pytest.raises(CheckpointError, match="not a second moment of inputs"):
        Moments.load(path)
    save_file(tensors, path, metadata | {"layers": "[[1]]"})
    with pytest.raises(CheckpointError, match=r"damaged moments \(.*; collect them again"):
        Moments.load(path)


def test_masks_of_ones_and_zeros_in_any_dtype():
    model, x = Attention(), draw(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    for kind in (torch.bool, torch.int64, torch.float32, torch.float16):
        with Moments(model) as moments, torch.no_grad():
            model(x, attention_mask=mask.to(kind))
        assert moments["q"].count == 6


class Both(nn.Module):
    """An encoder, whose mask it takes, and a decoder; or a decoder alone."""

    def __init__(self, encoder=True):
        super().__init__()
        self.encoder = nn.Linear(6, 6) if encoder else nn.Identity()
        self.decoder = nn.Linear(6, 6)

    def forward(self, x, attention_mask=None):
        return self.decoder(self.encoder(x) + 1)


def test_the_mask_of_an_encoder_is_not_that_of_a_decoder():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    for encoder, count in ((True, 8), (False, 6)):
        model = Both(encoder)
        with Moments(model) as moments, torch.no_grad():
            model(draw(2, 4, 6), attention_mask=mask)
        assert moments["decoder"].count == count
        if encoder:
            assert moments["encoder"].count == 6


def test_inference_mode():
    model, x = Attention(), draw(2, 3, 6)
    with Moments(model) as moments, torch.inference_mode():
        model(x)
    torch.testing.assert_close(
        moments["q"].moment, moment_of(x.reshape(-1, 6)), rtol=1e-6, atol=1e-6
    )
