"""How singular values, eigenvalues and their vectors move: the expansion in h of ``A + hD``.

With the simple triplet (σ, u, v) of A, and K = [[σI, −A], [−Aᵀ, σI]] inverted outside u and v,

    σ⁽¹⁾ = uᵀDv,                [u⁽¹⁾; v⁽¹⁾] = K⁺ c,    c = [Dv − σ⁽¹⁾u; Dᵀu − σ⁽¹⁾v],
    σ⁽²⁾ = ½ cᵀK⁺c,             K [u⁽²⁾; v⁽²⁾] = [Dv⁽¹⁾ − σ⁽¹⁾u⁽¹⁾; Dᵀu⁽¹⁾ − σ⁽¹⁾v⁽¹⁾] outside,

and ``uᵀu⁽²⁾ = −½‖u⁽¹⁾‖²``, which keeps lengths.  All of it holds while ‖hD‖ stays well below the
distance to the other values, which inside a bulk is tiny.

The eigenvalues of a matrix that is not symmetric move by yᴴDx/yᴴx, with its left *and* right
vectors; vᵀDv is for symmetric matrices.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._errors import DegenerateWarning, InputError
from bulkedge._fields import as_whole
from bulkedge._precision import exact
from bulkedge.triplet import thin_svd

EPS = torch.finfo(torch.float64).eps
MIN_ENTRY = 1e-290
"""A matrix whose entries are all smaller is refused."""


@dataclass(frozen=True)
class SingularPerturbation:
    """A singular triplet of ``A + hD`` to second order in h; all in float64.

    Attributes:
        sigma: σ of A, shape ``()``.
        u: Shape ``(m,)``.
        v: Shape ``(n,)``.
        sigma1: The coefficient of h.
        u1: The coefficient of h, orthogonal to u.
        v1: The coefficient of h, orthogonal to v.
        sigma2: The coefficient of h²; None for an expansion of first order.
        u2: The coefficient of h², None as above.
        v2: The coefficient of h², None as above.
    """

    sigma: Tensor
    u: Tensor
    v: Tensor
    sigma1: Tensor
    u1: Tensor
    v1: Tensor
    sigma2: Tensor | None = None
    u2: Tensor | None = None
    v2: Tensor | None = None

    def at(self, h: float) -> tuple[Tensor, Tensor, Tensor]:
        """σ, u and v at h; the vectors are of length one up to the order of the expansion."""
        return (
            _series(h, self.sigma, self.sigma1, self.sigma2),
            _series(h, self.u, self.u1, self.u2),
            _series(h, self.v, self.v1, self.v2),
        )


@dataclass(frozen=True)
class EigenPerturbation:
    """An eigenpair of the symmetric ``A + hD`` to second order in h; all in float64.

    Attributes:
        value: λ of A, shape ``()``.
        vector: Shape ``(n,)``.
        value1: The coefficient of h.
        vector1: The coefficient of h, orthogonal to the vector.
        value2: The coefficient of h²; None for an expansion of first order.
        vector2: The coefficient of h², None as above.
    """

    value: Tensor
    vector: Tensor
    value1: Tensor
    vector1: Tensor
    value2: Tensor | None = None
    vector2: Tensor | None = None

    def at(self, h: float) -> tuple[Tensor, Tensor]:
        """The eigenvalue and its vector at h."""
        return (
            _series(h, self.value, self.value1, self.value2),
            _series(h, self.vector, self.vector1, self.vector2),
        )


def singular_perturbation(
    A: Tensor, D: Tensor, k: int = 0, *, order: int = 2
) -> SingularPerturbation:
    """``σ(h) = σ + h uᵀDv + h² ½cᵀK⁺c + O(h³)`` and its vectors, for the k-th triplet of A.

    Cost: one SVD of A.

    Args:
        A: Shape ``(m, n)``.
        D: The direction, shape ``(m, n)``.
        k: Which triplet, 0 being the leading one.
        order: 1 or 2.

    Returns:
        The coefficients.

    Raises:
        InputError: If shapes, k or order do not fit, σ_k is zero or equals another to rounding.

    Warns:
        DegenerateWarning: If another value lies within √eps·σ_k: the coefficients are of the size
            of the inverse gap, and known to few digits.

    References:
        Stewart, Perturbation theory for the singular value decomposition, 1991; the terms outside
        the span of the thin vectors are those of m ≠ n.

    Example:
        >>> A, D = torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> expansion = singular_perturbation(A, D)
        >>> round(expansion.sigma1.item(), 9), round(expansion.sigma2.item(), 9)
        (0.0, 0.1875)
    """
    A, D = _matrices(A, D, order)
    _check_index(k, min(A.shape))
    U, S, V = thin_svd(A)
    sigma, u, v = S[k], U[:, k], V[:, k]
    if float(sigma) <= 8 * EPS * float(S[0]):
        raise InputError(
            f"expected a simple singular value above zero, got singular value {k} (from 0) = "
            f"{float(sigma):.1e}, which moves as |h|; ask for a larger one"
        )
    _require_simple(torch.cat([S, S.new_zeros(1)]), k, "singular value")  # −σ meets σ at zero
    others = torch.arange(len(S), device=S.device) != k

    def inverse(phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """``K⁺ [φ; ψ]`` outside u and v."""
        a, b, s = U.mT @ phi, V.mT @ psi, S[others]
        p, q = (phi - U @ a) / sigma, (psi - V @ b) / sigma
        a, b, d = a[others], b[others], (sigma - s) * (sigma + s)
        return (
            p + U[:, others] @ ((sigma * a + s * b) / d),
            q + V[:, others] @ ((s * a + sigma * b) / d),
        )

    Dv, Du = D @ v, D.mT @ u
    sigma1 = u @ Dv
    u1, v1 = inverse(Dv, Du)
    if order == 1:
        return SingularPerturbation(sigma, u, v, sigma1, u1, v1)
    sigma2 = (u1 @ Dv + v1 @ Du) / 2
    u2, v2 = inverse(D @ v1 - sigma1 * u1, D.mT @ u1 - sigma1 * v1)
    u2, v2 = u2 - (u1 @ u1) / 2 * u, v2 - (v1 @ v1) / 2 * v
    return SingularPerturbation(sigma, u, v, sigma1, u1, v1, sigma2, u2, v2)


def eigen_perturbation(A: Tensor, D: Tensor, k: int = 0, *, order: int = 2) -> EigenPerturbation:
    """``λ(h) = λ + h vᵀDv + h² Σ_{j≠k} (v_jᵀDv)²/(λ − λ_j) + O(h³)`` and its vector.

    Cost: one symmetric eigenproblem.

    Args:
        A: Symmetric, shape ``(n, n)``.
        D: The direction, symmetric, shape ``(n, n)``.
        k: Which eigenvalue, 0 being the largest.
        order: 1 or 2.

    Returns:
        The coefficients.

    Raises:
        InputError: If shapes, k or order do not fit, a matrix is not symmetric, or the eigenvalue
            equals another to rounding.

    Warns:
        DegenerateWarning: If another eigenvalue lies within √eps of the largest in modulus.

    References:
        Kato, Perturbation Theory for Linear Operators, chapter II, doi:10.1007/978-3-642-66282-9.

    Example:
        >>> A, D = torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> eigen_perturbation(A, D).value2.item()
        0.5
    """
    A, D = _matrices(A, D, order)
    _require_symmetric(A, D)
    _check_index(k, len(A))
    values, vectors = torch.linalg.eigh(A)
    values, vectors = values.flip(0), vectors.flip(1)
    _require_simple(values, k, "eigenvalue")
    value, x = values[k], vectors[:, k]
    others = torch.arange(len(A), device=A.device) != k
    gaps, V = value - values[others], vectors[:, others]

    def inverse(y: Tensor) -> Tensor:
        """``(λ − A)⁺ y``."""
        return V @ ((V.mT @ y) / gaps)

    Dx = D @ x
    value1, x1 = x @ Dx, inverse(Dx)
    if order == 1:
        return EigenPerturbation(value, x, value1, x1)
    x2 = inverse(D @ x1 - value1 * x1) - (x1 @ x1) / 2 * x
    return EigenPerturbation(value, x, value1, x1, Dx @ x1, x2)


def eigenvalue_perturbation(A: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """``λ_i(h) = λ_i + h y_iᴴD x_i/(y_iᴴx_i) + O(h²)`` for all eigenvalues of any square matrix.

    Cost: one eigenproblem and one inverse, O(n³).

    Args:
        A: Shape ``(n, n)``, real; x_i and y_i are its right and left vectors.
        D: The direction, shape ``(n, n)``.

    Returns:
        λ and its derivative, complex, shape ``(n,)``, by descending modulus.

    Raises:
        InputError: If shapes do not fit, or A has no basis of eigenvectors to rounding.

    Warns:
        DegenerateWarning: If an eigenvalue has ``‖y‖‖x‖/|yᴴx| ≥ 1/√eps``: close to a defective
            one, which moves as a root of h.

    References:
        Kato, chapter II; Stewart and Sun, Matrix Perturbation Theory, theorem IV.2.3.

    Example:
        >>> A, D = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> [round(x, 6) for x in eigenvalue_perturbation(A, D)[1].real.tolist()]
        [1.0, -1.0]
    """
    A, D = _matrices(A, D, 1)
    if A.shape[0] != A.shape[1]:
        raise InputError(
            f"expected square matrices, got {tuple(A.shape)}; singular_perturbation takes others"
        )
    values, X = torch.linalg.eig(A)
    order = values.abs().argsort(descending=True, stable=True)
    values, X = values[order], X[:, order]
    Y, info = torch.linalg.inv_ex(X)  # its rows are y_iᴴ, scaled so that y_iᴴx_i = 1
    condition = torch.linalg.vector_norm(Y, dim=1) * torch.linalg.vector_norm(X, dim=0)
    worst = float(condition.max()) if not int(info) else math.inf
    if not worst < 0.01 / EPS:
        raise InputError(
            "expected a matrix with a basis of eigenvectors, got one that is defective to "
            "rounding: its eigenvalues move as roots of h"
        )
    if worst >= EPS**-0.5:
        warnings.warn(
            f"an eigenvalue has the condition number {worst:.1e}: it is close to a defective one, "
            "and its derivative holds for very small changes only; use singular values",
            DegenerateWarning,
            stacklevel=2,
        )
    return values, (Y @ D.to(Y.dtype) @ X).diagonal()


def _series(h: float, zeroth: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    value = zeroth + h * first
    return value if second is None else value + h * h * second


def _matrices(A: Tensor, D: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Both in float64; InputError unless they are real, finite, and of one shape."""
    for name, x in (("A", A), ("D", D)):
        if x.is_complex() or x.ndim != 2 or 0 in x.shape or not bool(torch.isfinite(x).all()):
            raise InputError(
                f"expected {name} to be a real finite matrix, got shape {tuple(x.shape)} of "
                f"{x.dtype}, or NaN or Inf in it"
            )
    if A.shape != D.shape:
        raise InputError(
            f"expected a direction of the shape of the matrix, got {tuple(D.shape)} and "
            f"{tuple(A.shape)}"
        )
    if 0 < float(A.abs().max()) < MIN_ENTRY:
        raise InputError(
            f"expected a matrix with an entry of at least {MIN_ENTRY}, got none: its "
            "derivative cannot be represented; multiply A and D by one number"
        )
    if order not in (1, 2):
        raise InputError(f"expected order 1 or 2, got {order!r}")
    return exact(A.detach()), exact(D.detach())


def _check_index(k: int, size: int) -> None:
    if as_whole(k) is None or not 0 <= k < size:
        raise InputError(f"expected 0 ≤ k < {size}, got k={k!r}")


def _require_symmetric(A: Tensor, D: Tensor) -> None:
    for name, x in (("A", A), ("D", D)):
        square = x.shape[0] == x.shape[1]
        if not square or float((x - x.mT).abs().max()) > 1e-12 * float(x.abs().max()):
            raise InputError(
                f"expected {name} symmetric, got one that is not; eigenvalue_perturbation takes "
                "any square matrix, singular_perturbation any matrix"
            )


def _require_simple(values: Tensor, k: int, kind: str) -> None:
    """InputError where value k equals another to rounding, a warning where it nearly does."""
    distance = (values - values[k]).abs()
    distance[k] = torch.inf
    gap, size = float(distance.min()), float(values.abs().max())
    if gap <= 8 * EPS * size:
        raise InputError(
            f"expected a simple {kind}, got {kind} {k} (from 0) equal to another to "
            "rounding: no single vector is defined there, and none can be followed"
        )
    if gap <= EPS**0.5 * size:
        warnings.warn(
            f"{kind} {k} (from 0) lies within {gap / size:.1e} of another, relative to the "
            "largest: the expansion is known to few digits, and holds for changes well below that",
            DegenerateWarning,
            stacklevel=3,
        )
