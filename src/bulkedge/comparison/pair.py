"""The tensors of one comparison, as matrices."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy
import torch
from torch import Tensor

from bulkedge._linmap import Dense, Difference, LinearMap, LowRank, RowScaled, Sum
from bulkedge._precision import SAME_SIZE_INTEGERS, exact, exact_device
from bulkedge.checkpoint.of_base import OfBase
from bulkedge.intruder import Judgement, Remember, compute_anew, judge
from bulkedge.records import Recipe
from bulkedge.spectral import Probable
from bulkedge.triplet import GolubKahan, singular_triplet
from bulkedge.update import UpdateSVD, update_svd

from .comparison import Comparison
from .initial import since_initial

TILE = 1024
"""This many rows are converted to float64 at a time."""
SMALL = 768
"""Up to this shorter side the norm of an update is that of its Gram matrix."""
SQUARES = 1e-250, 1e250
"""A Gram matrix with its largest entry between these has neither over- nor underflowed."""
ROUNDED = 1e-11
"""Beyond what rounding adds to the norm from a Gram matrix of this size."""


@dataclass(frozen=True)
class Pair:
    """A base matrix and its fine-tuned version, as ``(out, in)``.

    With the magnitude of DoRA, ``W = D ((replaced or base) + s·B·A)``; without it, ``D = I``.

    Attributes:
        base: W0, in the dtype that it is stored in.
        replaced: The full tensor that the fine-tune has instead of W0, in its stored dtype;
            None where it has none.
        factors: The low-rank update ``s·B·A``, in float64; None without one.
        magnitude: DoRA's trained norms of the rows of W, in float64; None without them.
        per_column: Whether the magnitude belongs to columns, as for an embedding.
    """

    base: Tensor
    replaced: Tensor | None
    factors: LowRank | None
    magnitude: Tensor | None = None
    per_column: bool = False

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype for the products of a certificate: half precision would be too coarse."""
        return torch.float64 if self.base.dtype is torch.float64 else torch.float32

    def base_map(self, dtype: torch.dtype = torch.float64) -> LinearMap:
        """W0 with products in ``dtype``; it is not copied as a whole."""
        return Dense(self.base).to(dtype)

    def tuned_map(self, dtype: torch.dtype = torch.float64) -> LinearMap:
        """W with products in ``dtype``; it is not formed."""
        dense = Dense(self.dense_part).to(dtype)
        if self.factors is None:
            return dense
        return self._scaled(Sum([dense, self.factors.to(dtype)]), self.magnitude_over_norm)

    def update_map(self, dtype: torch.dtype = torch.float64) -> LinearMap | None:
        """``W − W0`` with products in ``dtype``, not formed; None without a difference."""
        # A fine-tune may change a weight by less than single precision resolves in the products
        # with W and W0, so the difference is taken before a product, not after.
        terms: list[LinearMap] = []
        if self.factors is not None:
            terms.append(self._scaled(self.factors.to(dtype), self.magnitude_over_norm))
        if self.replaced is not None:
            terms.append(Difference(self.replaced, self.base, dtype))
        if self.magnitude_over_norm is not None:
            terms.append(
                self._scaled(Dense(self.dense_part).to(dtype), self.magnitude_over_norm - 1)
            )
        return Sum(terms) if len(terms) > 1 else next(iter(terms), None)

    def update_norm(self, seed: int) -> float:
        """``‖W − W0‖₂``, never above it but for rounding.

        Exact, but for rounding, for factors and for a shorter side of up to 768.  For a larger
        matrix a search stops at a triplet with a residual below ``1e-3 σ``.  A part of 1e-3 may
        then be missing, as for many nearly equal values.  Of a value that stands apart by a part
        g, it is about ``1e-6/g``.

        Cost: a Gram matrix and its eigenvalues; for a larger matrix some ten to fifty passes.

        Args:
            seed: Seed of the random start, together with the update.

        Returns:
            The norm; 0 where nothing differs.
        """
        if (found := self._exact_norm) is not None:
            return found
        generator = torch.Generator().manual_seed(self.seed(seed))
        update = cast("LinearMap", self.update_map())
        return float(
            singular_triplet(update, 1, solver=GolubKahan(rtol=1e-3), generator=generator).sigma[0]
        )

    def update_norm_bound(self) -> float:
        """At least ``‖W − W0‖₂``, and at most some 0.2 % more where the passes are enough.

        Cost: that of :meth:`update_norm`; for a shorter side above 768 up to 200 passes.

        Returns:
            The bound.  For a shorter side above 768 it fails with a probability of 1e-9 at most.

        References:
            :class:`bulkedge.spectral.Probable`.
        """
        if (found := self._exact_norm) is not None:
            return found * (1 + ROUNDED)
        return Probable(rtol=2e-3).bound(cast("LinearMap", self.update_map())).upper

    @cached_property
    def _exact_norm(self) -> float | None:
        """The norm of factors or of a small matrix; None of a large one."""
        if self.low_rank is not None:
            return float(self.low_rank.singular_values()[0])
        update = self.update_map()
        if update is None:
            return 0.0
        if min(update.shape) > SMALL:
            return None
        G = (update if update.shape[0] >= update.shape[1] else update.T).gram()
        if not SQUARES[0] < float(G.diagonal().max()) < SQUARES[1]:
            return float(torch.linalg.matrix_norm(exact(update.to_dense()), 2))
        return float(torch.linalg.eigvalsh(G)[-1].sqrt())

    @property
    def low_rank(self) -> LowRank | None:
        """The whole update where it is a product of stored factors, in float64."""
        return self.factors if self.replaced is None and self.magnitude is None else None

    @cached_property
    def spikes(self) -> UpdateSVD | None:
        """The thin SVD of :attr:`low_rank`: the spikes and their vectors."""
        update = self.low_rank
        if update is None:
            return None
        return update_svd(update.B, update.A, update.scale, update.shape)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that was read, under the names that messages use."""
        parts = {"base": self.base, "tuned": self.replaced, "magnitude": self.magnitude}
        parts["magnitude over norm"] = self.magnitude_over_norm
        if self.factors:
            parts |= {"A": self.factors.A, "B": self.factors.B}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def seed(self, number: int) -> int:
        """A seed that depends on every bit of the update, so that none can be built to fool it.

        Args:
            number: The seed of the recipe.

        Returns:
            A number in ``[0, 2⁶³)``.
        """
        digest = hashlib.sha256(str(number).encode())
        parts: list[Tensor | None] = [self.replaced, self.magnitude]
        if self.factors is not None:
            parts += [self.factors.A, self.factors.B]
        for part in parts:
            if part is not None:
                integers = SAME_SIZE_INTEGERS[part.element_size()]
                bits = part.detach().cpu().view(integers).numpy()
                digest.update(numpy.ascontiguousarray(bits).data)
        return int.from_bytes(digest.digest()[:8], "big") >> 1

    @property
    def dense_part(self) -> Tensor:
        """The matrix in memory that the low-rank update is added to: ``replaced or base``."""
        return self.base if self.replaced is None else self.replaced

    @cached_property
    def magnitude_over_norm(self) -> Tensor | None:
        """The diagonal of D, ``magnitude / ‖rows‖``, in float64; None where D = I."""
        if self.magnitude is None or self.factors is None:
            return None
        return self.magnitude / row_norms(self.dense_part, self.factors, self.per_column)

    def _scaled(self, inner: LinearMap, factors: Tensor | None) -> LinearMap:
        """``diag(factors) W``, or ``W diag(factors)`` for an embedding; W itself for None."""
        if factors is None:
            return inner
        factors = factors.to(inner.device, inner.dtype)
        return RowScaled(inner.T, factors).T if self.per_column else RowScaled(inner, factors)


def load(comparison: Comparison, device: torch.device, remember: Remember = compute_anew) -> Pair:
    """Read the tensors of one comparison.

    Args:
        comparison: What to read.
        device: Where to put it.
        remember: Where the base is kept, if several are compared with it.

    Returns:
        The pair.

    Raises:
        CheckpointError: If a tensor cannot be read.
    """
    base: Tensor = remember("base", lambda: comparison.base.read().to(device))
    replaced = comparison.tuned.read().to(device) if comparison.tuned else None
    if replaced is not None and torch.equal(replaced, base):
        replaced = None  # PEFT stores the base of an adapted embedding a second time
    stored = comparison.factors
    if stored is None:
        return Pair(base, replaced, None)
    if isinstance(stored, OfBase):
        W0 = exact(base)
        W = stored.tuned(W0 if replaced is None else exact(replaced))
        return Pair(base, None if torch.equal(W, W0) else W, None)
    B, A, scale = stored.read()
    magnitude = stored.read_magnitude()
    update = LowRank(B.to(exact_device(device)), A.to(exact_device(device)), scale)
    return Pair(
        base,
        replaced,
        since_initial(update, comparison, base, remember),
        None if magnitude is None else magnitude.to(exact_device(device)),
        stored.embedding,
    )


def judge_pair(pair: Pair, recipe: Recipe, remember: Remember = compute_anew) -> Judgement:
    """Judge a pair as a recipe asks for; see :func:`bulkedge.intruder.judge`.

    Args:
        pair: Base and tuned matrix.
        recipe: How many directions, which sides, which method.
        remember: Where what is computed of the base is kept, if several are judged against it.

    Returns:
        What was found.
    """
    k, spikes = recipe.top_k, pair.spikes
    return judge(
        pair.base_map(),
        pair.tuned_map(),
        k,
        epsilon=recipe.epsilon,
        sides=recipe.sides,
        method=recipe.method,
        dtype=pair.product_dtype,
        # the search for the tuned vectors starts from the spikes of a low-rank update
        start=None if spikes is None else (spikes.u[:, :k], spikes.v[:, :k]),
        seed=pair.seed(recipe.seed),
        remember=remember,
    )


def row_norms(matrix: Tensor, update: LowRank, per_column: bool) -> Tensor:
    """The norms of the rows of ``matrix + update``, in float64; the sum is not formed.

    Args:
        matrix: Shape ``(m, n)``, any dtype.
        update: What is added to it, in float64.
        per_column: Take the norms of the columns instead.

    Returns:
        Shape ``(m,)``, or ``(n,)`` for columns.
    """
    B, A = update.scale * update.B, update.A
    if per_column:
        matrix, B, A = matrix.mT, A.mT, B.mT
    tiles = zip(matrix.split(TILE), B.split(TILE), strict=True)
    return torch.cat([torch.linalg.vector_norm(exact(W) + b @ A, dim=1) for W, b in tiles])
