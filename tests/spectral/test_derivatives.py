"""The table in docs/derivatives.md: every cell is run again, and gives what the page says."""

import pytest
import torch

import derivatives
from derivatives import PLAIN, SAMPLE, cells, outcome, stored

QUICK = (PLAIN, "compile(transform), one graph", "transform(compile), eager")


def _cell(cell):
    _, mode, name = cell
    slow = mode != PLAIN and (mode not in QUICK or name not in SAMPLE)
    return pytest.param(*cell, id="-".join(cell), marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("transform", "mode", "name"), [*map(_cell, cells())])
def test_a_nesting_gives_what_the_page_says(transform, mode, name):
    assert outcome(transform, mode, name) == stored()[transform, mode, name]


def test_the_page_has_the_tables_of_what_it_says_and_every_cell():
    known = stored()
    assert set(known) == set(cells())
    assert set(known.values()) == {derivatives.RIGHT, derivatives.REFUSED, derivatives.TORCH}
    written = derivatives.PAGE.read_text(encoding="utf-8").partition(derivatives.MARK)[2]
    assert written.strip() == derivatives.render(known).strip()


def test_a_wrong_number_is_no_outcome(monkeypatch):
    wrong = (lambda A: A.sum(), derivatives.FUNCTIONS["spectral_norm"][1])
    monkeypatch.setitem(derivatives.FUNCTIONS, "spectral_norm", wrong)
    for transform in ("none", "grad", "jvp", "hessian"):
        with pytest.raises(AssertionError, match="not close"):
            outcome(transform, PLAIN, "spectral_norm")


def test_a_foreign_error_is_no_outcome(monkeypatch):
    def broken(A):
        raise RuntimeError("an error of another library")

    oracle = derivatives.FUNCTIONS["spectral_norm"][1]
    monkeypatch.setitem(derivatives.FUNCTIONS, "spectral_norm", (broken, oracle))
    with pytest.raises(RuntimeError, match="an error of another library"):
        outcome("grad", PLAIN, "spectral_norm")


def test_a_projection_has_no_gradient():
    A = derivatives.A.clone().requires_grad_()
    assert not derivatives.project_spectral_ball(A).requires_grad
    assert torch.equal(A, derivatives.A)
