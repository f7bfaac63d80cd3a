"""What a judgement costs in counts, which do not depend on the machine: none may creep up.

The figures are those of the code as it is; one that rises by more than a tenth fails here.  Where a
change makes one fall, write the lower figure.
"""

from dataclasses import dataclass, field

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bulkedge._linmap import Dense, LowRank
from bulkedge.intruder import _dense, judge
from bulkedge.intruder._component_bound import Reached
from bulkedge.intruder._evidence import Question
from bulkedge.intruder._search import Search
from bulkedge.rmt import EmpiricalBulk
from bulkedge.triplet import Bidiagonalization
from bulkedge.update import BaseSpectrum, predict_spikes

ALLOWED = 1.1
FACTORISATIONS = {"linalg_eigh", "linalg_svd", "_linalg_svd", "_linalg_eigh", "linalg_cholesky_ex"}
SMALL = 200  # a factorisation of a matrix that is no part of the small algebra

# shape, base, how the directions were decided: passes, evaluations, factorisations, operations
CASES = {
    ("noise", 800, 800): (37, 4, 0, 5_721),
    ("trained", 800, 800): (37, 5, 0, 6_117),
    ("tall", 1600, 800): (31, 4, 1, 7_107),
    ("near ties", 800, 1400): (14, 0, 2, 1_117),
    ("trained", 400, 700): (3, 0, 2, 320),
    ("noise", 64, 64): (4, 0, 0, 169),
}

# the same bases: transforms of an empirical bulk, and operations, of its fit and its predictions
FITS = {("noise", 64, 64): (0, 998), ("trained", 200, 200): (10, 1_250)}


@dataclass
class Counts(TorchDispatchMode):
    """Tensor operations, and large factorisations among them."""

    operations: int = 0
    large: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        name = function.overloadpacket.__name__
        if name in FACTORISATIONS and min(args[0].shape[-2:]) > SMALL:
            self.large.append(name)
        return function(*args, **(kwargs or {}))


def made(kind, m, n):
    """A base of the kind, and one with a LoRA of rank 8."""
    g = torch.Generator().manual_seed(0)
    W0 = torch.randn(m, n, generator=g) / (m**0.5 + n**0.5)
    if kind == "trained":
        W0 *= torch.exp(0.4 * torch.randn(m, 1, generator=g))
        W0 += basis(m, 12, g) * torch.linspace(6, 2, 12) @ basis(n, 12, g).mT
    strong = 4 if kind == "near ties" else 12
    theta = torch.linspace(3, 1.5, strong)
    update = LowRank(basis(m, strong, g) * theta, basis(n, strong, g).mT)
    return Dense(W0), Dense(W0) + update


def basis(rows, columns, g):
    return torch.linalg.qr(torch.randn(rows, columns, generator=g)).Q


def counted(kind, m, n, monkeypatch):
    """Passes, evaluations of the evidence, large factorisations and operations of one matrix."""
    W0, W = made(kind, m, n)
    checks, check = [], Search._check
    monkeypatch.setattr(Search, "_check", lambda *a, **k: checks.append(1) or check(*a, **k))
    with Counts() as counts:
        for name in ("eigenvectors", "leading_eigenvectors"):  # SciPy's, which torch does not see
            asked = getattr(_dense, name)
            monkeypatch.setattr(
                _dense, name, lambda *a, f=asked: counts.large.append(f.__name__) or f(*a)
            )
        found = judge(W0, W, seed=1)
    figures = (found.passes, len(checks), len(counts.large), counts.operations)
    return found, figures


@pytest.mark.parametrize(("case", "most"), CASES.items(), ids=lambda x: str(x))
def test_no_count_has_risen(case, most, monkeypatch):
    found, figures = counted(*case, monkeypatch)
    assert found.undecided == 0
    for name, now, before in zip(
        ("passes", "checks", "factorisations", "operations"), figures, most, strict=True
    ):
        assert now <= ALLOWED * before, (case, name, figures)


@pytest.mark.parametrize(("case", "most"), FITS.items(), ids=lambda x: str(x))
def test_no_count_of_a_fit_and_its_predictions_has_risen(case, most, monkeypatch):
    values = torch.linalg.svdvals(made(*case)[0].to_dense().double())
    calls, traces = [], EmpiricalBulk.traces
    monkeypatch.setattr(EmpiricalBulk, "traces", lambda *a: calls.append(1) or traces(*a))
    theta = torch.linspace(3, 0.2, 12)
    predict_spikes(BaseSpectrum.from_values(values, case[1:]), theta)  # tables are made once
    calls.clear()
    with Counts() as counts:
        found = predict_spikes(BaseSpectrum.from_values(values, case[1:]), theta)
    assert {True, False} == set(found.supercritical.tolist())
    figures = (len(calls), counts.operations)
    for name, now, before in zip(("transforms", "operations"), figures, most, strict=True):
        assert now <= ALLOWED * before, (case, name, figures)


@pytest.mark.parametrize("now", [float("inf"), 3.0, 2.0])
def test_an_excess_that_does_not_fall_predicts_nothing(now):
    """It is infinite where the error of a direction leaves no room below ε."""
    W0, _ = made("noise", 64, 64)
    process = Bidiagonalization(W0, basis(64, 4, torch.Generator().manual_seed(1)), 1e-6)
    asked = Question(0.5, torch.full((1,), 0.5), torch.zeros(1, dtype=torch.long), 2)
    search = Search(
        process, asked, torch.zeros(64, 1), torch.zeros(64, 3), frobenius=1.0, assumed_noise=1e-6,
        max_steps=5, generator=torch.Generator(),
    )  # fmt: skip
    search.reached = Reached(torch.ones(1), now)
    by_cost = search._steps_to_wait([(3, now), (4, now)])
    assert search._steps_to_wait([(3, 2.0), (4, now)]) == by_cost >= 1


def test_a_plan_without_hope_delays_the_search_little(monkeypatch):
    """The rounding is measured after twice the steps at the latest, whatever was assumed of it."""
    W0, _ = made("trained", 1600, 1600)
    g = torch.Generator().manual_seed(1)
    W = W0 + LowRank(0.2 * basis(1600, 8, g), basis(1600, 8, g).mT)
    least = judge(W0, W, seed=1)
    monkeypatch.setattr(Search, "_decides", lambda *_: False)
    found = judge(W0, W, seed=1)
    assert found.undecided == 0
    assert least.passes <= found.passes <= 1.5 * least.passes, (least.passes, found.passes)
