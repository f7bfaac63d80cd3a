"""What a stored update of a weight is asked for, whatever the adapter stores it as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from .header import TensorInfo

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor
    from typing_extensions import Self

Rows = tuple[int, int]


class StoredUpdate(Protocol):
    """The update of one weight: headers and settings; its numbers stay on disk.

    An instance is small and pickles, since it travels to worker processes.
    """

    @property
    def kind(self) -> str:
        """The name of this form of update in a record, such as ``lora``."""
        ...

    @property
    def note(self) -> str | None:
        """What a reader of the record should know about the update."""
        ...

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The stored tensors, at least one."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that is updated: ``(out, in)``, or ``(vocab, dim)``."""
        ...

    @property
    def rank(self) -> int | None:
        """The rank that it was trained with; None if it has none."""
        ...

    @property
    def scale(self) -> float | None:
        """The number in front of it; None if it has none."""
        ...

    @property
    def embedding(self) -> bool:
        """Whether it says that the weight is an embedding, ``(vocab, dim)``."""
        ...

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the adapter says that the base stores the weight as ``(in, out)``: a hint."""
        ...

    def fits(self, stored: tuple[int, ...]) -> bool:
        """Whether a base tensor of the shape ``stored`` can be what it updates."""
        ...

    def of(self, *, expert: int | None = None, rows: Rows | None = None) -> Self:
        """The update of one expert, or of a range of output rows, or of both."""
        ...

    def read(self) -> tuple[Tensor, Tensor, float]:
        """``(B, A, s)`` with ``s·B·A`` the update of the matrix as ``(out, in)``.

        Returns:
            B ``(out, r)`` and A ``(r, in)`` in float64, and s.  r may be as large as the matrix.

        Raises:
            CheckpointError: If the file has changed or cannot be read any more.
        """
        ...

    def read_magnitude(self) -> Tensor | None:
        """The norms that the tuned rows are scaled to, in float64 (DoRA); None without."""
        ...

    def correctable(self) -> Correctable | str:
        """Itself, if its stored form can hold the update plus any low-rank matrix; else why not."""
        ...


class Correctable(StoredUpdate, Protocol):
    """An update that is stored as factors B and A, whose rank may grow."""

    @property
    def rank(self) -> int:
        """The rank of the factors."""
        ...

    @property
    def scale(self) -> float:
        """The number in front of ``B A``."""
        ...

    @property
    def experts(self) -> int:
        """How many experts the factors are stacked for; 0 for a layer of its own."""
        ...

    @property
    def expert(self) -> int | None:
        """Which of them is meant; None for all."""
        ...

    @property
    def rows(self) -> Rows | None:
        """Which output rows are meant; None for all."""
        ...

    @property
    def rounding(self) -> float:
        """The machine epsilon of the factors."""
        ...

    def whole(self) -> Self:
        """The update of all experts and all rows."""
        ...

    def stored(
        self, factors: Sequence[tuple[Tensor, Tensor]], magnitude: Tensor | None
    ) -> dict[str, Tensor]:
        """New factors in the layout and the dtypes of the file: the inverse of :meth:`read`.

        Args:
            factors: B and A as ``(out, in)``, s divided out, all of one rank: one pair for each
                expert in order, or one pair.
            magnitude: The norms of all rows; None without.

        Returns:
            Tensors by name.
        """
        ...

    def rounded(
        self, B: Tensor, A: Tensor, magnitude: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Factors as ``(out, in)``, and norms, in the dtypes that :meth:`stored` gives them."""
        ...

    def alpha_for(self, rank: int) -> dict[str, Tensor]:
        """The stored α, if α is a tensor, that keeps s for another rank; else nothing."""
        ...
