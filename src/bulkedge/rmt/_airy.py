"""The eigenvalues of the operator A_s of kernel ``Ai(x + y + s)`` on L²(0, ∞), by quadrature."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ._arc import gauss_legendre


def survival(beta: int, s: np.ndarray, *, scaled: bool) -> np.ndarray:
    """1 − F from the eigenvalues of A_s; scaled, times ``exp(c·(2/3)s^(3/2))``."""
    values = torch.linalg.eigvalsh(operator(torch.from_numpy(s), scaled=scaled)[0]).numpy()
    damp = np.exp(-(s**1.5) / 1.5) if scaled else np.ones_like(s)
    if beta == 2:
        values, damp = values**2, damp**2
    e = _symmetric(values, 10)
    k = np.arange(2, 11, 2) if beta == 4 else np.arange(1, 11)
    signs = -1.0 if beta == 4 else -((-1.0) ** k)
    return (signs * damp[:, None] ** (k - k[0]) * e[k].T).sum(1)


def _symmetric(values: np.ndarray, order: int) -> np.ndarray:
    """The elementary symmetric functions e_0 … e_order of the last dimension."""
    e = np.zeros((order + 1, *values.shape[:-1]))
    e[0] = 1
    for value in np.moveaxis(values, -1, 0):
        e[1:] += value * e[:-1]
    return e


def operator(s: Tensor, *, scaled: bool) -> tuple[Tensor, Tensor]:
    """``√w_i Ai(s + x_i + x_j) √w_j`` by Gauss–Legendre, and ``√w_i Ai(s + x_i)``."""
    nodes, weights = (torch.from_numpy(array) for array in gauss_legendre(72))
    # The kernel falls by e^−44 from s to s + length.
    length = (s.clamp(min=0) ** 1.5 + 66) ** (2 / 3) - s
    x = length[:, None] * nodes
    root = (length[:, None] * weights).sqrt()
    airy = _scaled_airy if scaled else lambda s, x: torch.special.airy_ai(s + x)
    column = airy(s[:, None], x)
    kernel = airy(s[:, None, None], x[:, None, :] + x[:, :, None])
    return root[:, None, :] * kernel * root[:, :, None], root * column


def _scaled_airy(s: Tensor, x: Tensor) -> Tensor:
    """``Ai(s + x) exp((2/3)s^(3/2))`` for s ≥ 4, also where Ai itself underflows."""
    z = s + x
    zeta = z**1.5 / 1.5
    term = series = torch.ones_like(z)
    for k in range(1, 16):
        term = -term * ((6 * k - 5) * (6 * k - 3) * (6 * k - 1) / (216 * k * (2 * k - 1))) / zeta
        series = series + term
    far = series / (2 * math.sqrt(math.pi) * z**0.25)
    near = torch.special.airy_ai(z.clamp(max=16)) * zeta.clamp(max=44).exp()
    fall = x * (z * z + z * s + s * s) / (z**1.5 + s**1.5) / 1.5
    return torch.where(z < 16, near, far) * (-fall).exp()
