"""The methods as numbers: what each does to a matrix, by dense float64 computations."""

from dataclasses import dataclass

import pytest
import torch

import bulkedge
from bulkedge import Clip, InputError, Project, Scale, Shrink
from bulkedge.repairing import Case, Correction, Method
from bulkedge.rmt import fit_bulk, spike
from bulkedge.update import update_svd
from cases import gaussian, orthonormal
from helpers import save, save_adapter, some

M, N, K = 60, 50, 4
RECIPE = {"top_k": K, "method": "dense"}


def base():
    return gaussian(M, N).float().double()


def spiked(*theta, seed=3):
    """A generic update with given spikes, as factors B and A."""
    r = len(theta)
    return orthonormal(M, r, seed) * torch.tensor(theta).double(), orthonormal(N, r, seed + 1).mT


def threshold():
    values = torch.linalg.svdvals(base())
    return fit_bulk(values, (M, N)).threshold


def repaired(tmp_path, W0, B, A, method, *, dense=False, **settings):
    """The update after a repair, and the record."""
    save(tmp_path / "base.safetensors", {"q.weight": W0})
    recipe = RECIPE | settings.pop("recipe", {})
    if dense:
        tuned = save(tmp_path / "tuned.safetensors", {"q.weight": W0 + B @ A})
        found = bulkedge.repair(
            tmp_path / "base.safetensors", tuned, tmp_path / "out", method=method,
            recipe=recipe, **settings,
        )  # fmt: skip
        stored = bulkedge.checkpoint.open_checkpoint(tmp_path / "out/tuned.safetensors")
        return bulkedge.checkpoint.read_tensor(stored.tensors["q.weight"]) - W0, found
    r = A.shape[0]
    tensors = {"q.lora_A.weight": A, "q.lora_B.weight": B}
    adapter = save_adapter(tmp_path / "tuned", tensors, r=r, lora_alpha=r)
    found = bulkedge.repair(
        tmp_path / "base.safetensors", adapter, tmp_path / "out", method=method, recipe=recipe,
        **settings,
    )  # fmt: skip
    written = adapter if found.output is None else tmp_path / "out"  # nothing where all is refused
    (factors,) = bulkedge.checkpoint.open_adapter(written).factors.values()
    B, A, scale = factors.read()
    return scale * B @ A, found


@pytest.mark.parametrize("dense", [False, True])
def test_clip_holds_spikes_and_keeps_vectors(dense, tmp_path):
    B, A = spiked(40.0, 30.0, 1.0)
    update, record = repaired(tmp_path, base(), B, A, Clip(), dense=dense)
    U, S, Vt = torch.linalg.svd(B @ A)
    (row,) = record.matrices
    held = threshold() * 0.9 ** (row.rounds - 1)
    expected = (U[:, :3] * S[:3].clamp_max(held)) @ Vt[:3]
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-9)
    assert record.after.summary.new_directions == 0
    assert row.energy_removed == pytest.approx(1 - float((update.norm() / (B @ A).norm()) ** 2))
    assert row.change == pytest.approx(float((update - B @ A).norm() / (B @ A).norm()))


def test_clip_lower_where_an_intruder_remains(tmp_path):
    """An update that takes what the base is strongest in is not generic: it takes more rounds."""
    W0 = base()
    strong = torch.linalg.svd(W0).Vh[1:13].mT
    B, A = 40 * orthonormal(M, 3, 20), (strong @ orthonormal(12, 3, 5)).mT
    _, once = repaired(tmp_path / "a", W0, B, A, Clip(rounds=1))
    _, more = repaired(tmp_path / "b", W0, B, A, Clip())
    assert once.after.summary.new_directions > more.after.summary.new_directions == 0
    assert once.matrices[0].intruders_after == once.after.summary.new_directions
    assert more.matrices[0].rounds > 1


def test_shrink_weighs_spikes_by_their_overlaps(tmp_path):
    B, A = spiked(40.0, 20.0, 1.0)
    update, _ = repaired(tmp_path, base(), B, A, Shrink())
    fit = fit_bulk(torch.linalg.svdvals(base()), (M, N))
    found = spike(torch.tensor([40.0, 20.0, 1.0]).double(), bulk=fit.bulk)
    weight = found.theta * (found.left_overlap * found.right_overlap).sqrt()
    assert weight[0] > weight[1] > weight[2] == 0
    U, _, Vt = torch.linalg.svd(B @ A)
    torch.testing.assert_close(update, (U[:, :3] * weight) @ Vt[:3], rtol=1e-9, atol=1e-9)


def test_shrink_denoises_a_dense_update(tmp_path):
    """Nearer to the planted update than what was there, and than any other weight of its spikes."""
    W0 = 3 * base()
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(M, N, generator=generator, dtype=torch.float64)
    B, A = spiked(60.0, 30.0)
    noisy = torch.cat([B, noise], dim=1), torch.cat([A, torch.eye(N).double()])
    update, record = repaired(tmp_path, W0, *noisy, Shrink(), dense=True)
    error = (update - B @ A).norm()
    U, S, Vt = torch.linalg.svd(B @ A + noise)
    assert error < 0.4 * noise.norm()
    assert torch.linalg.matrix_rank(update, rtol=1e-9) == 2
    cut = (U[:, :2] * S[:2]) @ Vt[:2]
    assert error < (cut - B @ A).norm()
    assert record.matrices[0].status == "repaired"


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_project_takes_the_new_part_and_nothing_else(side, dense, tmp_path):
    W0 = base()
    B, A = spiked(40.0, 30.0)
    update, record = repaired(
        tmp_path, W0, B, A, Project(rounds=1), dense=dense, recipe={"side": side}
    )
    U0, _, V0t = torch.linalg.svd(W0)
    U, _, Vt = torch.linalg.svd(W0 + B @ A)
    (row,) = record.matrices
    expected = B @ A
    for which, vectors, space in (("left", U, U0), ("right", Vt.mT, V0t.mT)):
        index = sorted({found.index for found in row.directions if found.side == which})
        outside = vectors[:, index] - space[:, : 2 * K] @ space[:, : 2 * K].mT @ vectors[:, index]
        Z = torch.linalg.qr(outside).Q
        if which == "left":
            expected = expected - Z @ Z.mT @ expected
        else:
            expected = expected - expected @ Z @ Z.mT
    # the base's leading space is found to a few digits
    assert (update - expected).norm() < 1e-3 * (B @ A).norm()
    assert side == "both" or {found.side for found in row.directions} == {side}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("method", [Scale(0.0, rounds=5), Clip(), Project()])
def test_a_second_repair_changes_nothing(method, dense, tmp_path):
    B, A = spiked(40.0, 30.0, 25.0)
    _, first = repaired(tmp_path, base(), B, A, method, dense=dense)
    assert first.after.summary.new_directions == 0
    out = tmp_path / "out"
    again = bulkedge.repair(
        tmp_path / "base.safetensors", out / "tuned.safetensors" if dense else out,
        tmp_path / "again", method=method, recipe=RECIPE,
    )  # fmt: skip
    assert again.matrices == []
    for file in some(out.glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert again.before.matrices == first.after.matrices


def test_a_method_of_ones_own(tmp_path):
    @dataclass(frozen=True)
    class Halve:
        """Half of every update that has an intruder."""

        rounds: int = 1

        def correct(self, case: Case) -> Correction:
            return Correction(-0.5 * case.spikes.P, case.spikes.Q)

    assert isinstance(Halve(), Method)
    B, A = spiked(40.0, 30.0)
    update, record = repaired(tmp_path, base(), B, A, Halve())
    torch.testing.assert_close(update, B @ A / 2)
    assert record.method == {"name": "Halve", "rounds": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scale(1.5), r"expected keep between 0 and 1, got 1.5"),
        (lambda: Scale(float("nan")), r"expected keep between 0 and 1"),
        (lambda: Clip(-0.1), r"expected level between 0 and 1, got -0.1"),
        (lambda: Project(0), r"expected rounds ≥ 1, got 0"),
        (lambda: Shrink(-1), r"expected rounds ≥ 1, got -1"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_base_without_a_bulk_is_refused_by_name(tmp_path):
    W0 = torch.eye(60, dtype=torch.float64)[:, :8]
    B, A = orthonormal(60, 1, 1) * 9, orthonormal(8, 1, 2).mT
    _, record = repaired(tmp_path, W0, B, A, Clip())
    (row,) = record.matrices
    assert row.status == "refused"
    assert row.note == "expected a base with a bulk and so a threshold; scale or project"


def test_a_bulk_that_ends_in_a_step_is_refused_by_name(tmp_path):
    from cases import with_spectrum

    W0 = with_spectrum(200, 200, torch.linspace(1, 0.5, 200))
    B, A = orthonormal(200, 1, 8) * 3, orthonormal(200, 1, 9).mT
    _, record = repaired(tmp_path, W0, B, A, Clip())
    (row,) = record.matrices
    assert row.status == "refused"
    assert "whose bulk ends in a step" in row.note


def test_corrections_compose():
    X, Y = torch.ones(3, 1).double(), torch.ones(2, 1).double()
    one, nothing = Correction(X, Y), Correction(0 * X, Y)
    both = one.then(nothing).then(one)
    assert both.X.shape == (3, 2)
    anew = one.then(Correction(2 * X, Y, anew=True)).then(one)
    assert anew.anew
    assert anew.X.shape == (3, 2)
    assert not Correction.none((3, 2), torch.device("cpu")).then(nothing).changes


def test_spikes_of_a_dense_update_are_all_found():
    update = bulkedge.triplet.Dense(orthonormal(60, 40, 1) @ orthonormal(50, 40, 2).mT * 5)
    case = Case(
        base=update, tuned=update, update=update, sigma=torch.ones(0), u=torch.ones(60, 0),
        v=torch.ones(50, 0), left=torch.ones(0), right=torch.ones(0), spikes=None, fit=None,
        subspace=4,
    )  # fmt: skip
    gamma, u, v = case.spikes_above(1.0)
    assert gamma.shape == (40,)
    torch.testing.assert_close((u * gamma) @ v.mT, update.to_dense(), rtol=1e-8, atol=1e-8)
    factors = update_svd(torch.eye(60, 2).double() * 3, torch.eye(2, 50).double(), 1.0, (60, 50))
    gamma, _, _ = Case(**{**vars(case), "spikes": factors}).spikes_above(2.0)
    assert gamma.tolist() == pytest.approx([3.0, 3.0])
