"""What one row of the record is about."""

from __future__ import annotations

from dataclasses import dataclass

from bulkedge.checkpoint import LoraFactors, StoredMatrix


@dataclass(frozen=True)
class Comparison:
    """One base matrix and what the fine-tune made of it: ``W = (tuned or base) + s·B·A``.

    Paths and names, no tensors: it travels to a worker process for the price of a few strings.

    Attributes:
        base: The base matrix.
        tuned: The full matrix that replaces it, if any.
        factors: The low-rank update on top, if any.
        tuned_name: What the tuned side calls it.
    """

    base: StoredMatrix
    tuned: StoredMatrix | None
    factors: LoraFactors | None
    tuned_name: str

    @property
    def transposed(self) -> bool:
        """Whether the base stores ``(in, out)``."""
        return self.base.transposed

    @property
    def matrices(self) -> tuple[StoredMatrix, ...]:
        """The full matrices of both sides."""
        return (self.base,) if self.tuned is None else (self.base, self.tuned)

    @property
    def stored_names(self) -> list[str]:
        """What the tuned side's file calls the parts of it."""
        full = () if self.tuned is None else (self.tuned.info,)
        return [info.name for info in (*full, *(self.factors.infos if self.factors else ()))]

    @property
    def note(self) -> str | None:
        """What a reader should know about the update."""
        return self.factors.note if self.factors else None
