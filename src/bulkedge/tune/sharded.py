"""A matrix that is spread over processes, as a map: products and sums of thin blocks, no gathering.

FSDP2 keeps each process's part of a weight as a ``DTensor``.  Its singular triplets take products
with thin blocks alone; those are computed by the part and put together: with rows apart,

    W X = [W_1 X; …; W_p X]  (gathered),      Wᵀ Y = Σ_i W_iᵀ Y_i  (all-reduced),

and the other way round with columns apart.  Every process holds the same blocks and takes the same
steps, so that all of them must call whatever uses the map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_gather, all_reduce, get_world_size
from torch.distributed.tensor import DTensor, Replicate, Shard

from bulkedge._errors import InputError
from bulkedge._linmap import Dense, LinearMap, Widened


class ShardedMatrix(LinearMap):
    """A matrix of which each process of a group has some rows, or some columns.

    Cost of a product: that of the part, and one collective of the size of the result.

    Args:
        local: This process's part.
        sizes: How many rows, or columns, each process has, in the order of the group.
        dim: 0 for rows, 1 for columns.
        group: The processes.
    """

    def __init__(
        self, local: LinearMap, sizes: tuple[int, ...], dim: int, group: ProcessGroup
    ) -> None:
        self.local, self.sizes, self.dim, self.group = local, sizes, dim, group
        m, n = local.shape
        self.shape = (sum(sizes), n) if dim == 0 else (m, sum(sizes))
        self.dtype, self.device = local.dtype, local.device
        place = group.rank()
        self.mine = slice(sum(sizes[:place]), sum(sizes[: place + 1]))

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        if self.dim == 0:
            return self._gathered(self.local.matmat(X))
        return self._summed(self.local.matmat(X[self.mine]))

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        if self.dim == 1:
            return self._gathered(self.local.rmatmat(Y))
        return self._summed(self.local.rmatmat(Y[self.mine]))

    def norm_bound(self) -> float:
        """``‖W‖_F``, the same in all processes."""
        square = torch.tensor([self.local.norm_bound() ** 2], dtype=torch.float64)
        return float(self._summed(square.to(self.device)).sqrt())

    def to_dense(self) -> Tensor:
        """The whole matrix in every process: what this map is there to avoid."""
        whole = self.local.to_dense()
        return self._gathered(whole) if self.dim == 0 else self._gathered(whole.mT).mT

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """This process's part."""
        return self.local.tensors

    def with_tensors(self, *tensors: Tensor) -> ShardedMatrix:
        """See :meth:`LinearMap.with_tensors`."""
        return ShardedMatrix(self.local.with_tensors(*tensors), self.sizes, self.dim, self.group)

    def widened(self) -> ShardedMatrix:
        """See :meth:`LinearMap.widened`."""
        return ShardedMatrix(self.local.widened(), self.sizes, self.dim, self.group)

    def _summed(self, part: Tensor) -> Tensor:
        total = part.contiguous().clone()
        all_reduce(total, ReduceOp.SUM, group=self.group)
        return total

    def _gathered(self, part: Tensor) -> Tensor:
        """Parts of unequal height, one below the other."""
        # collectives take equal shapes: shorter parts are padded
        padded = part.new_zeros(max(self.sizes), part.shape[1])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in self.sizes]
        all_gather(parts, padded, group=self.group)
        return torch.cat([x[:size] for x, size in zip(parts, self.sizes, strict=True)])


def sharded_map(matrix: DTensor, dtype: torch.dtype | None = None) -> LinearMap:
    """A distributed matrix as a map that never gathers it.

    Args:
        matrix: Shape ``(m, n)``, sharded by rows or by columns over at most one dimension of its
            mesh (FSDP2), replicated over the others (HSDP).
        dtype: Of the products; that of the matrix if None.

    Returns:
        The map; all processes that share a copy of the matrix must use it together.

    Raises:
        InputError: If the matrix is spread in another way.
    """
    spread = [i for i, x in enumerate(matrix.placements) if not isinstance(x, Replicate)]
    # a strided shard, of tensor parallelism under FSDP2, is a subclass with another order of rows
    plain = all(type(matrix.placements[i]) is Shard for i in spread)
    if matrix.ndim != 2 or len(spread) > 1 or not plain:
        raise InputError(
            "expected a matrix sharded by rows or columns over one dimension of its mesh, got "
            f"shape {tuple(matrix.shape)} with {matrix.placements}; leave it out with modules="
        )
    local = matrix.to_local().detach()
    part = Dense(local) if dtype in (None, local.dtype) else Widened(local, dtype)
    if not spread:
        return part
    placement: Any = matrix.placements[spread[0]]
    dim, group = placement.dim % 2, matrix.device_mesh.get_group(spread[0])
    count = get_world_size(group)
    chunk = -(-matrix.shape[dim] // count)  # as torch.chunk deals them out
    sizes = [max(0, min(chunk, matrix.shape[dim] - i * chunk)) for i in range(count)]
    return ShardedMatrix(part, tuple(sizes), dim, group)
