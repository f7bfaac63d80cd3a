"""The monitor in a plain loop: its figures are those of the audit, its turns, its state."""

import io
import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import bulkedge
from bulkedge import InputError
from bulkedge.tune import AdaptedMatrix, FullMatrix, Monitor, full_matrices
from bulkedge.update import BaseSpectrum
from cases import orthonormal
from helpers import oracle_scores


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
    monitor.check()
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
            assert (seen.intruders, seen.rotated, seen.strongest) == (0, 0, 0.0)
            continue
        verdicts = [direction.verdict for direction in row.directions]
        assert "undecided" not in verdicts
        assert (seen.intruders, seen.rotated) == (
            verdicts.count("intruder"), verdicts.count("rotated"),
        )  # fmt: skip
        assert seen.intruders + seen.rotated == row.new_directions
        assert seen.worst == pytest.approx(min(d.score for d in row.directions), abs=0.02)
        spectrum = BaseSpectrum.of(matrix.base)
        assert seen.strongest == pytest.approx(
            row.spectral_norm_update / spectrum.fit.threshold, rel=1e-3
        )
        assert seen.effective_rank == pytest.approx(2.0)
    assert monitor.figures["layer2"].intruders >= 1
    metrics = monitor.metrics()
    counted = metrics["bulkedge/intruders"] + metrics["bulkedge/rotated"]
    assert counted == sum(row.new_directions or 0 for row in record.matrices)
    assert metrics["bulkedge/rotated"] >= 1
    assert metrics["bulkedge/lowest_score"] == min(x.worst for x in monitor.figures.values())


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
        Monitor(matrices[:2], thresholds={"layer0": 1.0}).load_state_dict(state)


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
    monitor.check()
    assert (monitor.figures["three"].intruders, monitor.figures["none"].intruders) == (0, 0)
    assert monitor.figures["none"].worst == 1.0


def test_the_worst_layer_has_a_name_and_patterns_choose():
    matrices = [adapted(s, f"layer{i}", 20 * i) for i, s in enumerate((0.1, 6.0, 0.1))]
    monitor = Monitor(matrices)
    assert monitor.worst_layer is None
    monitor.check()
    assert monitor.worst_layer == "layer1"
    known = {"layer0": 1.0, "layer2": 1.0}
    chosen = Monitor(matrices, include=["*0", "layer2"], thresholds=known)
    assert [matrix.name for matrix in chosen.matrices] == ["layer0", "layer2"]
    chosen.check(0)
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
        ({"every": 0}, "expected every ≥ 1, got 0; give Monitor a"),
        ({"per_call": 0}, "expected per_call ≥ 1, got 0; give Monitor a"),
        ({"top_k": 0}, "expected top_k ≥ 1, got 0; give Monitor a"),
        ({"epsilon": 0.0}, r"expected epsilon between 0, excluded, and 1, got 0\.0"),
        ({"epsilon": 2.0}, r"expected epsilon between 0, excluded, and 1, got 2\.0"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        Monitor([adapted(1.0)], thresholds={"layer": 1.0}, **options)
    with pytest.raises(InputError, match=r"expected matrices to watch, .* got none"):
        Monitor([])
    with pytest.raises(InputError, match="got two named layer"):
        Monitor([adapted(1.0), adapted(1.0)])


@pytest.mark.parametrize("per_call", [1, 2, 3])
def test_a_model_that_does_not_change_has_figures_that_do_not(per_call):
    """No count before every layer was seen; the same ever after."""
    matrices = [adapted(6.0, f"layer{i}", 20 * i) for i in range(5)]
    known = dict.fromkeys((matrix.name for matrix in matrices), 1.0)
    monitor = Monitor(matrices, every=1, per_call=per_call, top_k=4, thresholds=known)
    counts = []
    for look in range(1, 11):
        monitor.step()
        metrics = monitor.metrics()
        seen = min(look * per_call, 5)
        assert metrics["bulkedge/coverage"] == seen / 5
        assert monitor.complete is (seen == 5)
        names = ("bulkedge/intruders", "bulkedge/rotated", "bulkedge/undecided")
        assert [name in metrics for name in names] == [seen == 5] * 3
        mean = sum(x.intruders for x in monitor.figures.values()) / seen
        assert metrics["bulkedge/new_directions_per_layer"] == mean
        if seen == 5:
            counts.append(tuple(metrics[name] for name in names))
    assert len(set(counts)) == 1
    assert counts[0][0] >= 5  # one a layer at least
    alone = [Monitor([x], top_k=4, thresholds={x.name: 1.0}) for x in matrices]
    for each in alone:
        each.check()
    assert counts[0][0] == sum(each.metrics()["bulkedge/intruders"] for each in alone)


def test_rotated_directions_are_not_intruders():
    """Base vectors turned among each other: nothing is new."""
    W0 = base().double()
    U, S, Vt = torch.linalg.svd(W0, full_matrices=False)
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    mixed = U.clone()
    mixed[:, :4] = U[:, :4] @ signs.double() / 2  # half of each of four
    monitor = Monitor([FullMatrix("w", W0, mixed * S @ Vt)], top_k=4, epsilon=0.6)
    monitor.check()
    seen = monitor.figures["w"]
    assert (seen.intruders, seen.rotated) == (0, 4)
    assert monitor.metrics()["bulkedge/intruders"] == 0
    assert monitor.metrics()["bulkedge/rotated"] == 4


# -- what happens to a model whose weights are trained in full ------------------------------------


def shard(model, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def swap(model):
    other = nn.Linear(70, 90)
    other.weight.data.copy_(model[0].weight.detach())
    model[0] = other
    return model


CHANGES = {
    "nothing": lambda model, _: model,
    "double": lambda model, _: model.double(),
    "bfloat16": lambda model, _: model.bfloat16(),
    "swapped": lambda model, _: swap(model),
    "assigned": lambda model, _: (
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
        model,
    )[1],
    "sharded": shard,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_is_found_by_its_name(change, tmp_path):
    model = nn.Sequential(nn.Linear(70, 90))
    model[0].weight.data.copy_(base())
    watched = full_matrices(model)
    monitor = Monitor(watched, every=1)
    monitor.step()
    try:
        model = CHANGES[change](model, tmp_path)
        with torch.no_grad():
            model[0].weight.mul_(2)
        monitor.step()
        weight = model[0].weight.detach()
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        exact = float(torch.linalg.matrix_norm(weight.double() - base().double(), 2))
        seen = monitor.figures["0.weight"].strongest * monitor.thresholds["0.weight"]
        assert seen == pytest.approx(exact, rel=1e-4)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: model.pop(0),
            "0.weight: after step 1: expected the weight that was found .* no such",
        ),
        (
            lambda model: model.__setitem__(0, nn.Linear(9, 9)),
            r"0.weight: after step 1: expected a weight of the shape of its base, \(90, 70\), got",
        ),
        (lambda model: model.to("meta"), "0.weight: .*expected parameters in memory"),
    ],
)
def test_a_weight_that_is_gone_is_missed(change, message):
    model = nn.Sequential(nn.Linear(70, 90))
    monitor = Monitor(full_matrices(model), every=1, thresholds={"0.weight": 1.0})
    change(model)
    with pytest.raises(InputError, match=message):
        monitor.step()


def test_a_weight_of_another_shape_than_its_base_is_refused():
    with pytest.raises(InputError, match="w: expected a weight of the shape of its base"):
        FullMatrix("w", torch.zeros(3, 4), torch.zeros(4, 3))


def test_an_open_verdict_is_counted_once_and_decided_by_a_full_pass():
    """ε is set beside the very score: vectors in working precision cannot tell them apart."""
    W0 = base().double()
    W = W0 + 6 * orthonormal(90, 1, 5).double() @ orthonormal(70, 1, 6).double().mT
    score = float(oracle_scores(W0, W, 1)[0])
    monitor = Monitor([FullMatrix("w", W0, W)], top_k=1, every=1, epsilon=score + 1e-5)
    monitor.step()
    seen = monitor.figures["w"]
    assert (seen.intruders, seen.rotated, seen.undecided) == (0, 0, 1)
    assert seen.energy == monitor.metrics()["bulkedge/new_directions"] == 0
    monitor.check()
    seen = monitor.figures["w"]
    assert (seen.new_directions, seen.undecided) == (1, 0)


def test_the_energy_share_is_that_of_the_new_directions():
    W0 = base().double()
    W = W0 + 6 * orthonormal(90, 1, 5).double() @ orthonormal(70, 1, 6).double().mT
    monitor = Monitor([FullMatrix("w", W0, W)], top_k=4)
    monitor.check()
    squares = torch.linalg.svdvals(W)[:4].square()
    new = oracle_scores(W0, W, 4) < 0.5
    assert 0 < int(new.sum()) < 4
    assert int(new.sum()) == monitor.figures["w"].new_directions
    share = float(squares[new].sum() / squares.sum())
    assert monitor.metrics()["bulkedge/energy_share"] == pytest.approx(share, rel=1e-4)


def test_the_run_as_a_figure():
    pytest.importorskip("matplotlib")
    monitor = Monitor([adapted(6.0)], every=1, top_k=3)
    with pytest.raises(InputError, match="got no check yet; call check"):
        monitor.figure()
    for _ in range(3):
        monitor.step()
    figure = monitor.figure()
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == [
        "new directions", "per layer", "lowest score", "strongest spike / θ", "energy share",
    ]  # fmt: skip
    scores = figure.axes[2].lines[0]
    assert list(scores.get_xdata()) == [1, 2, 3]
    assert list(scores.get_ydata()) == [x["bulkedge/lowest_score"] for _, x in monitor.history]
    figure.savefig(io.BytesIO())


def test_what_a_check_costs_is_told_from_the_first_one_on():
    monitor = Monitor([adapted(6.0)], every=100)
    assert monitor.check_seconds == 0
    monitor.check()
    assert 0 < monitor.metrics()["bulkedge/check_seconds"] == monitor.check_seconds < 10
