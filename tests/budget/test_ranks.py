"""The ranks of an update, against float64 SVDs, and as settings that stock PEFT takes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner

import bulkedge
from bulkedge._errors import InputError
from bulkedge.auditing.rows import rank_fields
from bulkedge.budgeting import rank_config
from bulkedge.cli import cli
from helpers import save, save_adapter, some

R = 6
SPIKES = {
    "up": [9.0, 8.0, 7.0, 0.2, 0.1, 0.1],  # three carry all but 0.03 %
    "down": [5.0, 5.0, 5.0, 5.0, 5.0, 5.0],
    "side": [4.0, 0.1, 0.1, 0.1, 0.1, 0.1],
}
SHAPES = {"up": (60, 40), "down": (40, 60), "side": (40, 40)}


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(size, seed):
    return torch.linalg.qr(draw(size, R, seed=seed)).Q


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    factors = {}
    for i, (name, (m, n)) in enumerate(SHAPES.items()):
        mix = draw(R, R, seed=i) + 3 * torch.eye(R)  # factors that do not show the spikes
        spikes = torch.tensor(SPIKES[name]).double() / 2  # the scale is α/r = 2
        factors[f"{name}.lora_B.weight"] = (orthonormal(m, 10 + i) * spikes) @ mix
        factors[f"{name}.lora_A.weight"] = torch.linalg.inv(mix) @ orthonormal(n, 20 + i).mT
    tensors = {f"{name}.weight": draw(*shape, seed=30) for name, shape in SHAPES.items()}
    return (
        save(folder / "base.safetensors", tensors),
        save_adapter(folder / "lora", factors, r=R, lora_alpha=2 * R, target_modules=list(SHAPES)),
    )


@pytest.fixture(scope="module")
def record(inputs):
    return bulkedge.audit(*inputs, recipe={"top_k": 4})


def test_the_ranks_of_an_update_are_those_of_its_singular_values(record):
    for row in some(record.matrices):
        gamma = SPIKES[row.name.removesuffix(".weight")]
        energy, total = sum(x * x for x in gamma), sum(gamma)
        entropy = -sum(x / total * math.log(x / total) for x in gamma)
        carried = [sum(x * x for x in gamma[:k]) for k in range(1, R + 1)]
        assert row.in_use == next(k for k, c in enumerate(carried, 1) if c >= 0.99 * energy)
        assert row.effective_rank == pytest.approx(math.exp(entropy), rel=1e-5)
        assert row.stable_rank == pytest.approx(energy / max(gamma) ** 2, rel=1e-5)
    assert [row.in_use for row in record.matrices] == [6, 1, 3]
    assert rank_fields(torch.zeros(0)) == {"spikes": 0, "in_use": 0}
    tiny = rank_fields(torch.tensor([1e-200, 1e-200], dtype=torch.float64))
    assert tiny["effective_rank"] == pytest.approx(2)
    assert tiny["in_use"] == 2


def test_stock_peft_takes_the_ranks_as_they_are(record):
    peft = pytest.importorskip("peft")
    settings = rank_config(record)
    assert {settings["r"], *settings["rank_pattern"].values()} == {1, 3, 6}

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, (m, n) in SHAPES.items():
                setattr(self, name, torch.nn.Linear(n, m, bias=False))

    model = peft.get_peft_model(Model(), peft.LoraConfig(**settings)).base_model.model
    for name, rank in (("up", 3), ("down", 6), ("side", 1)):
        layer = getattr(model, name)
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == pytest.approx(2.0)  # as it was trained


def test_the_command_writes_them(inputs, record, tmp_path):
    runner, file = CliRunner(), tmp_path / "ranks.json"
    options = ["-k", "4", "--fail-on", "never", "--peft", str(file)]
    told = runner.invoke(cli, ["audit", *map(str, inputs), *options])
    assert told.exit_code == 0, told.output
    assert json.loads(file.read_text()) == rank_config(record)
    assert f"written to {file}" in told.stderr
    again = runner.invoke(cli, ["audit", *map(str, inputs), "--peft", str(file)])
    assert "exists; give another file" in str(again.exception)
    part = ["--shard", "1/2", "-o", str(tmp_path / "o"), "--peft", str(tmp_path / "p")]
    refused = runner.invoke(cli, ["audit", *map(str, inputs), *part])
    assert refused.exit_code == 2
    assert "--peft is of the whole audit" in refused.output
    full = save(tmp_path / "full.safetensors",
                {f"{n}.weight": draw(*s, seed=31) for n, s in SHAPES.items()})  # fmt: skip
    refused = runner.invoke(
        cli, ["audit", str(inputs[0]), str(full), "--peft", str(tmp_path / "q")]
    )
    assert refused.exit_code == 2
    assert "TUNED has no low-rank update" in refused.output
    assert not (tmp_path / "q").exists()


def test_a_record_without_spikes_has_no_ranks(inputs, tmp_path):
    tuned = save(tmp_path / "full.safetensors",
                 {f"{n}.weight": draw(*s, seed=31) for n, s in SHAPES.items()})  # fmt: skip
    with pytest.raises(InputError, match="expected layers with a low-rank update"):
        rank_config(bulkedge.audit(inputs[0], tuned, recipe={"top_k": 2}))
