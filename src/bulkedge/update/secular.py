"""Singular values and vectors of ``W = W0 + s·B·A``, exactly, from those of W0: no SVD of W.

Nothing here is random or asymptotic.  With ``s·B·A = P Qᵀ`` and the blocks of the resolvent of
``[[0, W0], [W0ᵀ, 0]]``, a number s > 0 that is no singular value of W0 is one of W if and only if
the 2r×2r matrix

    M(s) = [[PᵀG₁₁P, PᵀG₁₂Q − I], [(PᵀG₁₂Q − I)ᵀ, QᵀG₂₂Q]],
    G₁₁ = s(s²I − W0W0ᵀ)⁻¹,  G₁₂ = (s²I − W0W0ᵀ)⁻¹W0,  G₂₂ = s(s²I − W0ᵀW0)⁻¹

is singular, and by Sylvester's law of inertia

    #{σ(W) > s} = #{σ(W0) > s} + n₊(M(s)) − r.

So at most r values of W exceed σ₁(W0), and bisection finds each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import as_whole
from bulkedge._linmap import LinearMap, MatrixLike, as_map
from bulkedge._precision import exact
from bulkedge.intruder import Scores
from bulkedge.triplet import resolution

from ._by_solves import BySolves, SystemSolver
from ._by_svd import BySVD
from ._update_svd import UpdateSVD, require_real, update_svd


class Form(Protocol):
    """A base in a form that M(s) can be had from."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        ...

    @property
    def factors(self) -> UpdateSVD:
        """The update."""
        ...

    def matrix(self, s: Tensor) -> Tensor:
        """M(s), shape ``(q, 2r, 2r)``."""
        ...

    def count(self, s: Tensor) -> Tensor:
        """``#{σ(W) > s}``, shape ``(q,)``."""
        ...

    def values(self, k: int) -> Tensor:
        """The k largest singular values."""
        ...

    def vectors(self, k: int, above: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """σ, u and v of the k largest; ``above``, if given, is a number that all of them exceed."""
        ...

    def product(self, v: Tensor) -> Tensor:
        """``W v``."""
        ...

    def transposed_product(self, u: Tensor) -> Tensor:
        """``Wᵀ u``."""
        ...

    def scores(self, u: Tensor, v: Tensor) -> tuple[Scores, Scores] | None:
        """Scores of both sides, None where the base vectors are not known."""
        ...


@dataclass(frozen=True)
class Outliers:
    """Singular triplets of the tuned matrix, with their exact intruder scores; all in float64.

    Attributes:
        sigma: Shape ``(k,)``, descending.
        u: Left vectors, shape ``(m, k)``.
        v: Right vectors, shape ``(n, k)``.
        residuals: ``‖[W v − σu; Wᵀu − σv]‖₂`` of each, shape ``(k,)``.
        left_score: ``max_i |⟨u_i, û⟩|`` over the base vectors, as :func:`bulkedge.intruder.scores`
            defines it, shape ``(k,)``; None where the base vectors are not known.
        right_score: The same on the right.
        left_matched: Where it is attained, −1 for a zero base; None as above.
        right_matched: The same on the right.
    """

    sigma: Tensor
    u: Tensor
    v: Tensor
    residuals: Tensor
    left_score: Tensor | None
    right_score: Tensor | None
    left_matched: Tensor | None
    right_matched: Tensor | None

    def __len__(self) -> int:
        return len(self.sigma)


@dataclass(frozen=True)
class Secular:
    """The secular equation of a base and an update; made by ``from_svd`` or ``from_solves``.

    Everything is computed and returned in float64; no gradient passes.

    Attributes:
        form: The base and the update.

    References:
        Golub, Some Modified Matrix Eigenvalue Problems, 1973, doi:10.1137/1015032; Benaych-Georges
        and Nadakuditi, arXiv:1103.2221, for the same matrix in the limit.

    Example:
        >>> from bulkedge.triplet import thin_svd
        >>> W0 = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> B, A = torch.tensor([[0.0], [2.0], [0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
        >>> secular = Secular.from_svd(*thin_svd(W0), B, A)
        >>> secular.count([0.5, 3.5]).tolist()
        [3, 1]
        >>> [round(x, 9) for x in secular.singular_values(3).tolist()]
        [4.0, 3.0, 1.0]
        >>> secular.outliers(3.5).left_matched.tolist()
        [1]
    """

    form: Form

    @staticmethod
    def from_svd(
        U: Tensor, S: Tensor, V: Tensor, B: Tensor, A: Tensor, scale: float = 1.0
    ) -> Secular:
        """The form that knows every singular triplet of W0: values anywhere, exact scores.

        Cost: O((m + n) p r), and O((m + n) μ²) for an eigenspace of μ > 2r equal base values.

        Args:
            U: Left vectors, shape ``(m, p)``, as :func:`bulkedge.triplet.thin_svd` gives them.
            S: Singular values, descending, shape ``(p,)``; where p < min(m, n), the others are 0.
            V: Right vectors, shape ``(n, p)``.
            B: Shape ``(m, r)``.
            A: Shape ``(r, n)``.
            scale: The number s in front of ``B A``, of any sign.

        Returns:
            The equation of ``U diag(S) Vᵀ + scale·B·A``.

        Raises:
            InputError: If shapes do not fit, S is not a descending list of singular values, or
                something is not real and finite.
        """
        U, S, V = (require_real(name, x) for name, x in (("U", U), ("S", S), ("V", V)))
        _check_svd(U, S, V)
        factors = update_svd(B, A, scale, (len(U), len(V)))
        return Secular(BySVD.of(U, S, V, factors))

    @staticmethod
    def from_solves(
        W0: MatrixLike,
        B: Tensor,
        A: Tensor,
        scale: float = 1.0,
        *,
        norm: float | None = None,
        solver: SystemSolver | None = None,
    ) -> Secular:
        """The form that needs no SVD of W0: values beyond σ₁(W0) only, and no scores.

        Args:
            W0: The base, shape ``(m, n)``, a tensor or a ``LinearMap``.
            B: Shape ``(m, r)``.
            A: Shape ``(r, n)``.
            scale: The number s in front of ``B A``.
            norm: σ₁(W0); None computes it.
            solver: How to solve with ``s²I − W0W0ᵀ``: ``Cholesky()``, the default for a tensor
                with a side of at most 4096, or ``ConjugateGradients()``.

        Returns:
            The equation, for s > σ₁(W0).

        Raises:
            InputError: If shapes do not fit, something is not real and finite, or the norm is
                negative.
        """
        base = as_map(W0)
        for tensor in base.tensors:
            require_real("W0", tensor)
        if norm is not None and not 0 <= norm < float("inf"):
            raise InputError(f"expected norm to be σ₁(W0), got {norm!r}; leave it None")
        factors = update_svd(B, A, scale, base.shape)
        return Secular(BySolves.of(_float64(base), factors, norm, solver))

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.form.shape

    @property
    def rank(self) -> int:
        """The rank r of the update: of the product, not of its factors."""
        return self.form.factors.rank

    @property
    def spikes(self) -> Tensor:
        """The singular values of ``s·B·A``, descending, shape ``(r,)``."""
        return self.form.factors.gamma

    def matrix(self, s: float | list[float] | Tensor) -> Tensor:
        """``M(s)`` for the factors with ``PᵀP = QᵀQ = diag(γ)``: singular at each σ(W).

        Cost: O(p r²) each from an SVD, one linear system each from solves.

        Args:
            s: Positive numbers, no singular values of W0, shape ``(...)``.

        Returns:
            Shape ``(..., 2r, 2r)``.

        Raises:
            InputError: If an s is not positive and finite; in the form of solves, if one is not
                beyond σ₁(W0).
        """
        s = self._points(s)
        M = self.form.matrix(s.flatten())
        return M.reshape(*s.shape, *M.shape[1:])

    def count(self, s: float | list[float] | Tensor) -> Tensor:
        """``#{σ(W) > s} = #{σ(W0) > s} + n₊(M(s)) − r``.

        Right for every s, the singular values of W0 included; a value of W within rounding of s
        (a few eps times the norms) may fall on either side.

        Cost: as :meth:`matrix`, and one symmetric eigenproblem of size O(r) each.

        Args:
            s: Positive numbers, shape ``(...)``.

        Returns:
            Integers, shape ``(...)``.

        Raises:
            InputError: As :meth:`matrix`.
        """
        s = self._points(s)
        return self.form.count(s.flatten()).reshape(s.shape)

    def singular_values(self, k: int) -> Tensor:
        """The k largest singular values of W, to rounding: a few eps times the norms.

        Bisection on the count, k values at once, inside ``σ_{i+r}(W0) ≤ σ_i(W) ≤ σ_{i−r}(W0)`` and
        ``|σ_i(W) − σ_i(W0)| ≤ ‖s·B·A‖``.  Cost: about 50 counts of k numbers; from solves about
        six.

        Args:
            k: How many, ``0 ≤ k ≤ min(m, n)``.

        Returns:
            Shape ``(k,)``, descending.

        Raises:
            InputError: If k does not fit; in the form of solves, if fewer lie beyond σ₁(W0).
        """
        self._check(k)
        return self.form.values(k)

    def triplets(self, k: int) -> Outliers:
        """The k largest singular triplets of W, with their exact intruder scores.

        The vectors are those of the null space of ``sI − H_W``, whose coordinates on the base
        vectors are ``(Uᵀû)_i = (s(B̂α)_i + σ_i(Âβ)_i)/(s² − σ_i²)`` away from the poles; close to
        one, the equation bordered by it is solved.  Cost: :meth:`singular_values`, and O((m+n)pk)
        for the vectors and scores.

        Args:
            k: How many.

        Returns:
            The triplets.

        Raises:
            InputError: As :meth:`singular_values`; or if a value is zero to rounding, whose vectors
                are arbitrary.
        """
        self._check(k)
        return self._judged(k, *self.form.vectors(k))

    def outliers(self, edge: float) -> Outliers:
        """Every singular triplet of W with σ > edge.

        Args:
            edge: A positive number: the edge of a bulk, σ₁(W0), any threshold.

        Returns:
            The triplets, maybe none.

        Raises:
            InputError: If the edge is not positive and finite; from solves, if it is not beyond
                σ₁(W0).
        """
        k = int(self.count(edge))
        return self._judged(k, *self.form.vectors(k, float(edge)))

    def _judged(self, k: int, sigma: Tensor, u: Tensor, v: Tensor) -> Outliers:
        """Residuals and scores; InputError for vectors that mean nothing."""
        rank = int((sigma > resolution(sigma, self.shape)).sum())
        if rank < k:
            raise InputError(
                f"expected k ≤ {rank}, the rank of W to rounding, got k={k}; the vectors of a zero "
                "singular value are arbitrary"
            )
        residuals = torch.hypot(
            torch.linalg.vector_norm(self.form.product(v) - sigma * u, dim=0),
            torch.linalg.vector_norm(self.form.transposed_product(u) - sigma * v, dim=0),
        )
        both = self.form.scores(u, v)
        if both is None:
            return Outliers(sigma, u, v, residuals, None, None, None, None)
        left, right = both
        found = (left.score, right.score, left.matched_index, right.matched_index)
        return Outliers(sigma, u, v, residuals, *found)

    def _points(self, s: float | list[float] | Tensor) -> Tensor:
        gamma = self.form.factors.gamma
        points = torch.as_tensor(s, dtype=gamma.dtype, device=gamma.device)
        if not bool(((points > 0) & points.isfinite()).all()):
            raise InputError(f"expected positive finite numbers s, got {s!r}")
        return points

    def _check(self, k: int) -> None:
        if as_whole(k) is None or not 0 <= k <= min(self.shape):
            raise InputError(
                f"expected 0 ≤ k ≤ {min(self.shape)} for shape {self.shape}, got k={k}"
            )


def _check_svd(U: Tensor, S: Tensor, V: Tensor) -> None:
    """Shapes and order; orthogonality is taken on trust."""
    columns = {x.shape[-1] for x in (U, S, V)} if U.ndim == V.ndim == 2 and S.ndim == 1 else set()
    if len(columns) != 1 or len(S) > min(len(U), len(V)):
        raise InputError(
            f"expected a thin SVD U (m, p), S (p,), V (n, p), got {tuple(U.shape)}, "
            f"{tuple(S.shape)} and {tuple(V.shape)}; V is not transposed, see thin_svd"
        )
    if bool((S < 0).any()) or bool((S[1:] > S[:-1]).any()):
        raise InputError("expected singular values S ≥ 0, descending, got others; see thin_svd")


def _float64(W0: LinearMap) -> LinearMap:
    """Products in float64 and without history."""
    return W0.with_tensors(*(exact(tensor.detach()) for tensor in W0.tensors))
