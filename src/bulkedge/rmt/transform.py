"""Transforms of a sample: Stieltjes, its inversion, the traces of a resolvent, the D-transform.

Those of a law are methods of the law (``stieltjes``, ``inverse_stieltjes``), those of a bulk
methods of the bulk (``d_transform``, ``inverse_d``); :class:`~bulkedge.rmt.LawBulk` makes a bulk of
a law.  These take given values as they are, each a pole: near and inside the spectrum, and at its
edge, ask a law or a bulk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from bulkedge._errors import InputError

from ._arrays import Array, enter, enter_finite
from .bulk import checked_shape


def stieltjes(values: Array, z: Array) -> Any:
    """``m(z) = (1/N) tr (z − W)⁻¹ = (1/N) Σ 1/(z − λ_i)`` of given eigenvalues.

    Cost: N operations a point, and as much memory.

    Args:
        values: Eigenvalues λ, shape ``(N,)``.
        z: Points, real or complex, of any shape.

    Returns:
        m(z), shaped and typed like z; infinite at an eigenvalue.

    Raises:
        InputError: If there are no values.

    Example:
        >>> stieltjes([-1.0, 1.0], 3.0)
        0.375
    """
    points, leave = enter_finite(z, complex=True)
    spectrum = enter_finite(values, complex=True)[0].to(points.device)
    if spectrum.ndim != 1 or len(spectrum) == 0:
        raise InputError(f"expected one row of eigenvalues, got shape {tuple(spectrum.shape)}")
    return leave((1 / (points[..., None] - spectrum)).mean(-1))


def stieltjes_inversion(transform: Callable[[Any], Any], x: Array, *, width: float) -> Any:
    """The density behind a Stieltjes transform, smoothed: ``−Im m(x + iη)/π``.

    That is the convolution of the measure with a Cauchy density of half-width η, so an atom of
    mass a shows as a peak of height a/(πη).

    Args:
        transform: m, a function of complex numbers.
        x: Real points of any shape.
        width: η > 0.

    Returns:
        The density, shaped and typed like x.

    Raises:
        InputError: If the width is not positive.

    Example:
        >>> from bulkedge.rmt import Semicircle
        >>> round(stieltjes_inversion(Semicircle().stieltjes, 0.5, width=1e-9), 6)
        0.308202
        >>> round(Semicircle().pdf(0.5), 6)
        0.308202
    """
    if not width > 0:
        raise InputError(f"expected a positive width, got {width}")
    points, leave = enter_finite(x)
    return leave(-enter(transform(points + 1j * width))[0].imag / math.pi)


def resolvent_traces(values: Array, shape: tuple[int, int], z: Array) -> tuple[Any, Any]:
    """The two normalised traces of the resolvent of ``[[0, W], [Wᵀ, 0]]``.

    ``φ_u(z) = (1/m)[Σ z/(z² − s_i²) + (m − p)/z]``, and φ_v the same with n, p = min(m, n).

    Cost: p operations a point, and as much memory.

    Args:
        values: The singular values s, shape ``(p,)``.
        shape: ``(m, n)``.
        z: Points, real or complex, of any shape.

    Returns:
        φ_u(z) and φ_v(z), shaped and typed like z; infinite at a singular value.

    Raises:
        InputError: If the number of values does not fit the shape.

    Example:
        >>> resolvent_traces([3.0, 1.0], (2, 3), 5.0)
        (0.2604166666666667, 0.2402777777777778)
    """
    m, n = checked_shape(shape)
    p = min(m, n)
    points, leave = enter_finite(z, complex=True)
    spectrum = enter_finite(values)[0].to(points.device)
    if tuple(spectrum.shape) != (p,):
        raise InputError(
            f"expected the {p} singular values of a {m}×{n} matrix, got {tuple(spectrum.shape)}"
        )
    total = (points[..., None] / (points[..., None].square() - spectrum.square())).sum(-1)
    left, right = ((total + (size - p) / points) / size for size in (m, n))
    return leave(left), leave(right)


def d_transform(values: Array, shape: tuple[int, int], z: Array) -> Any:
    """``D(z) = φ_u(z) φ_v(z)`` of given singular values, each a pole.

    Beyond its first value a spike of strength ``D(ρ)^(−1/2)`` makes an outlier at ρ.

    Args:
        values: See :func:`resolvent_traces`.
        shape: See :func:`resolvent_traces`.
        z: See :func:`resolvent_traces`.

    Returns:
        D(z), shaped and typed like z.

    References:
        Benaych-Georges and Nadakuditi, arXiv:1103.2221.

    Example:
        >>> round(d_transform([3.0, 1.0], (2, 3), 5.0), 6)
        0.062572
    """
    points, leave = enter_finite(z, complex=True)
    left, right = resolvent_traces(values, shape, points)
    return leave(torch.mul(left, right))
