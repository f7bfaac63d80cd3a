"""The norm of an update, whatever its values: flat, tied, decaying, far from one."""

import pytest
import torch

from bulkedge.comparison import Pair
from helpers import weights

SHAPES = [(100, 100), (600, 200), (200, 600), (44, 13)]
ROUNDED = 1e-12


def orthonormal(n, p, seed):
    return torch.linalg.qr(weights(n, p, seed=seed, dtype=torch.float64)).Q


def spectrum(kind, p):
    i, drawn = torch.arange(p).double(), torch.rand(p, generator=torch.Generator().manual_seed(2))
    return {
        "flat 1e-1": 1 - 1e-1 * drawn,
        "flat 1e-3": 1 - 1e-3 * drawn,
        "flat 1e-5": 1 - 1e-5 * drawn,
        "near": 1 - 1e-3 * i / p,
        "tied": torch.ones(p),
        "a step": torch.where(i < 8, 1.0, 0.999),
        "slow": (i + 1) ** -0.1,
        "fast": (i + 1) ** -2.0,
    }[kind].double()


KINDS = ["flat 1e-1", "flat 1e-3", "flat 1e-5", "near", "tied", "a step", "slow", "fast"]


def changed(kind, shape, dtype=torch.float64, size=1.0):
    p = min(shape)
    change = orthonormal(shape[0], p, 0) * spectrum(kind, p) @ orthonormal(shape[1], p, 1).mT
    base = (size * weights(*shape, seed=3).double()).to(dtype)
    tuned = (base.double() + size * change).to(dtype)
    return Pair(base, tuned, None), float(torch.linalg.matrix_norm(tuned.double() - base, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_small_matrix_is_right_to_all_digits(kind, shape, dtype):
    pair, norm = changed(kind, shape, dtype)
    assert pair.update_norm(0) == pytest.approx(norm, rel=ROUNDED)
    assert norm <= pair.update_norm_bound() <= norm * (1 + 1e-10)


@pytest.mark.parametrize("size", [1e-170, 1e-140, 1e140, 1e150])
def test_sizes_whose_squares_float64_cannot_hold(size):
    pair, norm = changed("slow", (44, 13), size=size)
    assert pair.update_norm(0) == pytest.approx(norm, rel=ROUNDED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_matrix_is_right_as_far_as_is_said_and_bounded(kind):
    pair, norm = changed(kind, (790, 900))
    assert norm * (1 - 1e-3) <= pair.update_norm(0) <= norm * (1 + ROUNDED)
    assert norm <= pair.update_norm_bound() <= norm * 1.01
    if kind == "fast":  # σ₂ = σ₁/4
        assert pair.update_norm(0) == pytest.approx(norm, rel=1e-6)


def test_nothing_changed_has_no_norm():
    base = weights(20, 30)
    assert Pair(base, None, None).update_norm(0) == 0
    assert Pair(base, None, None).update_norm_bound() == 0
