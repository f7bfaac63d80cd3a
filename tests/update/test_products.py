"""The spectrum of a base from products, held against a float64 SVD."""

import pytest
import torch
from safetensors import safe_open

from bulkedge import InputError
from bulkedge.update import BaseSpectrum, budget, measure
from helpers import MINILM, some, weights


def trained_like(m, n, seed=0):
    """Noise whose rows and columns differ in variance, under twelve outliers."""
    rows, columns = (weights(size, seed=seed + i).mul(0.3).exp() for i, size in enumerate((m, n)))
    W = weights(m, n, seed=seed + 2) * rows[:, None] * columns / (m**0.5 + n**0.5)
    U, V = (torch.linalg.qr(weights(size, 12, seed=seed + 3 + size)).Q for size in (m, n))
    return W + (U * torch.linspace(6, 2, 12)) @ V.mT


def by_svd(W0):
    return BaseSpectrum.from_values(torch.linalg.svdvals(W0.double()), tuple(W0.shape))


def limits(spectrum, top_k=10):
    found = budget(spectrum, 1, top_k=top_k)
    return found.threshold, found.top_k_threshold


@pytest.mark.parametrize(("m", "n"), [(600, 900), (900, 600)])
def test_limits_from_products_are_those_of_an_svd(m, n):
    W0 = trained_like(m, n)
    found, exact = measure(W0, small=0), by_svd(W0)
    assert found.exact < 100
    assert found.passes > 0
    assert found.note is None
    assert len(found.values) == min(m, n)
    leading = found.values[:10], exact.values[:10]
    torch.testing.assert_close(*leading, rtol=1e-5, atol=0)
    assert found.spectrum.fit.spikes == exact.fit.spikes == 12
    assert limits(found.spectrum) == pytest.approx(limits(exact), rel=0.02)


def test_it_is_the_same_matrix_when_transposed_or_in_half_precision():
    W0 = trained_like(300, 400).bfloat16()
    first, turned = measure(W0, small=0), measure(W0.mT, small=0)
    assert limits(first.spectrum) == pytest.approx(limits(turned.spectrum), rel=1e-9)
    assert limits(first.spectrum) == pytest.approx(limits(by_svd(W0)), rel=0.02)


def test_noise_has_the_threshold_of_noise():
    found = measure(weights(800, 800), small=0)
    assert limits(found.spectrum) == pytest.approx((800**0.5,) * 2, rel=0.02)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strengths", [[], [1.15, 1.2], [2.0, 2.2, 2.4, 3, 3.5, 4, 5, 6]])
def test_noise_is_recognised_below_spikes(strengths, seed):
    theta = torch.tensor(strengths) * 500**0.5
    U, V = (torch.linalg.qr(weights(500, 8, seed=seed + i)).Q[:, : len(theta)] for i in (8, 9))
    found = measure(weights(500, 500, seed=seed) + (U * theta) @ V.mT, small=0, seed=seed)
    assert found.spectrum.fit.white
    assert limits(found.spectrum)[0] == pytest.approx(500**0.5, rel=0.02)


@pytest.mark.parametrize("seed", range(6))
def test_the_round_edge_of_a_trained_weight_is_no_noise_with_weak_spikes(seed):
    """Its first seven values fit weak spikes above noise, and the next sixteen values fit noise."""
    with safe_open(MINILM / "model.safetensors", "pt") as file:
        W0 = file.get_tensor("encoder.layer.5.attention.output.dense.weight")
    found = measure(W0, small=0, seed=seed)
    assert not found.spectrum.fit.white
    assert limits(found.spectrum) == pytest.approx(limits(by_svd(W0)), rel=0.02)


def test_a_small_base_is_decomposed():
    W0 = trained_like(60, 80)
    found = measure(W0)
    assert (found.exact, found.passes, found.note) == (60, 0, None)
    assert limits(found.spectrum) == pytest.approx(limits(by_svd(W0)))


def test_values_that_do_not_converge_are_all_computed():
    flat = torch.eye(200)
    found = measure(flat, small=0)
    assert found.exact == 200
    assert "too close to converge" in found.note
    assert found.spectrum is None
    assert "values that differ" in found.problem


def test_the_outliers_of_a_base_may_be_more_than_k():
    W0 = trained_like(500, 500)
    for k in (1, 3, 12):
        limit = limits(measure(W0, top_k=k, small=0).spectrum, k)
        assert limit == pytest.approx(limits(by_svd(W0), k), rel=0.02)


@pytest.mark.parametrize(
    ("W0", "words"),
    [
        (torch.ones(3), "expected a real matrix with entries"),
        (torch.ones(3, 0), "expected a real matrix with entries"),
        (torch.ones(3, 3, dtype=torch.int64), "expected a real matrix with entries"),
        (torch.full((20, 20), float("nan")), "got 400 NaN or Inf"),
    ],
)
def test_what_is_no_matrix_is_refused(W0, words):
    with pytest.raises(InputError, match=words):
        measure(W0)


@pytest.mark.slow
def test_every_matrix_of_minilm_by_products_alone():
    with safe_open(MINILM / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    matrices = [W for W in tensors.values() if W.ndim == 2 and min(W.shape) > 12]
    for W0 in some(W for W in matrices if W.is_floating_point()):
        found = measure(W0, small=0)
        assert found.exact < 100
        assert limits(found.spectrum) == pytest.approx(limits(by_svd(W0)), rel=0.02)
