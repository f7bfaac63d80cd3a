"""The real model and the real adapters, against two full float64 SVDs a matrix."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import bulkedge
from bulkedge import Recipe
from bulkedge.intruder import Verdict
from helpers import EXAMPLE, MINILM, some

EPSILON, K = 0.5, 10


@pytest.fixture(scope="module")
def base_weights():
    assert MINILM.is_dir(), "run `make minilm` first"
    return load_file(MINILM / "model.safetensors")


def svd_scores(W0, W, side):
    """Scores and subspace overlaps by the definition, nothing of this package in it."""
    U0, _, V0 = torch.linalg.svd(W0, full_matrices=False)
    U, _, V = torch.linalg.svd(W, full_matrices=False)
    X0, X = (U0, U) if side == "left" else (V0.mT, V.mT)
    cosines = X0.mT @ X[:, :K]
    return cosines.abs().max(dim=0).values, cosines[: 2 * K].norm(dim=0)


def verdict_of(score, overlap):
    if score >= EPSILON:
        return "aligned"
    return "rotated" if overlap**2 >= 0.5 else "intruder"


@pytest.mark.parametrize("adapter", [pytest.param("lora-r1", marks=pytest.mark.slow), "lora-r8"])
def test_every_direction_agrees_with_two_full_svds(adapter, base_weights):
    recipe = Recipe(side="both", method="dense")
    record = bulkedge.audit(MINILM, EXAMPLE / adapter, recipe=recipe)
    factors = load_file(EXAMPLE / adapter / "adapter_model.safetensors")
    config = json.loads((EXAMPLE / adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]

    assert len(record.matrices) == 37
    compared, counted = 0, 0
    for matrix in some(record.matrices):
        module = f"base_model.model.bert.{matrix.name.removesuffix('.weight')}"
        A, B = (factors[f"{module}.lora_{f}.weight"].double() for f in "AB")
        W0 = base_weights[matrix.name].double()
        W = W0 + scale * B @ A
        paper = 0
        for side in ("left", "right"):
            scores, overlaps = svd_scores(W0, W, side)
            rows = [d for d in matrix.directions if d.side == side]
            assert [d.index for d in rows] == list(range(K))
            for row, score, overlap in some(
                zip(rows, scores.tolist(), overlaps.tolist(), strict=True)
            ):
                paper += score < EPSILON
                if abs(score - EPSILON) < 1e-3:
                    continue
                assert math.isclose(row.score, score, abs_tol=1e-4)
                assert math.isclose(row.subspace_overlap, overlap, abs_tol=1e-4)
                assert row.verdict.value == verdict_of(score, overlap)
                compared += 1
        assert matrix.new_directions == paper
        assert matrix.spectral_norm_update == pytest.approx(
            float(torch.linalg.matrix_norm(scale * B @ A, 2)), rel=1e-6
        )
        counted += paper
    assert record.summary.new_directions == counted
    assert compared > 0.98 * 37 * 2 * K


@pytest.mark.parametrize("adapter", [pytest.param("lora-r1", marks=pytest.mark.slow), "lora-r8"])
def test_every_certified_verdict_is_the_dense_one(adapter):
    """And every interval holds the dense figure, whose own rounding is 1e-9 at worst."""
    certified, dense = (
        bulkedge.audit(MINILM, EXAMPLE / adapter, recipe=Recipe(side="both", method=method))
        for method in ("certified", "dense")
    )
    open_ = 0
    for ours, oracle in some(zip(certified.matrices, dense.matrices, strict=True)):
        for row, true in some(zip(ours.directions, oracle.directions, strict=True)):
            assert (row.method, true.method) == ("certified", "dense")
            assert row.score_lower - 1e-9 <= true.score <= row.score_upper + 1e-9
            assert row.score_lower <= row.score <= row.score_upper
            overlap = true.subspace_overlap
            assert row.overlap_lower - 1e-9 <= overlap <= row.overlap_upper + 1e-9
            open_ += row.verdict is Verdict.UNDECIDED
            assert row.verdict in (true.verdict, Verdict.UNDECIDED)
        for angles, known in some(zip(ours.angles, oracle.angles, strict=True)):
            exact = torch.tensor(known.cosines_lower)
            assert (torch.tensor(angles.cosines_lower) <= exact + 1e-6).all()
            assert (exact <= torch.tensor(angles.cosines_upper) + 1e-6).all()
            assert angles.outside <= known.outside <= angles.outside + angles.undecided
        assert ours.passes <= 150  # three processes of 25 steps at most
        assert ours.threshold == pytest.approx(oracle.threshold, rel=1e-3)
    # of 1,480: with the rounding that was measured a few scores near ε stay open
    assert open_ <= 4


def test_the_shipped_adapters_contain_intruders():
    """What the README shows: an audit that finds something, on weights that training made."""
    counts = {
        name: bulkedge.audit(MINILM, EXAMPLE / name).summary.new_directions
        for name in ("lora-r1", "lora-r8")
    }
    expected = {
        row["name"]: row["encoder_rotated"] + row["encoder_intruder"] + row["pooler_paper"]
        for row in json.loads((EXAMPLE / "table.json").read_text())
        if row["name"] in counts and row["seed"] == 0
    }
    assert counts == expected
    assert min(counts.values()) > 0
