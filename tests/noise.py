"""Random matrices for the tests of bulks, edges and spikes; nothing here knows a theory."""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh_tridiagonal


def unit(size: int, rng: np.random.Generator) -> np.ndarray:
    """A Haar vector."""
    x = rng.standard_normal(size)
    return x / np.linalg.norm(x)


def noise_values(
    shape: tuple[int, int], rng: np.random.Generator, top: int | None = None
) -> np.ndarray:
    """Singular values of a Gaussian matrix by its bidiagonal form (Dumitriu and Edelman)."""
    p, q = min(shape), max(shape)
    diagonal = rng.chisquare(q - np.arange(p))
    below = rng.chisquare(p - 1 - np.arange(p - 1))
    off = np.sqrt(diagonal[:-1] * below)
    diagonal[1:] += below
    which = {} if top is None else {"select": "i", "select_range": (p - top, p - 1)}
    values = eigh_tridiagonal(diagonal, off, eigvals_only=True, **which)
    return np.sqrt(values[::-1].clip(min=0))


def diagonal(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A matrix with these singular values; against Haar vectors as good as any other."""
    W = np.zeros(shape)
    W[np.arange(len(values)), np.arange(len(values))] = values
    return W


def outlier(W0: np.ndarray, theta: float, rng: np.random.Generator) -> tuple[float, float, float]:
    """Value and both overlaps of the triplet of ``W0 + θuvᵀ`` that carries most of u."""
    u, v = unit(W0.shape[0], rng), unit(W0.shape[1], rng)
    U, S, Vh = np.linalg.svd(W0 + theta * np.outer(u, v), full_matrices=False)
    k = int(np.abs(u @ U).argmax())
    return S[k], (u @ U[:, k]) ** 2, (Vh[k] @ v) ** 2


def spiked_values(
    shape: tuple[int, int], strengths: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Singular values of Gaussian noise with spikes on orthonormal Haar vectors."""
    left, right = (np.linalg.qr(rng.standard_normal((size, len(strengths))))[0] for size in shape)
    W = rng.standard_normal(shape) + (left * strengths) @ right.T
    return np.linalg.svd(W, compute_uv=False)
