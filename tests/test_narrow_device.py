"""On a device without float64 what is exact is computed on the CPU: a simulated one refuses it."""

import ast
from pathlib import Path

import pytest
import torch

import bulkedge
from bulkedge import _precision, triplet
from bulkedge._linmap import Dense, Difference, LowRank, RowScaled
from bulkedge.comparison import judge_pair, load, make_plan
from bulkedge.intruder import certify, judge
from bulkedge.spectral.certificate import Probable, Rigorous
from bulkedge.triplet import GolubKahan, singular_triplet
from bulkedge.update import Secular, measure_base, predict
from bulkedge.update.predict import BaseSpectrum
from cases import orthonormal
from helpers import save, save_adapter, some, weights
from narrow import DEVICE, narrow_device

SOURCE = Path(bulkedge.__file__).parent
EXACT = (
    "_linmap", "triplet", "spectral", "intruder", "update", "comparison", "moments", "repairing",
    "tune",
)  # fmt: skip


@pytest.fixture
def put(monkeypatch):
    monkeypatch.setattr(_precision, "WITHOUT_FLOAT64", frozenset({DEVICE.type}))
    with narrow_device() as put:
        yield put


def close():
    """A matrix whose leading values lie so close that float32 is refined in float64."""
    sigma = torch.cat([torch.tensor([3.0, 2.999, 2.998]), torch.linspace(2, 1, 37)]).double()
    return (orthonormal(60, 40, 1) * sigma @ orthonormal(40, 40, 2).mT).float()


def pair():
    W0 = weights(60, 40)
    W = W0.clone()
    W[0, 0] += 40
    return W0, W


def test_the_simulated_device_has_no_float64(put):
    x = put(weights(3, 2))
    assert x.device == DEVICE
    with pytest.raises(TypeError, match="cannot convert to float64"):
        x.double()
    with pytest.raises(TypeError, match="cannot convert to float64"):
        torch.zeros(2, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="expected all tensors to be on one device"):
        x @ weights(2, 2)
    assert type(_precision.exact(x)) is torch.Tensor
    assert _precision.exact(x).dtype is torch.float64


SOLVERS = [name for name in triplet.__all__ if hasattr(getattr(triplet, name), "compute")]
ADJOINTS = [name for name in triplet.__all__ if hasattr(getattr(triplet, name), "solve")]


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "Solver"])
def test_every_solver(name, put):
    W = close() if name == "Refined" else pair()[1]
    found = singular_triplet(put(W), 1, solver=getattr(triplet, name)(), strict=False)
    assert {x.device for x in (found.sigma, found.u, found.v, found.residuals)} == {DEVICE}
    expected = float(torch.linalg.svdvals(W)[0])
    assert found.sigma.tolist()[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in ADJOINTS if name != "AdjointSolver"])
def test_every_adjoint(name, put):
    def gradient(W):
        W.requires_grad_()
        found = singular_triplet(W, 2, adjoint=getattr(triplet, name)())
        (found.u[0].square().sum() + found.sigma.sum()).backward()
        return W.grad

    there = gradient(put(close()))
    assert there.device == DEVICE
    torch.testing.assert_close(there.held, gradient(close()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("form", "method"), [("dense", "auto"), ("dense", "dense"), ("low_rank", "certified")]
)
def test_a_judgement(form, method, put):
    W0, W = pair()
    B, A = torch.eye(60)[:, :1] * 40, torch.eye(40)[:1]
    tuned = put(W) if form == "dense" else Dense(put(W0)) + LowRank(put(B), put(A))
    found = judge(put(W0), tuned, 2, method=method)
    expected = judge(W0, W, 2, method=method)
    assert [x.verdict for x in some(found.directions)] == [x.verdict for x in expected.directions]
    scores = [[x.score for x in each.directions] for each in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_proofs_and_bounds(put):
    W0, W = (put(x) for x in pair())
    proved = GolubKahan(vector_tol=1e-3, failure_probability=1e-9, oversample=8)
    found = singular_triplet(W, 1, solver=proved)
    assert found.status is triplet.Status.CONVERGED
    assert certify(W0, found.u).verdicts[0].value == "intruder"
    largest = float(torch.linalg.svdvals(W.held.double())[0])
    for certificate in (Rigorous(), Probable()):
        bound = certificate.bound(Dense(W))
        assert bound.lower <= largest * (1 + 1e-12)
        assert bound.upper >= largest


def test_wide_maps(put):
    W0, W = pair()
    x = weights(40, 2).double()
    d = weights(60).abs() + 1
    there = (Dense(put(W)), Difference(put(W), put(W0)), RowScaled(Dense(put(W)), put(d)))
    here = (W.double(), W.double() - W0.double(), d.double()[:, None] * W.double())
    for found, expected in zip(there, here, strict=True):
        wide = found.to(torch.float64)
        assert wide.device == torch.device("cpu")
        torch.testing.assert_close(wide.matmat(x), expected @ x)
        torch.testing.assert_close(wide.gram(), expected.mT @ expected)
        torch.testing.assert_close(wide.to_dense(), expected)
    back = there[0].to(torch.float64).to(torch.float32)
    assert back.device == DEVICE


@pytest.mark.parametrize("form", ["lora", "dora", "dense"])
def test_a_comparison_of_two_files(form, put, tmp_path):
    W0, W = pair()
    base = save(tmp_path / "b.safetensors", {"q.weight": W0})
    tensors = {"q.lora_A.weight": torch.eye(40)[:2], "q.lora_B.weight": torch.eye(60)[:, :2] * 40}
    tuned = save(tmp_path / "t.safetensors", {"q.weight": W})
    if form != "dense":
        more = {"q.lora_magnitude_vector": weights(60).abs() + 1} if form == "dora" else {}
        tuned = save_adapter(tmp_path / "a", tensors | more, use_dora=form == "dora")
    recipe = bulkedge.Recipe(top_k=2, method="certified")
    (comparison,) = make_plan(base, tuned, recipe).comparisons
    found, expected = (
        judge_pair(load(comparison, device), recipe) for device in (DEVICE, torch.device("cpu"))
    )
    assert [x.verdict for x in some(found.directions)] == [x.verdict for x in expected.directions]
    scores = [[x.score for x in each.directions] for each in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_updates(put):
    W0, _ = (put(x) for x in pair())
    B, A = put(weights(60, 1)), put(weights(1, 40))
    exact = torch.linalg.svdvals(W0.held.double() + 5 * B.held.double() @ A.held.double())[0]
    scaled = put(5 * B.held)
    for found in (
        Secular.from_svd(*triplet.thin_svd(W0), scaled, A),
        Secular.from_solves(W0, scaled, A),
    ):
        assert float(found.triplets(1).sigma) == pytest.approx(float(exact), rel=1e-5)
    assert len(predict(W0, scaled, A).theta) == 1
    assert measure_base(BaseSpectrum.of(W0).values, (60, 40), 40)[0] is not None


def test_float64_of_a_matrix_is_made_in_one_place():
    """``x.double()`` stays on the device of x; so do tensors made there in float64."""
    found = []
    for path in some(p for place in EXACT for p in (SOURCE / place).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                text = ast.unparse(node)
                made_there = "torch.float64" in text and "device=" in text
                if getattr(node.func, "attr", "") == "double" or made_there:
                    found.append((path.name, text))
    assert found == []
