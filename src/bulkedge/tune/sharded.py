"""A matrix that is spread over processes, as a map that never gathers the matrix.

FSDP2 keeps each process's part of a weight as a ``DTensor``.  Singular triplets need only products
with thin blocks.  Each process multiplies its part, and the results are combined.  If the matrix is
split by rows,

    W X = [W_1 X; …; W_p X]  (gathered),      Wᵀ Y = Σ_i W_iᵀ Y_i  (all-reduced),

and the other way round if it is split by columns.  Every process holds the same blocks and takes
the same steps, so all processes must call whatever uses the map.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_gather, all_reduce, get_world_size
from torch.distributed.tensor import DTensor, Replicate, Shard

from bulkedge._errors import InputError
from bulkedge._linmap import Dense, LinearMap


class ShardedMatrix(LinearMap):
    """A matrix of which each process of a group has some rows, or some columns.

    Cost of a product: that of the local part, and one collective of the size of the result.

    Args:
        local: The part of this process.
        sizes: How many rows, or columns, each process has, in the order of the group.
        dim: 0 if the matrix is split by rows, 1 if by columns.
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
        self.local_slice = slice(sum(sizes[:place]), sum(sizes[: place + 1]))

    def matmat(self, X: Tensor) -> Tensor:
        """See :meth:`LinearMap.matmat`."""
        if self.dim == 0:
            return self._gathered(self.local.matmat(X))
        return self._summed(self.local.matmat(X[self.local_slice]))

    def rmatmat(self, Y: Tensor) -> Tensor:
        """See :meth:`LinearMap.rmatmat`."""
        if self.dim == 1:
            return self._gathered(self.local.rmatmat(Y))
        return self._summed(self.local.rmatmat(Y[self.local_slice]))

    def norm_bound(self) -> float:
        """``‖W‖_F``, the same in all processes."""
        square = torch.tensor([self.local.norm_bound() ** 2], dtype=torch.float64)
        return float(self._summed(square.to(self.device)).sqrt())

    def agreed(self, digest: bytes) -> bytes:
        """See :meth:`LinearMap.agreed`: a digest of those of all processes, in their order."""
        own = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(self.device)
        parts = [torch.empty_like(own) for _ in self.sizes]
        all_gather(parts, own, group=self.group)
        return hashlib.sha256(torch.cat(parts).cpu().numpy().tobytes()).digest()

    def to_dense(self) -> Tensor:
        """The whole matrix, gathered in every process; products need no gathering."""
        whole = self.local.to_dense()
        return self._gathered(whole) if self.dim == 0 else self._gathered(whole.mT).mT

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The part of this process."""
        return self.local.tensors

    def with_tensors(self, *tensors: Tensor) -> ShardedMatrix:
        """See :meth:`LinearMap.with_tensors`."""
        return ShardedMatrix(self.local.with_tensors(*tensors), self.sizes, self.dim, self.group)

    def pushforward(self, *tangents: Tensor) -> ShardedMatrix:
        """See :meth:`LinearMap.pushforward`."""
        return ShardedMatrix(self.local.pushforward(*tangents), self.sizes, self.dim, self.group)

    def to(self, dtype: torch.dtype) -> ShardedMatrix:
        """See :meth:`LinearMap.to`."""
        return ShardedMatrix(self.local.to(dtype), self.sizes, self.dim, self.group)

    def _summed(self, part: Tensor) -> Tensor:
        """The sum over all processes."""
        total = part.contiguous().clone()
        all_reduce(total, ReduceOp.SUM, group=self.group)
        return total

    def _gathered(self, part: Tensor) -> Tensor:
        """The parts of all processes, one below the other."""
        # collectives need equal shapes: shorter parts are padded
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
        dtype: The dtype of products; that of the matrix if None.

    Returns:
        The map; all processes that share a copy of the matrix must use it together.

    Raises:
        InputError: If the matrix is spread over processes in another way.
    """
    spread = [i for i, x in enumerate(matrix.placements) if not isinstance(x, Replicate)]
    # tensor parallelism under FSDP2 has a subclass of Shard, in which the rows are in another order
    plain = all(type(matrix.placements[i]) is Shard for i in spread)
    if matrix.ndim != 2 or len(spread) > 1 or not plain:
        raise InputError(
            "expected a matrix sharded by rows or columns over one dimension of its mesh, got "
            f"shape {tuple(matrix.shape)} with {matrix.placements}; leave it out with exclude="
        )
    local = matrix.to_local().detach()
    part = Dense(local).to(dtype or local.dtype)
    if not spread:
        return part
    placement: Any = matrix.placements[spread[0]]
    dim, group = placement.dim % 2, matrix.device_mesh.get_group(spread[0])
    count = get_world_size(group)
    chunk = -(-matrix.shape[dim] // count)  # the rule of torch.chunk
    sizes = [max(0, min(chunk, matrix.shape[dim] - i * chunk)) for i in range(count)]
    return ShardedMatrix(part, tuple(sizes), dim, group)
