"""The monitor in a plain loop: its figures are those of the audit, its turns, its state."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bulkedge
from bulkedge import InputError
from bulkedge.tune import AdaptedMatrix, FullMatrix, Monitor, full_matrices
from bulkedge.update import BaseSpectrum
from cases import orthonormal


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base(m=90, n=70, seed=0):
    """Noise with twelve outliers."""
    outliers = torch.linspace(4.0, 2.0, 12, dtype=torch.float64)
    structure = orthonormal(m, 12, seed) * outliers @ orthonormal(n, 12, seed + 1).mT
    return draw(m, n, seed=seed) / (m**0.5 + n**0.5) + structure.float()


def adapted(strength, name="layer", seed=0):
    B = strength * orthonormal(90, 2, seed + 5).float()
    return AdaptedMatrix(name, base(seed=seed), orthonormal(70, 2, seed + 6).float().mT, B)


def test_figures_are_those_of_the_audit(tmp_path):
    matrices = [adapted(s, f"layer{i}", 20 * i) for i, s in enumerate((0.0, 0.4, 6.0))]
    monitor = Monitor(matrices)
    monitor.look()
    for side in ("base", "tuned"):
        save_file(
            {
                f"{matrix.name}.weight": matrix.base
                + (matrix.B @ matrix.A if side == "tuned" else 0 * matrix.base)
                for matrix in matrices
            },
            tmp_path / f"{side}.safetensors",
        )
    record = bulkedge.audit(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    for matrix, row in zip(matrices, record.matrices, strict=True):
        seen = monitor.figures[matrix.name]
        if row.status == "unchanged":
            assert (seen.intruders, seen.strongest) == (0, 0.0)
            continue
        assert seen.intruders == row.intruders
        assert seen.worst == pytest.approx(min(d.score for d in row.directions), abs=0.02)
        spectrum = BaseSpectrum.of(matrix.base)
        assert seen.strongest == pytest.approx(
            row.spectral_norm_update / spectrum.fit.threshold, rel=1e-3
        )
        assert seen.effective_rank == pytest.approx(2.0)
    assert monitor.figures["layer2"].intruders >= 1
    metrics = monitor.metrics()
    assert metrics["bulkedge/intruders"] == sum(row.intruders or 0 for row in record.matrices)
    assert metrics["bulkedge/worst_score"] == min(x.worst for x in monitor.figures.values())


def test_layers_take_turns():
    matrices = [adapted(1.0, f"layer{i}", 20 * i) for i in range(3)]
    known = {matrix.name: 1.0 for matrix in matrices}
    monitor = Monitor(matrices, every=2, per_call=1, top_k=4, thresholds=known)
    assert monitor.metrics() == {}
    assert [monitor.step() for _ in range(8)] == [False, True] * 4
    assert {name: x.step for name, x in monitor.figures.items()} == {
        "layer0": 8, "layer1": 4, "layer2": 6,
    }  # fmt: skip


def test_a_state_goes_on():
    matrices = [adapted(1.0, f"layer{i}", 20 * i) for i in range(3)]
    known = {matrix.name: 1.0 for matrix in matrices}
    first = Monitor(matrices, every=1, per_call=1, top_k=4, thresholds=known)
    first.step()
    state = json.loads(json.dumps(first.state_dict()))
    second = Monitor(matrices, every=1, per_call=1, top_k=4, thresholds=known)
    second.load_state_dict(state)
    second.step()
    assert set(second.figures) == {"layer0", "layer1"}
    assert second.figures["layer0"] == first.figures["layer0"]
    with pytest.raises(InputError, match="only one side has layer2"):
        Monitor(matrices[:2], thresholds=known).load_state_dict(state)


def test_a_full_fine_tune():
    model = nn.Sequential(nn.Embedding(90, 70), nn.Linear(70, 90), nn.Linear(90, 3))
    with torch.no_grad():
        model[1].weight.copy_(base())
    watched = full_matrices(model)  # neither the embedding nor the head, which has no bulk
    assert [matrix.name for matrix in watched] == ["1.weight"]
    monitor = Monitor(watched, every=1)
    monitor.step()
    assert monitor.figures["1.weight"].intruders == 0
    assert monitor.figures["1.weight"].strongest == 0
    with torch.no_grad():
        model[1].weight += 9 * draw(90, 1, seed=7) @ draw(1, 70, seed=8) / 6300**0.5
    monitor.step()
    seen = monitor.figures["1.weight"]
    assert seen.intruders == 1
    update = torch.linalg.matrix_norm(model[1].weight.detach() - watched[0].base, 2)
    assert seen.strongest * monitor.thresholds["1.weight"] == pytest.approx(float(update), rel=1e-4)


def test_a_full_fine_tune_that_is_resumed_is_told_its_base():
    model = nn.Sequential(nn.Linear(70, 90))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight += 9 * draw(90, 1, seed=7) @ draw(1, 70, seed=8) / 6300**0.5
    monitor = Monitor(full_matrices(model, base=before), every=1)
    monitor.step()
    assert monitor.figures["0.weight"].intruders == 1
    for wrong, found in (({}, "nothing"), ({"0.weight": torch.zeros(2, 2)}, r"\(2, 2\)")):
        with pytest.raises(InputError, match=rf"0\.weight: expected its base .* got {found}"):
            full_matrices(model, base=wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_weight_is_looked_at_in_its_own_precision(dtype):
    W0 = base().to(dtype)
    weight = (W0.double() + 6 * orthonormal(90, 1, 5) @ orthonormal(70, 1, 6).mT).to(dtype)
    monitor = Monitor([FullMatrix("w", W0, weight)], every=1)
    monitor.step()
    expected = torch.linalg.matrix_norm((weight.double() - W0.double()), 2)
    seen = monitor.figures["w"].strongest * monitor.thresholds["w"]
    assert seen == pytest.approx(float(expected), rel=1e-4)


def test_directions_of_nothing_are_no_intruders():
    """The vectors of a value of zero are any."""
    W0 = base()
    U, S, V = torch.linalg.svd(W0)
    lowrank = U[:, :3] * S[:3] @ V[:3]
    monitor = Monitor([FullMatrix("three", W0, lowrank), FullMatrix("none", W0, 0 * W0)])
    monitor.look()
    assert (monitor.figures["three"].intruders, monitor.figures["none"].intruders) == (0, 0)
    assert monitor.figures["none"].worst == 1.0


def test_the_worst_layer_has_a_name_and_patterns_choose():
    matrices = [adapted(s, f"layer{i}", 20 * i) for i, s in enumerate((0.1, 6.0, 0.1))]
    monitor = Monitor(matrices)
    assert monitor.worst_layer is None
    monitor.look()
    assert monitor.worst_layer == "layer1"
    known = {matrix.name: 1.0 for matrix in matrices}
    chosen = Monitor(matrices, modules=["*0", "layer2"], thresholds=known)
    assert [matrix.name for matrix in chosen.matrices] == ["layer0", "layer2"]
    chosen.look(0)
    assert chosen.metrics() == {}


def test_what_has_diverged_is_named():
    matrix = adapted(1.0)
    monitor = Monitor([matrix], every=1)
    monitor.step()
    matrix.B[0, 0] = torch.nan
    with pytest.raises(InputError, match="layer: after step 2: expected finite entries"):
        monitor.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every, per_call and top_k ≥ 1, got 0,"),
        ({"per_call": 0}, r"every, per_call and top_k ≥ 1, got \d+, 0,"),
        ({"top_k": 0}, r"every, per_call and top_k ≥ 1, got \d+, \w+, 0"),
        ({"epsilon": 0.0}, r"epsilon in \(0, 1\], got 0\.0"),
        ({"epsilon": 2.0}, r"epsilon in \(0, 1\], got 2\.0"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        Monitor([adapted(1.0)], thresholds={"layer": 1.0}, **options)
    with pytest.raises(InputError, match=r"expected matrices to watch, .* got none"):
        Monitor([])
    with pytest.raises(InputError, match="got two named layer"):
        Monitor([adapted(1.0), adapted(1.0)])
