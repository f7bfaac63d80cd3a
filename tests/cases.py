"""Matrices with known spectra: every solver and every score is tried on all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SHAPES = [(60, 60), (90, 40), (40, 90), (12, 12), (1, 7), (7, 1)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    gaussian = torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q


def with_spectrum(m: int, n: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """U diag(σ) Vᵀ with Haar vectors, float64."""
    p = min(m, n)
    return (orthonormal(m, p, seed) * sigma[:p].double()) @ orthonormal(n, p, seed + 1).mT


def gaussian(m: int, n: int) -> Tensor:
    return torch.randn(m, n, generator=generator(7), dtype=torch.float64)


def decaying(m: int, n: int) -> Tensor:
    return with_spectrum(m, n, torch.arange(1, min(m, n) + 1) ** -1.0)


def step(m: int, n: int) -> Tensor:
    return with_spectrum(m, n, torch.where(torch.arange(min(m, n)) < 5, 2.0, 1.0))


def nearly_degenerate(m: int, n: int) -> Tensor:
    return with_spectrum(m, n, 1 - 1e-4 * torch.arange(min(m, n)).double())


def spiked(m: int, n: int) -> Tensor:
    return gaussian(m, n) + 40.0 * orthonormal(m, 1, 3) @ orthonormal(n, 1, 4).mT


def rank_deficient(m: int, n: int) -> Tensor:
    return with_spectrum(m, n, torch.where(torch.arange(min(m, n)) < 3, 1.5, 0.0))


def zero(m: int, n: int) -> Tensor:
    return torch.zeros(m, n, dtype=torch.float64)


def identity(m: int, n: int) -> Tensor:
    return torch.eye(m, n, dtype=torch.float64)


MATRICES: dict[str, Callable[[int, int], Tensor]] = {
    make.__name__: make
    for make in (
        gaussian,
        decaying,
        step,
        nearly_degenerate,
        spiked,
        rank_deficient,
        zero,
        identity,
    )
}


def coming_and_going(seed, n=40):
    """A base, outliers over noise, and the factors of an update that leans towards the outliers.

    Scaled up, most such updates make new directions, lose them, and make them again.
    """
    rank = (2, 8, 16)[seed % 3]
    values = torch.cat([torch.linspace(6, 2, 14), torch.linspace(1.9, 0.1, n - 14)]).double()
    B, A = (
        torch.randn(n, rank, generator=torch.Generator().manual_seed(100 * seed + i)).double()
        for i in (1, 2)
    )
    B[:14] *= 1.5
    A[:14] *= 1.5
    return values.diag(), 6 * B / torch.linalg.matrix_norm(B @ A.mT, 2), A.mT.contiguous()
