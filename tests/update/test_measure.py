"""Whether a base is noise, and its norm, where products alone are known: against all its values."""

import numpy as np
import pytest
import torch

import bulkedge
from bulkedge.records import Recipe
from bulkedge.rmt import EmpiricalBulk, fit_edge
from bulkedge.rmt.edge import fit_leading_noise
from bulkedge.update import BaseSpectrum
from bulkedge.update._measure import measure_base
from bulkedge.update._products import by_products, measure_further, norm_is_known
from cases import generator, orthonormal
from helpers import save, save_adapter, some, weights
from noise import noise_values

SHAPES = [(800, 800), (900, 1500), (1000, 800)]


def fractions(p):
    return torch.arange(p, dtype=torch.float64) / p


VALUES = {
    # the fourth moment of these is that of noise
    "a power with the moment of noise": lambda p: (1 - fractions(p)) ** 1.207,
    "a line": lambda p: 1 - 0.99 * fractions(p),
    "steps of eight": lambda p: 1 - (torch.arange(p) // 8 * 8).double() / p,
    "a root": lambda p: (1 - fractions(p)).sqrt(),
    "one step": lambda p: torch.where(fractions(p) < 0.25, 2.1, 0.7) + 7e-4 * (1 - fractions(p)),
    "decaying": lambda p: torch.arange(1, p + 1).double() ** -0.3,
}


def structured(kind, m, n):
    if kind == "uneven rows":
        return weights(m, n).double() * torch.linspace(0.6, 1.4, m).double()[:, None] / n**0.5
    p = min(m, n)
    return (orthonormal(m, p, 1) * VALUES[kind](p)) @ orthonormal(n, p, 2).mT


KINDS = [*VALUES, "uneven rows"]


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """An audit of strong updates of all kinds, which certificates decide early."""
    folder, n = tmp_path_factory.mktemp("audited"), 800
    bases = {kind.replace(" ", "_"): structured(kind, n, n) for kind in KINDS}
    bases["noise"] = weights(n, n).double() / n**0.5
    save(folder / "base.safetensors", {f"{name}.weight": W.float() for name, W in bases.items()})
    strengths = torch.linspace(6, 3, 12, dtype=torch.float64)
    tensors = {}
    for name, W in bases.items():
        B = orthonormal(n, 12, 3) * strengths * torch.linalg.matrix_norm(W, 2)
        tensors[f"base_model.model.{name}.lora_A.weight"] = orthonormal(n, 12, 4).mT.float()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.float()
    save_adapter(folder / "lora", tensors, r=12, lora_alpha=12)
    found = {}
    for k in (10, 1):
        record = bulkedge.audit(
            folder / "base.safetensors", folder / "lora", recipe=Recipe(top_k=k, method="certified")
        )
        found[k] = {row.name.removesuffix(".weight"): row for row in record.matrices}
    return {name: (W, [found[k][name] for k in (10, 1)]) for name, W in bases.items()}


@pytest.mark.parametrize("kind", ["noise", *(kind.replace(" ", "_") for kind in KINDS)])
def test_an_audit_by_products_says_of_a_base_what_all_its_values_say(kind, audited):
    W, rows = audited[kind]
    exact = BaseSpectrum.of(W.float())
    norm = float(exact.values[0])
    for row in some(rows):
        assert row.spectral_norm_base == pytest.approx(norm, rel=5e-5)
        assert row.bulk.white == exact.fit.white == (kind == "noise")
        assert row.bulk.edge == pytest.approx(exact.fit.edge, rel=0.02)
        # of a bulk that ends in a step it is 0
        assert row.threshold == pytest.approx(exact.fit.threshold, rel=0.15)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_structure_is_not_called_noise(kind, shape):
    W0 = structured(kind, *shape).float()
    found = by_products(W0, 1, 0)
    spectrum, _ = measure_base(found.values, shape, found.exact)
    assert spectrum is None or not spectrum.fit.white
    norm = float(torch.linalg.matrix_norm(W0.double(), 2))
    assert not found.accurate or float(found.values[0]) == pytest.approx(norm, rel=5e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_is_recognised_by_products(shape):
    white = 0
    for seed in range(4):
        W0 = weights(*shape, seed=seed)
        if seed % 2:
            W0 += 3 * shape[1] ** 0.5 * orthonormal(shape[0], 1, 5) @ orthonormal(shape[1], 1, 6).mT
        found = by_products(W0.float(), 1, 0)
        spectrum, _ = measure_base(found.values, shape, found.exact)
        white += spectrum.fit.white and spectrum.fit.spikes >= seed % 2
        edge = BaseSpectrum.of(W0).fit.edge
        assert spectrum.fit.edge == pytest.approx(edge, rel=0.01)
    assert white == 4


@pytest.mark.parametrize("shape", [(200, 200), (200, 600)], ids=str)
def test_the_places_of_leading_values_refuse_noise_rarely(shape):
    """Two tests, each of which fails once in a thousand times."""
    rng = np.random.default_rng(0)
    draws = [noise_values(shape, rng) for _ in range(400)]
    for count in (8, 20):
        refused = sum(fit_leading_noise(s, shape, exact=count) is None for s in draws)
        assert refused <= 6  # 0.8 are expected


def test_a_norm_is_known_by_its_vectors_or_not():
    W0 = structured("decaying", 300, 200)
    U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
    leading = U[:, :10], S[:10], Vh[:10].mT
    linear = bulkedge._linmap.as_map(W0)
    assert norm_is_known(linear, leading)
    turned = torch.linalg.qr(leading[0] + 0.1 * weights(300, 10).double()).Q
    assert not norm_is_known(linear, (turned, *leading[1:]))
    assert not norm_is_known(linear, tuple(part[..., :0] for part in leading))


def test_a_norm_that_does_not_converge_is_not_told(monkeypatch):
    """Two steps are not enough for values that are so close."""
    monkeypatch.setattr("bulkedge.update._products.FIRST", 2)
    monkeypatch.setattr("bulkedge.update._products.LAST", 2)
    W0 = structured("a root", 300, 300)
    found = measure_further(W0, torch.linalg.svdvals(W0), 0, norm_known=False)
    assert found.spectrum is None
    assert "‖W0‖₂ is not known" in found.note
    assert "too few leading" in found.problem


@pytest.mark.parametrize("count", [4, 8, 12, 15, 16])
def test_a_few_values_before_a_gap_have_the_edge_to_themselves(count):
    top = 3 + 3e-3 * torch.rand(count, generator=generator(1), dtype=torch.float64)
    rest = 1 + 1e-3 * torch.rand(80 - count, generator=generator(2), dtype=torch.float64)
    values = torch.cat([top, rest]).sort(descending=True).values
    bulk = EmpiricalBulk(values, (80, 140))
    assert float(values[0]) - 1e-3 < bulk.edge < float(values[0]) + 5e-3
    assert 0 < bulk.threshold < 0.1


def test_noise_has_no_gap_below_its_first_values():
    rng = np.random.default_rng(0)
    counts = {fit_edge(noise_values((100, 150), rng)).count for _ in range(500)}
    assert counts == {16}
