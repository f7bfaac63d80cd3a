"""θ_k, from which an update is among the k leading: at most σ_k, whoever asks."""

import pytest
import torch
from safetensors.torch import load_file

import bulkedge
from bulkedge import Rescale
from bulkedge.records.budget import BudgetRecord
from bulkedge.tune import AdaptedMatrix, Monitor, RankController, SpikeClip
from bulkedge.update import BaseSpectrum, budget, critical_scale, predict_spikes
from helpers import MINILM, oracle_scores, save, save_adapter, some, weights

K = 10
STEEP = "encoder.layer.0.intermediate.dense.weight"
"""A matrix of MiniLM whose leading values fall so steeply that its bulk ends above the tenth."""


def with_values(values, m, n, seed=0):
    """A matrix of these singular values, its vectors random."""
    k = len(values)
    U, V = (torch.linalg.qr(weights(x, k, seed=seed + x, dtype=torch.float64)).Q for x in (m, n))
    return (U * values) @ V.mT


def steep(m=120, n=100):
    """Values that fall fast: too many stand out for a fit to take them all for spikes."""
    places = torch.arange(1, min(m, n) + 1, dtype=torch.float64)
    return with_values(40 * torch.exp(-places / 8) + torch.linspace(2, 1, len(places)), m, n)


def generic(m, n, seed):
    """Two random unit vectors."""
    u, v = (weights(x, seed=seed + x, dtype=torch.float64) for x in (m, n))
    return u / u.norm(), v / v.norm()


BASES = {
    "noise": lambda: weights(150, 100, dtype=torch.float64),
    "square noise": lambda: weights(60, 60, dtype=torch.float64),
    "small": lambda: weights(14, 12, dtype=torch.float64),
    "steep": steep,
    "steep and wide": lambda: steep(60, 300),
    "heavy-tailed": lambda: weights(90, 80, dtype=torch.float64) ** 5,
    "with spikes": lambda: (
        weights(150, 100, dtype=torch.float64)
        + with_values(torch.linspace(90, 40, 12, dtype=torch.float64), 150, 100)
    ),
    "of two scales": lambda: torch.block_diag(
        10 * weights(12, 12, dtype=torch.float64), weights(90, 60, dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("top_k", [1, 3, 10, 40, 1000])
def test_it_is_at_most_the_kth_value(kind, top_k):
    spectrum = BaseSpectrum.of(BASES[kind]())
    sigma_k = float(spectrum.values[min(top_k, len(spectrum.values)) - 1])
    found = budget(spectrum, 1, top_k=top_k)
    assert 0 < found.top_k_threshold <= sigma_k
    assert found.top_k_threshold >= min(found.threshold, sigma_k)
    assert predict_spikes(spectrum, [1.0], top_k=top_k, draws=0).top_k_threshold == (
        found.top_k_threshold
    )


@pytest.mark.parametrize("kind", [kind for kind in BASES if kind != "small"])
def test_above_the_kth_value_an_update_is_among_the_leading(kind):
    """By dense SVDs: more than half of it lies in the span of the k leading tuned directions.

    At σ_k itself two directions have one value, and which of them is the k-th is open.
    """
    W0 = BASES[kind]()
    theta = 1.2 * float(torch.linalg.svdvals(W0)[K - 1])
    inside = 0
    for seed in range(20):
        u, v = generic(*W0.shape, seed=1000 * seed)
        U = torch.linalg.svd(W0 + theta * torch.outer(u, v)).U[:, :K]
        inside += float((U.mT @ u).square().sum()) > 0.5
    assert inside >= 19


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A steep base, and an adapter whose one spike is weaker than θ_c, and stronger than σ_k."""
    folder, W0 = tmp_path_factory.mktemp("steep"), steep().float()
    spectrum = BaseSpectrum.of(W0)
    sigma_k, edge = float(spectrum.values[K - 1]), spectrum.fit.threshold
    assert sigma_k < 0.8 * edge, "the base is to have a bulk that ends far above σ_k"
    u, v = (x.float() for x in generic(*W0.shape, seed=5))
    save(folder / "base.safetensors", {"up.weight": W0})
    name = "base_model.model.up.lora_"
    update = {f"{name}B.weight": (sigma_k * edge) ** 0.5 * u[:, None], f"{name}A.weight": v[None]}
    save_adapter(folder / "tuned", update, r=1, lora_alpha=1)
    return folder


def test_everyone_has_the_same_limit(folder):
    """Budget, audit, monitor, holders, repair and predictions."""
    W0 = load_file(folder / "base.safetensors")["up.weight"]
    spectrum = BaseSpectrum.of(W0)
    sigma_k = float(spectrum.values[K - 1])
    layer = AdaptedMatrix("up", W0, torch.zeros(1, 100), torch.zeros(120, 1))
    record = bulkedge.audit(folder / "base.safetensors", folder / "tuned")
    monitor = Monitor([layer])
    limits = {
        "budget": bulkedge.budget(folder / "base.safetensors").matrices[0].top_k_threshold,
        "audit": record.matrices[0].top_k_threshold,
        "monitor": monitor.top_k_thresholds["up"],
        "clip": SpikeClip([layer], of="leading").thresholds["up"],
        "control": RankController([layer], of="leading").thresholds["up"],
        "critical scale": critical_scale(spectrum, 1.0),
        "rescale": 1e6 * Rescale(level=1.0).factor(1e6, spectrum),
    }
    assert limits == {name: pytest.approx(sigma_k, rel=1e-4) for name in limits}
    row = record.matrices[0]
    assert (row.spikes, row.supercritical, row.beyond_top_k_threshold) == (1, 0, 1)
    assert bulkedge.Record.from_json(record.to_json()) == record


def test_a_limit_above_the_kth_value_is_not_read(folder):
    text = bulkedge.budget(folder / "base.safetensors").to_json()
    row = BudgetRecord.from_json(text).matrices[0]
    for wrong, words in (
        (1.1 * row.threshold, "expected θ_k ≤ σ_k of 'up.weight'.* make the budget anew"),
        (0.9 * row.sigma_k, "expected θ_c ≤ θ_k, or θ_k = σ_k below it, of 'up.weight'"),
    ):
        with pytest.raises(bulkedge.CheckpointError, match=words):
            BudgetRecord.from_json(
                text.replace(f'"top_k_threshold": {row.top_k_threshold}',
                             f'"top_k_threshold": {wrong}')
            )  # fmt: skip


def test_a_base_of_low_rank_says_why_it_has_no_limit(tmp_path):
    W0 = weights(80, 60)
    W0[:, 40:] = 0
    save(tmp_path / "base.safetensors", {"up.weight": W0})
    (row,) = bulkedge.budget(tmp_path / "base.safetensors", top_k=60).matrices
    assert (row.status, row.sigma_k) == ("no_limit", 0.0)
    assert "the k-th singular value is zero" in row.note
    assert "--top-k" in row.note
    (row,) = bulkedge.budget(tmp_path / "base.safetensors", top_k=30).matrices
    assert row.status == "measured"


@pytest.fixture(scope="module")
def minilm():
    """The encoder's matrices and the pooler's."""
    assert MINILM.is_dir(), "run `make minilm` first"
    tensors = load_file(MINILM / "model.safetensors")
    names = [x for x, W in tensors.items() if W.ndim == 2 and x.startswith(("encoder", "pooler"))]
    assert len(names) == 37
    return {name: tensors[name] for name in names}


def test_the_limits_of_a_real_model(minilm):
    record = bulkedge.budget(MINILM)
    assert {row.name for row in record.matrices} == set(minilm)
    for row in some(record.matrices):
        assert min(row.threshold, row.sigma_k) * (1 - 1e-9) <= row.top_k_threshold
        assert row.top_k_threshold <= row.sigma_k
    lower = [row.name for row in record.matrices if row.top_k_threshold < row.threshold]
    assert lower == [STEEP]  # as docs/study.md says
    layers = [
        AdaptedMatrix(name, W0, torch.zeros(1, W0.shape[1]), torch.zeros(W0.shape[0], 1))
        for name, W0 in minilm.items()
    ]
    expected = {row.name: pytest.approx(row.top_k_threshold, rel=1e-6) for row in record.matrices}
    assert Monitor(layers).top_k_thresholds == expected
    assert SpikeClip(layers, of="leading").thresholds == expected


def test_held_at_the_limit_a_steep_matrix_has_no_new_direction(minilm):
    """Random updates of rank 4, at nine tenths of θ_k; at those of θ_c, as before, there are."""
    W0, new = minilm[STEEP].double(), {}
    found = budget(W0, 4)
    assert found.top_k_threshold < 0.8 * found.threshold
    for limit in ("threshold", "top_k_threshold"):
        for seed in range(3):
            B = weights(W0.shape[0], 4, seed=seed, dtype=torch.float64)
            A = weights(4, W0.shape[1], seed=seed + 10, dtype=torch.float64)
            layer = AdaptedMatrix("up", W0, A, B)
            SpikeClip([layer], level=0.9, thresholds={"up": getattr(found, limit)}).step()
            scores = oracle_scores(W0, W0 + layer.B @ layer.A, K)
            new[limit, seed] = int((scores < 0.5).sum())
    assert all(new["threshold", seed] >= 1 for seed in range(3)), new
    assert not any(new["top_k_threshold", seed] for seed in range(3)), new
