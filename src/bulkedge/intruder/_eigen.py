"""Eigenvectors of a symmetric matrix, no more of them than are asked for.

All eigenvectors of an n×n matrix cost ``9 n³`` operations, of which the reduction to tridiagonal
form ``G = Q T Qᵀ`` takes ``4/3 n³`` and the eigenvectors ``T = Z Λ Zᵀ`` some ``n²`` to ``4/3 n³``.
The rest multiplies Q with Z.  Coordinates ``Vᵀ Y = Zᵀ (Qᵀ Y)`` and a few columns of ``V = Q Z``
need no such product.  PyTorch has neither form, so that on the CPU LAPACK is asked by way of SciPy
(Anderson et al., LAPACK Users' Guide, 1999: dsytrd, dstemr, dormqr, dsyevr).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Eigenvectors:
    """All eigenvectors ``V = Q Z`` of a symmetric matrix.

    Attributes:
        values: Eigenvalues, descending, shape ``(n,)``.
        inner: Z, shape ``(n, n)``: those of the tridiagonal matrix, or V itself.
        reflectors: Q as Householder vectors and their factors, ``(n − 1, n − 1)`` and ``(n − 1,)``;
            None where Q is the identity.
    """

    values: Tensor
    inner: Tensor
    reflectors: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Eigenvectors:
        """The eigenvectors whose :attr:`parts` these are."""
        values, inner, *reflectors = parts
        if not reflectors:
            return cls(values, inner.mT)
        return cls(values, inner.mT, (reflectors[0].mT, reflectors[1]))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors, of matrices the transposes, in rows: two or four.

        Products with what :meth:`of` makes of them round alike, whether they were on disk or not.
        """
        found = (self.values, self.inner.mT)
        if self.reflectors is not None:
            found += (self.reflectors[0].mT, self.reflectors[1])
        return tuple(part.contiguous() for part in found)

    def coordinates(self, Y: Tensor) -> Tensor:
        """``Vᵀ Y``, shape ``(n, k)``."""
        return self.inner.mT @ self._rotated(Y, transpose=True)

    def leading(self, count: int) -> Tensor:
        """The first columns of V, shape ``(n, count)``."""
        return self._rotated(self.inner[:, :count], transpose=False)

    def _rotated(self, X: Tensor, *, transpose: bool) -> Tensor:
        """``Q X``, or ``Qᵀ X``."""
        if self.reflectors is None:
            return X
        first, rest = X[:1], X[1:]  # Q leaves the first coordinate alone
        return torch.cat([first, torch.ormqr(*self.reflectors, rest, transpose=transpose)])


def eigenvectors(G: Tensor) -> Eigenvectors:
    """All eigenvectors of a symmetric matrix.

    Args:
        G: Shape ``(n, n)``, float64, n > 1; on the CPU it is overwritten.

    Returns:
        The eigenvectors.
    """
    if G.device.type != "cpu":
        values, V = torch.linalg.eigh(G)
        return Eigenvectors(values.flip(0), V.flip(1))
    from scipy.linalg import eigh_tridiagonal, get_lapack_funcs

    with _threads_of_torch():
        reduce, lwork = get_lapack_funcs(("sytrd", "sytrd_lwork"), dtype="float64")
        work = int(lwork(len(G), lower=1)[0])
        # the transpose of a symmetric matrix in rows is that matrix in columns
        reduced, diagonal, beside, factors, _ = reduce(
            G.numpy().T, lower=1, lwork=work, overwrite_a=1
        )
        values, Z = eigh_tridiagonal(diagonal, beside, check_finite=False)
    reflectors = torch.from_numpy(reduced)[1:, :-1], torch.from_numpy(factors)
    return Eigenvectors(torch.from_numpy(values).flip(0), torch.from_numpy(Z).flip(1), reflectors)


def leading_eigenvectors(G: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors of a symmetric matrix.

    Args:
        G: Shape ``(n, n)``, float64; on the CPU it is overwritten.
        count: How many.

    Returns:
        Eigenvalues, descending, shape ``(count,)``, and vectors, shape ``(n, count)``.
    """
    n = len(G)
    if G.device.type != "cpu":
        values, V = torch.linalg.eigh(G)
    else:
        from scipy.linalg import eigh

        with _threads_of_torch():
            found = eigh(
                G.numpy().T,
                subset_by_index=[n - count, n - 1],
                overwrite_a=True,
                check_finite=False,
            )
        values, V = map(torch.from_numpy, found)
    return values.flip(0)[:count], V.flip(1)[:, :count]


@contextmanager
def _threads_of_torch() -> Iterator[None]:
    """SciPy's BLAS takes as many threads as torch, which several processes side by side rely on."""
    with _controller().limit(limits=torch.get_num_threads()):
        yield


@cache
def _controller() -> Any:
    """Of the BLAS libraries that are loaded, SciPy's among them."""
    import scipy.linalg  # noqa: F401  # its BLAS is found only once it is loaded
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")
