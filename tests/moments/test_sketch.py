"""Sketches of second moments, and the output of layers, against dense float64."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bulkedge import CheckpointError, InputError
from bulkedge.moments import Moments, diagonal, right_times, sketch, to_dense, width
from bulkedge.moments import _sketch as module
from helpers import some, weights


def falling(n, seed=0, power=1.0):
    """A second moment whose eigenvalues fall as a power."""
    Q = torch.linalg.qr(weights(n, n, seed=seed, dtype=torch.float64)).Q
    values = torch.arange(1, n + 1, dtype=torch.float64) ** -power
    return (Q * values) @ Q.mT


def best(C, rank):
    """The definition, by a full decomposition."""
    values, V = torch.linalg.eigh(C)
    low = (V[:, -rank:] * values[-rank:]) @ V[:, -rank:].mT
    return low + torch.diag((C - low).diagonal())


@pytest.mark.parametrize("wide", [False, True])
def test_a_sketch_is_the_leading_part_and_the_diagonal_of_the_rest(wide, monkeypatch):
    if wide:  # as of matrices beyond the width that is decomposed in full
        monkeypatch.setattr(module, "DENSE", 10)
    C, rank = falling(120), 12
    found = sketch(C, rank)
    assert found.vectors.shape == (120, 12)
    torch.testing.assert_close(diagonal(found), C.diagonal(), rtol=1e-12, atol=0)
    error = to_dense(found) - C
    assert float(error.norm() / C.norm()) == pytest.approx(found.loss, rel=1e-9)
    least = float((best(C, rank) - C).norm() / C.norm())
    # four steps of iteration leave a hundredth of the least possible loss, a full solve nothing
    assert found.loss == pytest.approx(least, rel=0.01 if wide else 1e-9)
    assert bool((found.rest >= 0).all())
    assert sketch(C, 500).loss < 1e-12


def test_a_wide_sketch_of_few_inputs_loses_nothing(monkeypatch):
    monkeypatch.setattr(module, "DENSE", 10)
    x = weights(5, 120, dtype=torch.float64)
    C = x.mT @ x / 5
    found = sketch(C, 8)
    assert found.loss < 1e-7
    torch.testing.assert_close(to_dense(found), C, rtol=1e-6, atol=1e-6)


def test_every_form_answers_as_its_matrix():
    C, W = falling(30), weights(4, 30)
    for moment in (C, C.diagonal(), sketch(C, 5)):
        dense = to_dense(moment)
        assert width(moment) == 30
        torch.testing.assert_close(diagonal(moment), dense.diagonal())
        torch.testing.assert_close(right_times(W, moment), W.double() @ dense)


def test_sketches_of_what_is_no_moment_are_refused():
    with pytest.raises(InputError, match=r"expected a square second moment, got shape \(2, 3\)"):
        sketch(torch.ones(2, 3), 1)
    with pytest.raises(InputError, match="expected rank ≥ 1, got 0"):
        sketch(torch.eye(3), 0)


WIDTHS = ("words", "up", "flat", "patches")


class Net(nn.Module):
    """Every orientation of a weight."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.words, self.up, self.flat = nn.Embedding(9, 6), nn.Linear(6, 8), Conv1D(5, 8)
        self.patches = nn.Conv1d(5, 3, 2)

    def forward(self, ids):
        x = self.words(ids)
        x = self.flat(self.up(x).tanh())
        self.patches(x.mT)
        return x


@pytest.fixture(scope="module")
def run():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = Net()
    ids = torch.randint(9, (7, 11), generator=torch.Generator().manual_seed(1))
    outputs = dict.fromkeys(WIDTHS, 0.0)

    def keep(layer, _, output):
        name = next(name for name in WIDTHS if getattr(net, name) is layer)
        y = output.mT if name == "patches" else output
        y = y if name == "words" else y - layer.bias
        outputs[name] += float(y.double().square().sum()) / y[..., 0].numel() / 2

    hooks = [getattr(net, name).register_forward_hook(keep) for name in WIDTHS]
    with Moments(net) as moments, torch.no_grad():
        net(ids)
        net(ids.flip(0) // 2)
    for hook in hooks:
        hook.remove()
    return net, moments, outputs


@pytest.mark.parametrize("name", WIDTHS)
def test_the_output_is_the_mean_square_of_what_the_weight_gives(run, name):
    _, moments, outputs = run
    assert moments[name].output == pytest.approx(outputs[name], rel=1e-5)


def test_the_output_is_that_of_the_weight_that_ran():
    model = nn.Linear(3, 2, bias=False)
    x = weights(5, 3)
    with Moments(model) as moments, torch.no_grad():
        y = model(x)
    with torch.no_grad():
        model.weight.zero_()
    assert moments[""].output == pytest.approx(float(y.square().sum() / 5), rel=1e-5)


def test_files_and_merges_keep_output_and_sketches(run, tmp_path):
    _, moments, _ = run
    thin = moments.sketched(4)
    assert thin["words"].moment is moments["words"].moment
    assert thin["up"].output == moments["up"].output
    thin.save(tmp_path / "a.moments")
    found = Moments.load(tmp_path / "a.moments")
    for name, layer in some(thin.layers.items()):
        own = found[name]
        assert (own.count, own.output) == (layer.count, layer.output)
        torch.testing.assert_close(
            to_dense(own.moment), to_dense(layer.moment), rtol=1e-5, atol=1e-6
        )
    assert found["up"].moment.loss == thin["up"].moment.loss
    both = moments.merge(moments, weights=[1, 3])
    assert both["up"].output == pytest.approx(moments["up"].output)


def test_a_mean_of_sketches_bounds_what_it_has_lost():
    one, other = falling(60, seed=1), 3 * falling(60, seed=2, power=0.5)
    exact = 0.25 * one + 0.75 * other
    for parts in ([sketch(one, 8), sketch(other, 6)], [one, sketch(other, 6)]):
        found = module.mean(parts, [0.25, 0.75])
        loss = float((to_dense(found) - exact).norm() / exact.norm())
        assert 0 < loss <= found.loss < 1
        torch.testing.assert_close(diagonal(found), exact.diagonal())
    same = module.mean([sketch(one, 60), sketch(one, 60)], [0.5, 0.5])
    assert same.loss < 1e-6
    torch.testing.assert_close(to_dense(same), one, rtol=1e-6, atol=1e-9)
    with pytest.raises(InputError, match="expected moments of one kind and width"):
        module.mean([one, torch.ones(60)], [0.5, 0.5])


def test_files_of_other_versions_and_damaged_sketches(run, tmp_path):
    _, moments, _ = run
    path = tmp_path / "a.moments"
    moments.sketched(4).save(path)
    tensors, text = load_file(path), safe_open(path, "pt").metadata()
    save_file(tensors, path, text | {"format": "bulkedge moments 1"})
    with pytest.raises(CheckpointError, match="moments of another version; collect them again"):
        Moments.load(path)
    key = next(name for name in tensors if name.endswith(".vectors"))
    for name in (key, key.replace("vectors", "rest")):
        save_file(tensors | {name: tensors[name] - 2}, path, text)
        with pytest.raises(CheckpointError, match="not a second moment of inputs"):
            Moments.load(path)
    table = json.loads(text["layers"])
    table["up"]["output"] = -1
    save_file(tensors, path, text | {"layers": json.dumps(table)})
    with pytest.raises(CheckpointError, match=r"damaged moments .*'up': \d+ inputs, output -1"):
        Moments.load(path)
