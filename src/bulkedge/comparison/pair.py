"""The tensors of one comparison, as matrices."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy
import torch
from torch import Tensor

from bulkedge._linmap import Dense, Difference, LinearMap, LowRank, RowScaled, Sum
from bulkedge._precision import exact, exact_device
from bulkedge.intruder import Judgement, judge
from bulkedge.records import Recipe
from bulkedge.triplet import GolubKahan, singular_triplet
from bulkedge.update import UpdateSVD, update_svd

from .comparison import Comparison

TILE = 1024  # rows that are converted at a time
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy has no bfloat16


@dataclass(frozen=True)
class Pair:
    """A base matrix and its update as ``(out, in)``, full tensors in the dtype they are stored in.

    Attributes:
        base: W0.
        replaced: The full tensor that stands in its place, if any.
        factors: The low-rank update on top, if any, in float64.
        magnitude: The norms of the tuned rows, if they were trained apart (DoRA), in float64.
        columns: Whether they are norms of columns: those of an embedding.
    """

    base: Tensor
    replaced: Tensor | None
    factors: LowRank | None
    magnitude: Tensor | None = None
    columns: bool = False

    @property
    def products(self) -> torch.dtype:
        """The dtype that products of a certificate are taken in: half precision is too coarse."""
        return torch.float64 if self.base.dtype is torch.float64 else torch.float32

    def base_map(self, dtype: torch.dtype = torch.float64) -> LinearMap:
        """W0 with products in ``dtype``; never a second whole copy."""
        return Dense(self.base).to(dtype)

    def tuned_map(self, dtype: torch.dtype = torch.float64) -> LinearMap:
        """``W = D ((replaced or base) + s·B·A)`` with products in ``dtype``, not formed."""
        dense = Dense(self.start).to(dtype)
        if self.factors is None:
            return dense
        return self._scaled(Sum([dense, self.factors.to(dtype)]), self.row_factors)

    def update_map(self, dtype: torch.dtype = torch.float64) -> LinearMap | None:
        """``W − W0`` with products in ``dtype``, not formed; None without a difference."""
        # a fine-tune may change a weight by less than single precision resolves in its products
        terms: list[LinearMap] = []
        if self.factors is not None:
            terms.append(self._scaled(self.factors.to(dtype), self.row_factors))
        if self.replaced is not None:
            terms.append(Difference(self.replaced, self.base, dtype))
        if self.row_factors is not None:
            terms.append(self._scaled(Dense(self.start).to(dtype), self.row_factors - 1))
        return Sum(terms) if len(terms) > 1 else next(iter(terms), None)

    def update_norm(self, seed: int) -> float:
        """``‖W − W0‖₂``, to six digits: its error is quadratic in the residual of a triplet.

        Args:
            seed: Of the random start, together with the update.

        Returns:
            The norm; 0 where nothing differs.
        """
        if self.low_rank is not None:
            return float(self.low_rank.singular_values()[0])
        update = self.update_map()
        if update is None:
            return 0.0
        generator = torch.Generator().manual_seed(self.seed(seed))
        return float(
            singular_triplet(update, 1, solver=GolubKahan(rtol=1e-3), generator=generator).sigma[0]
        )

    @property
    def low_rank(self) -> LowRank | None:
        """The whole update where it is a product of stored factors, in float64."""
        return self.factors if self.replaced is None and self.magnitude is None else None

    @cached_property
    def spikes(self) -> UpdateSVD | None:
        """Its thin SVD: the spikes and their vectors."""
        update = self.low_rank
        if update is None:
            return None
        return update_svd(update.B, update.A, update.scale, update.shape)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that was read, under the names of a message."""
        parts = {"base": self.base, "tuned": self.replaced, "magnitude": self.magnitude}
        parts["magnitude over norm"] = self.row_factors
        if self.factors:
            parts |= {"A": self.factors.A, "B": self.factors.B}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def seed(self, number: int) -> int:
        """A number that depends on every bit of the update, and on a number.

        Args:
            number: Another makes another seed.

        Returns:
            In ``[0, 2⁶³)``.
        """
        digest = hashlib.sha256(str(number).encode())
        parts: list[Tensor | None] = [self.replaced, self.magnitude]
        if self.factors is not None:
            parts += [self.factors.A, self.factors.B]
        for part in parts:
            if part is not None:
                bits = part.detach().cpu().view(BITS[part.element_size()]).numpy()
                digest.update(numpy.ascontiguousarray(bits).data)
        return int.from_bytes(digest.digest()[:8], "big") >> 1

    @property
    def start(self) -> Tensor:
        """What the low-rank update is added to."""
        return self.base if self.replaced is None else self.replaced

    @cached_property
    def row_factors(self) -> Tensor | None:
        """The diagonal of D, ``magnitude / ‖rows‖``, in float64; None where D = I."""
        if self.magnitude is None or self.factors is None:
            return None
        return self.magnitude / row_norms(self.start, self.factors, self.columns)

    def _scaled(self, inner: LinearMap, factors: Tensor | None) -> LinearMap:
        """``D W`` for the factors on the diagonal of D, ``W D`` for an embedding; W for None."""
        if factors is None:
            return inner
        factors = factors.to(inner.device, inner.dtype)
        return RowScaled(inner.T, factors).T if self.columns else RowScaled(inner, factors)


def load(comparison: Comparison, device: torch.device) -> Pair:
    """Read the tensors of one comparison.

    Args:
        comparison: What to read.
        device: Where to put it.

    Returns:
        The pair.

    Raises:
        CheckpointError: If a tensor cannot be read.
    """
    base = comparison.base.read().to(device)
    replaced = comparison.tuned.read().to(device) if comparison.tuned else None
    if replaced is not None and torch.equal(replaced, base):
        replaced = None  # PEFT stores the base of an adapted embedding once more
    stored = comparison.factors
    if stored is None:
        return Pair(base, replaced, None)
    B, A, scale = stored.read()
    magnitude = stored.read_magnitude()
    return Pair(
        base,
        replaced,
        LowRank(B.to(exact_device(device)), A.to(exact_device(device)), scale),
        None if magnitude is None else magnitude.to(exact_device(device)),
        stored.embedding,
    )


def judge_pair(pair: Pair, recipe: Recipe) -> Judgement:
    """Judge a pair as a recipe asks for; see :func:`bulkedge.intruder.judge`.

    Args:
        pair: Base and tuned matrix.
        recipe: How many directions, which sides, which method.

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
        dtype=pair.products,
        # the search for the tuned vectors begins at the spikes of a low-rank update
        start=None if spikes is None else (spikes.u[:, :k], spikes.v[:, :k]),
        # depends on the update, so that no update can be built to fool it
        seed=pair.seed(recipe.seed),
    )


def row_norms(start: Tensor, update: LowRank, columns: bool) -> Tensor:
    """The norms of the rows of a sum, in float64, that is not formed.

    Args:
        start: Shape ``(m, n)``, any dtype.
        update: What is added to it, in float64.
        columns: Whether those of the columns are meant.

    Returns:
        Shape ``(m,)``, or ``(n,)``.
    """
    B, A = update.scale * update.B, update.A
    if columns:
        start, B, A = start.mT, A.mT, B.mT
    tiles = zip(start.split(TILE), B.split(TILE), strict=True)
    return torch.cat([torch.linalg.vector_norm(exact(W) + b @ A, dim=1) for W, b in tiles])
