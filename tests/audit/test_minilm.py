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


def svd_scores(W0, W):
    """Scores and subspace overlaps by the definition, nothing of this package in it."""
    U0, _, V0 = torch.linalg.svd(W0, full_matrices=False)
    U, _, V = torch.linalg.svd(W, full_matrices=False)
    for side, X0, X in (("left", U0, U), ("right", V0.mT, V.mT)):
        cosines = X0.mT @ X[:, :K]
        yield side, cosines.abs().max(dim=0).values, cosines[: 2 * K].norm(dim=0)


def verdict_of(score, overlap):
    if score >= EPSILON:
        return "aligned"
    return "rotated" if overlap**2 >= 0.5 else "intruder"


PART = ("encoder.layer.[05].*", "pooler.*")
"""The first and the last layer, and one that was never pretrained."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("lora-r1", (), 37), marks=pytest.mark.slow, id="lora-r1"),
        pytest.param(("lora-r8", (), 37), marks=pytest.mark.slow, id="lora-r8"),
        pytest.param(("lora-r8", PART, 13), id="some of lora-r8"),
    ],
)
def audited(request):
    """An adapter, and the audit of all its matrices, or of some, by SVDs."""
    adapter, include, count = request.param
    recipe = Recipe(side="both", method="dense", include=include)
    record = bulkedge.audit(MINILM, EXAMPLE / adapter, recipe=recipe)
    assert len(record.matrices) == count
    return adapter, record


def test_every_direction_agrees_with_two_full_svds(audited, base_weights):
    adapter, record = audited
    factors = load_file(EXAMPLE / adapter / "adapter_model.safetensors")
    config = json.loads((EXAMPLE / adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]

    compared, counted = 0, 0
    for matrix in some(record.matrices):
        module = f"base_model.model.bert.{matrix.name.removesuffix('.weight')}"
        A, B = (factors[f"{module}.lora_{f}.weight"].double() for f in "AB")
        W0 = base_weights[matrix.name].double()
        W = W0 + scale * B @ A
        paper = 0
        for side, scores, overlaps in some(svd_scores(W0, W)):
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
    assert compared > 0.98 * len(record.matrices) * 2 * K


def test_every_certified_verdict_is_the_dense_one(audited):
    """And every interval holds the dense figure, whose own rounding is 1e-9 at worst."""
    adapter, dense = audited
    recipe = dense.recipe.model_copy(update={"method": "certified"})
    certified = bulkedge.audit(MINILM, EXAMPLE / adapter, recipe=recipe)
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


def test_the_shipped_adapters_contain_intruders(shipped):
    """What the README shows: an audit that finds something, on weights that training made."""
    counts = {name: record.summary.new_directions for name, record in shipped.items()}
    expected = {
        row["name"]: row["encoder_rotated"] + row["encoder_intruder"] + row["pooler_paper"]
        for row in json.loads((EXAMPLE / "table.json").read_text())
        if row["name"] in counts and row["seed"] == 0
    }
    assert counts == expected
    assert min(counts.values()) > 0
