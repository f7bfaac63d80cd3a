"""The critical scale that is measured, against float64 SVDs on a grid."""

import pytest
import torch

import bulkedge
from bulkedge.update.bracket import WIDTH
from cases import coming_and_going, orthonormal
from helpers import save, save_adapter, some

K, EPSILON = 4, 0.5


def trained(m, n, seed):
    """Noise under outliers, as trained weights look."""
    noise = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).double()
    u, v = orthonormal(m, 6, seed), orthonormal(n, 6, seed + 1)
    return noise + 2 * (m**0.5) * (u * torch.linspace(3, 1, 6).double()) @ v.mT


def lowest_score(base, update, scale, side):
    """The lowest score of the leading directions, by two SVDs."""
    vectors = torch.linalg.svd(base, full_matrices=False)
    tuned = torch.linalg.svd(base + scale * update, full_matrices=False)
    U, T = (vectors.U, tuned.U) if side == "left" else (vectors.Vh.mT, tuned.Vh.mT)
    return float((U.mT @ T[:, :K]).abs().amax(0).min())


def first_new(base, update, scales, side):
    """The first scale of a grid at which something is new."""
    return next((s for s in scales if lowest_score(base, update, s, side) < EPSILON), None)


@pytest.fixture(scope="module")
def matrices():
    """Bases, and updates that are generic, aligned in part with the base, and weak."""
    base = {f"l{i}.weight": trained(100, 80, 10 * i) for i in range(3)}
    update = {}
    for i, (name, W) in enumerate(base.items()):
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        B, A = 6 * orthonormal(100, 2, 50 + i), orthonormal(80, 2, 60 + i).mT.clone()
        if i == 1:
            B = B + 4 * U[:, :2]
            A = A + 0.7 * Vh[1:3]
        update[name] = (B * (0.3 if i == 2 else 6.0), A)
    return base, update


@pytest.fixture(scope="module", params=["lora", "dense"])
def audited(request, matrices, tmp_path_factory):
    base, factors = matrices
    folder = tmp_path_factory.mktemp("scale")
    path = save(folder / "b.safetensors", base)
    update = {name: B @ A for name, (B, A) in factors.items()}
    if request.param == "dense":
        tuned = save(folder / "t.safetensors", {n: W + update[n] for n, W in base.items()})
    else:
        stored = {
            f"{name.removesuffix('.weight')}.lora_{key}.weight": value
            for name, (B, A) in factors.items()
            for key, value in (("B", B), ("A", A))
        }
        tuned = save_adapter(folder / "a", stored, r=2, lora_alpha=2)
    recipe = {"top_k": K, "epsilon": EPSILON, "critical_scale": True}
    return bulkedge.audit(path, tuned, recipe=recipe), update


def test_the_first_new_direction_lies_in_the_bracket(audited, matrices):
    record, update = audited
    assert len(record.matrices) == 3
    for row in some(record.matrices):
        base, change = matrices[0][row.name], update[row.name]
        found = row.critical_scale
        assert found.undecided == 0
        assert found.low < found.high <= WIDTH * found.low
        assert lowest_score(base, change, found.low, "left") >= EPSILON
        assert lowest_score(base, change, found.high, "left") < EPSILON
        grid = [found.high * 1.03**-i for i in range(80, -1, -1)]  # from a tenth on
        first = first_new(base, change, grid, "left")
        assert found.low < first <= found.high
        assert (found.high <= 1) == bool(row.new_directions) or found.low < 1 < found.high
        assert found.aligned == (row.update == "lora")
        if found.aligned:
            assert found.expected == pytest.approx(first, rel=0.06)


def test_nothing_that_was_judged_up_to_the_low_end_is_new(audited):
    record, _ = audited
    for row in some(record.matrices):
        judged, found = row.scale_curve.judged, row.critical_scale
        assert {point.new for point in judged if point.scale <= found.low} == {0}
        above = next(point for point in judged if point.scale > found.low)
        assert (above.scale, above.new > 0) == (found.high, True)


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_windows_in_which_something_is_new_are_found(kind, tmp_path):
    """Below the measured scale a grid in steps of half a per cent finds nothing new."""
    cases = {f"l{seed}": coming_and_going(seed) for seed in (4, 5, 10)}
    tuned = {f"{name}.weight": W + B @ A for name, (W, B, A) in cases.items()}
    factors = {f"{n}.lora_{x}.weight": f for n, (_, *two) in cases.items()
               for x, f in zip("BA", two, strict=True)}  # fmt: skip
    paths = (
        save(tmp_path / "b.safetensors", {f"{name}.weight": W for name, (W, *_) in cases.items()}),
        save(tmp_path / "t.safetensors", tuned)
        if kind == "dense"
        else save_adapter(tmp_path / "a", factors, r=8, lora_alpha=8,
                          rank_pattern={n: two[0].shape[1] for n, (_, *two) in cases.items()},
                          alpha_pattern={n: two[0].shape[1] for n, (_, *two) in cases.items()}),
    )  # fmt: skip
    for row in some(bulkedge.audit(*paths, recipe={"top_k": 6, "critical_scale": True}).matrices):
        W, B, A = cases[row.name.removesuffix(".weight")]
        grid = torch.tensor([0.05 * 1.005**i for i in range(640)]).double()
        moved = torch.linalg.svd(W + grid[:, None, None] * (B @ A))[0][..., :6]
        new = moved.abs().amax(-2).amin(-1) < EPSILON  # the base is diagonal
        first = float(grid[new][0])
        assert row.critical_scale.low < first <= 1.005 * row.critical_scale.high
        later = new[grid > first]
        assert bool((~later).any()), "it goes again"


def test_bases_that_are_judged_by_products_alone(tmp_path):
    """Both sides, by certificates."""
    base = trained(420, 400, 5)
    update = 200 * orthonormal(420, 1, 6) @ orthonormal(400, 1, 7).mT
    paths = (
        save(tmp_path / "b.safetensors", {"l.weight": base.float()}),
        save(tmp_path / "t.safetensors", {"l.weight": (base + update).float()}),
    )
    recipe = {"top_k": K, "critical_scale": True, "side": "both", "method": "certified"}
    (row,) = bulkedge.audit(*paths, recipe=recipe).matrices
    found = row.critical_scale
    assert {direction.method for direction in row.directions} == {"certified"}
    assert found.low < found.high <= WIDTH * found.low
    sides = ("left", "right")
    assert min(lowest_score(base, update, found.low, side) for side in sides) >= EPSILON
    assert min(lowest_score(base, update, found.high, side) for side in sides) < EPSILON
    assert found.expected == pytest.approx(found.high, rel=0.25)


def test_a_base_that_is_judged_by_products_gives_its_leading_vectors(tmp_path):
    """What the certificate has found of the base is enough for the law."""
    base = trained(420, 400, 5)
    B, A = 20 * orthonormal(420, 2, 6), 10 * orthonormal(400, 2, 7).mT
    update = B @ A
    path = save(tmp_path / "b.safetensors", {"l.weight": base.float()})
    stored = {"l.lora_B.weight": B.float(), "l.lora_A.weight": A.float().contiguous()}
    adapter = save_adapter(tmp_path / "a", stored, r=2, lora_alpha=2)
    (row,) = bulkedge.audit(path, adapter, recipe={"top_k": K, "method": "certified"}).matrices
    assert {direction.method for direction in row.directions} == {"certified"}
    found = row.critical_scale
    assert found.aligned
    assert lowest_score(base, update, found.expected / 1.06, "left") >= EPSILON
    assert lowest_score(base, update, found.expected * 1.06, "left") < EPSILON
