"""The block of right vectors with which an iteration begins, and the sources of its numbers."""

from __future__ import annotations

import hashlib
from typing import Union

import numpy
import torch
from torch import Tensor

from bulkedge._linmap import LinearMap
from bulkedge._precision import SAME_SIZE_INTEGERS
from bulkedge.triplet._tracing import unwrapped

# NumPy's generator is for the fixed seed: torch refuses to draw inside vmap, even where nothing is
# batched.
Randomness = Union[torch.Generator, numpy.random.Generator]  # noqa: UP007 — Python 3.10


def gaussian(rows: int, columns: int, generator: Randomness) -> Tensor:
    """Standard normal matrix, float64 on the CPU, so that every device and dtype starts alike."""
    if isinstance(generator, torch.Generator):
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.from_numpy(generator.standard_normal((rows, columns)))


def fixed_seed() -> numpy.random.Generator:
    """What a solver draws from where the caller gave no generator: the same numbers every time."""
    return numpy.random.default_rng(0)


def seeded_by(*matrices: LinearMap | Tensor) -> numpy.random.Generator:
    """Randomness for a statement that holds with a probability, where the caller gave none.

    A matrix can be made to deceive random vectors that are known before.  So the seed is a digest
    of all bits of the matrices: equal input has equal randomness, and none can be made for it but
    by trying many.  Of a map that is all bits of its tensors, and what it prints: the numbers in
    front of its parts, its shape.

    Args:
        matrices: Everything that the statement is about.

    Returns:
        The generator.
    """
    digest, maps = hashlib.sha256(), [m for m in matrices if isinstance(m, LinearMap)]
    for matrix in matrices:
        tensors = (matrix,) if isinstance(matrix, Tensor) else matrix.tensors
        if not isinstance(matrix, Tensor):
            digest.update(repr(matrix).encode())
        for tensor in tensors:
            digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
            plain = unwrapped(tensor).detach().cpu()
            integers = plain.view(SAME_SIZE_INTEGERS[plain.element_size()]).numpy()
            digest.update(numpy.ascontiguousarray(integers).data)
    found = digest.digest()
    for matrix in maps:
        found = matrix.agreed(found)
    return numpy.random.default_rng(int.from_bytes(found, "big"))


def unforeseen(generator: Randomness, *matrices: LinearMap | Tensor) -> Randomness:
    """What the caller gave, or :func:`seeded_by` in the place of :func:`fixed_seed`."""
    given = isinstance(generator, torch.Generator)
    return generator if given else seeded_by(*matrices)


def generic(rows: int, columns: int, like: Tensor) -> Tensor:
    """Fixed unit columns that are special for no matrix of practice; draws no random numbers."""
    i = torch.arange(1, rows + 1, dtype=torch.float64).unsqueeze(1)
    j = torch.arange(1, columns + 1, dtype=torch.float64)
    block = (0.618034 * i.square() + j * i + j.square()).sin()
    return (block / torch.linalg.vector_norm(block, dim=0)).to(like.device, like.dtype)


def start_block(A: LinearMap, columns: int, start: Tensor | None, generator: Randomness) -> Tensor:
    """Orthonormal block, shape ``(n, columns)``: the guess first, completed by Gaussian vectors.

    Args:
        A: Shape ``(m, n)``.
        columns: How many, at most n.
        start: A guess of the right vectors, shape ``(n, any)``, or None.
        generator: Source of the rest.

    Returns:
        Columns that span the guess (its first ``columns``) and something random.
    """
    return torch.linalg.qr(torch.cat(start_parts(A, columns, start, generator), dim=1)).Q


def start_parts(
    A: LinearMap, columns: int, start: Tensor | None, generator: Randomness
) -> tuple[Tensor, Tensor]:
    """The guess of :func:`start_block` as far as it is used, and the Gaussian vectors after it."""
    n = A.shape[1]
    guess = torch.empty(n, 0, dtype=A.dtype, device=A.device) if start is None else start
    kept = guess[:, :columns]
    drawn = kept[:, :0]
    if kept.shape[1] < columns:
        drawn = gaussian(n, columns - kept.shape[1], generator).to(A.device, A.dtype)
    return kept, drawn
