"""Which weights moments belong to: parts of models, dual encoders, one layer alone."""

import pytest
import torch
from torch import nn

from bulkedge import InputError
from bulkedge.checkpoint import read_header
from bulkedge.moments import Moments, match_weights, width
from helpers import save, weights


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x):
        return self.down(self.up(x))


class Encoder(nn.Sequential):
    def __init__(self, seed=0, blocks=3):
        torch.manual_seed(seed)
        super().__init__(*(Block() for _ in range(blocks)))


class Dual(nn.Module):
    """Two encoders, and a pooler that only one of them has."""

    def __init__(self, query, document):
        super().__init__()
        self.query, self.document = query, document
        self.document.add_module("pooler", nn.Linear(5, 5))

    def forward(self, x):
        return self.query(x) + self.document(x)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = save(tmp_path_factory.mktemp("base") / "model.safetensors", Encoder().state_dict())
    return read_header(path)[0]


def matched(model, tensors, **options):
    with Moments(model, **options) as moments, torch.no_grad():
        model(weights(4, next(iter(moments.collector.widths.values()))))
    layers = moments.layers
    widths = {path: width(layer.moment) for path, layer in layers.items()}
    return match_weights(widths, tensors, lambda path: layers[path].sample)


def test_a_block_of_a_model_is_found_by_its_weights(stored):
    found = matched(Encoder()[1], stored)
    assert found == {"1.up.weight": "up", "1.down.weight": "down"}


def test_one_layer_is_found_by_its_weight(stored):
    assert matched(Encoder()[2].down, stored) == {"2.down.weight": ""}


def test_two_encoders_of_one_base_are_an_error_and_one_of_them_is_not(stored):
    dual = Dual(Encoder(), Encoder())
    with pytest.raises(InputError, match=r"'query.0.up' and 'document.0.up' share one"):
        matched(dual, stored)
    found = matched(dual, stored, exclude="document.*")
    assert found["0.up.weight"] == "query.0.up"
    assert len(found) == 6


def test_an_encoder_of_another_model_is_no_layer_of_the_base(stored):
    found = matched(Dual(Encoder(), Encoder(seed=1)), stored)
    assert set(found.values()) == {f"query.{i}.{x}" for i in range(3) for x in ("up", "down")}


def test_equal_weights_and_other_models_are_told(stored, tmp_path):
    with pytest.raises(InputError, match="no layer of the moments is in the checkpoint: the first"):
        matched(nn.Sequential(nn.Linear(9, 2)), stored)
    same = weights(7, 5)
    path = save(tmp_path / "same.safetensors", {"a.weight": same, "b.weight": same})
    layer = nn.Linear(5, 7)
    with torch.no_grad():
        layer.weight.copy_(same)
    with pytest.raises(InputError, match=r"may be any of 'a.weight', 'b.weight': their weights"):
        matched(layer, read_header(path)[0])
