"""A task that plain LoRA solves by an intruder; held, penalised or controlled it does not.

One layer whose target is the base and a new direction of eight times the threshold: whoever fits it
must write that direction.  The audit of what was saved says who did, not the code that trained.
"""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bulkedge
from bulkedge.tune import IntruderPenalty, RankController, SpikeClip
from bulkedge.update import BaseSpectrum
from cases import orthonormal

peft = pytest.importorskip("peft")

M, N, SPIKE = 120, 100, 8.0


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base_weight():
    """Noise with twelve outliers, as a trained weight has: the leading vectors are the base's."""
    outliers = torch.linspace(2.4, 1.4, 12, dtype=torch.float64)
    structure = orthonormal(M, 12, 0) * outliers @ orthonormal(N, 12, 1).mT
    return draw(M, N) / (M**0.5 + N**0.5) + structure.float()


def fit(rank=4, steps=400, prepare=None):
    """A LoRA trained on the task; ``prepare(model, optimizer)`` may give a penalty."""
    torch.manual_seed(0)
    W0 = base_weight()
    theta = BaseSpectrum.of(W0).fit.threshold
    target = W0 + SPIKE * theta * draw(M, 1, seed=5) @ draw(1, N, seed=6) / (M * N) ** 0.5
    linear = nn.Linear(N, M, bias=False)
    linear.weight.data.copy_(W0)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(linear), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    penalty = prepare(model, optimizer) if prepare else None
    for step in range(steps):
        x = draw(64, N, seed=100 + step)
        loss = (model(x) - x @ target.mT).square().mean() * M
        total = loss if penalty is None else loss + penalty()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return W0, model, float(loss.detach())


def audited(folder, W0, model):
    """The record of what was saved."""
    (folder / "base").mkdir()
    save_file({"0.weight": W0}, folder / "base" / "model.safetensors")
    model.save_pretrained(folder / "tuned")
    (matrix,) = bulkedge.audit(folder / "base", folder / "tuned").matrices
    return matrix


def counts(matrix):
    verdicts = [direction.verdict.value for direction in matrix.directions]
    return verdicts.count("intruder"), verdicts.count("aligned")


def test_plain_lora_writes_an_intruder(tmp_path):
    W0, model, loss = fit()
    assert loss < 1e-2
    intruders, aligned = counts(audited(tmp_path, W0, model))
    assert intruders == 1
    assert aligned == 9


def hold(model, optimizer):
    SpikeClip(model).attach(optimizer)


def control(model, optimizer):
    RankController(model, start=2).attach(optimizer)


def penalise(model, optimizer):
    return IntruderPenalty(model, weight=60.0, k=12)


@pytest.mark.parametrize("prepare", [hold, control, penalise])
def test_held_or_penalised_it_does_not(tmp_path, prepare):
    W0, model, loss = fit(prepare=prepare)
    matrix = audited(tmp_path, W0, model)
    assert counts(matrix) == (0, 10)
    assert matrix.spectral_norm_update > 0.3 * matrix.threshold  # it has learned what it may
    assert loss > 0.1  # and the rest is the price


def test_below_the_level_no_generic_spike_separates():
    """Random directions at 0.9 of the threshold, the strongest that the clip lets through."""
    W0 = base_weight()
    base = BaseSpectrum.of(W0)
    edge, level = base.fit.edge, 0.9 * base.fit.threshold
    outliers = int((base.values > edge).sum())
    for seed in range(20):
        u, v = orthonormal(M, 1, 100 + seed), orthonormal(N, 1, 200 + seed)
        beyond = torch.linalg.svdvals(W0.double() + level * u @ v.mT) > edge * 1.02
        assert int(beyond.sum()) <= outliers
        strong = torch.linalg.svdvals(W0.double() + 3 * level * u @ v.mT) > edge * 1.02
        assert int(strong.sum()) == outliers + 1
