"""Matrices whose powers are zero or infinite in the dtype of their weights: judged all the same."""

import pytest
import torch

import bulkedge
from bulkedge import Recipe
from cases import gaussian, orthonormal
from helpers import save, some

SHAPE = (190, 150)


def corner(value: float) -> torch.Tensor:
    W = torch.zeros(SHAPE)
    W[0, 0] = value
    return W


BASES = {
    "zero": torch.zeros(SHAPE),
    "huge": 1e30 * gaussian(*SHAPE).float(),
    "tiny": 1e-30 * gaussian(*SHAPE).float(),
    "denormal": 1e-40 * gaussian(*SHAPE).float(),
    "rank one": (orthonormal(190, 1, 1) @ orthonormal(150, 1, 2).mT).float(),
    "one entry": corner(1.0),
    "one huge entry": gaussian(*SHAPE).float() + corner(1e20),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("name", BASES)
def test_the_verdicts_are_those_of_two_svds(name, transposed, tmp_path):
    base = BASES[name]
    scale = float(torch.linalg.matrix_norm(base.double(), 2)) or 1.0
    spike = 3 * scale * (orthonormal(190, 1, 3) @ orthonormal(150, 1, 4).mT)
    tuned = (base.double() + spike).float()
    pair = [W.T if transposed else W for W in (base, tuned)]
    paths = [save(tmp_path / f"{i}.safetensors", {"a.weight": W}) for i, W in enumerate(pair)]
    found = {
        method: bulkedge.audit(*paths, recipe=Recipe(top_k=2, side="both", method=method))
        for method in ("dense", "certified", "auto")
    }
    rows = {method: record.matrices[0] for method, record in found.items()}
    assert {row.status for row in rows.values()} == {"audited"}, rows["auto"].note
    for row in (rows["certified"], rows["auto"]):
        for one, two in some(zip(row.directions, rows["dense"].directions, strict=True)):
            assert (one.index, one.side) == (two.index, two.side)
            assert one.score_lower - 1e-6 <= two.score <= one.score_upper + 1e-6
    verdicts = [[d.verdict for d in rows[m].directions] for m in ("auto", "dense")]
    assert verdicts[0] == verdicts[1]
