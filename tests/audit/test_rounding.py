"""A base whose products round in one direction: two columns are constant but for a last place.

A float32 Gram matrix of it errs by more than random entries would make it, and a proof that counted
on less called a base vector an intruder.
"""

import pytest
import torch
from safetensors.torch import save_file

from bulkedge import audit
from bulkedge.comparison import Pair, judge_pair
from bulkedge.intruder import Verdict
from bulkedge.records.recipe import Recipe
from helpers import some

WIDE = torch.float64


def pair(rows, units):
    """The base, and a full fine-tune whose spike is a base vector with σ of 1e-9 σ₁."""
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(2048, 400)
    base[:1024, 0], base[:1024, 1] = 1.1767964, 1.2243557
    base.view(torch.int32)[:rows, 1] += units
    rest = torch.randn(1024, 398, generator=generator, dtype=WIDE)
    smallest = float(torch.linalg.svdvals(rest)[-1])
    base[1024:, 2:] = (rest * (3e-3 * float(base.double().norm()) / smallest)).float()
    tuned = base.double()
    tuned[:rows, 399] += 200 / rows**0.5
    return base, tuned.float()


@pytest.mark.parametrize(("rows", "units", "true"), [(1, 1, 0.9994), (20, 8, 0.9886)])
def test_constant_columns_do_not_make_an_intruder(rows, units, true, tmp_path):
    base, tuned = pair(rows, units)
    S = torch.linalg.svdvals(base.double())
    assert 1e-10 < float(S[-1] / S[0]) < 1e-6
    for name, weight in (("base", base), ("tuned", tuned)):
        save_file({"layer.weight": weight}, tmp_path / f"{name}.safetensors")
    files = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    record = audit(*files, recipe=Recipe(top_k=2))
    (matrix,) = record.matrices
    for row in some(matrix.directions):
        assert row.verdict is Verdict.ALIGNED
        assert row.score_lower <= row.score <= row.score_upper
    assert matrix.directions[0].score == pytest.approx(true, abs=1e-4)
    judged = judge_pair(Pair(base, tuned, None), Recipe(top_k=2, method="certified"))
    assert judged.directions[0].score_upper >= true - 1e-4
