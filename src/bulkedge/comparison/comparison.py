"""What one row of the record is about."""

from __future__ import annotations

from dataclasses import dataclass

from bulkedge.checkpoint import StoredMatrix, StoredUpdate
from bulkedge.checkpoint.header import TensorInfo
from bulkedge.checkpoint.peft import ONE_RANK
from bulkedge.moments import StoredLayer


@dataclass(frozen=True)
class Vector:
    """A vector of the tuned side, such as a bias or the weight of a norm.

    Attributes:
        name: What the base calls it, or the tuned side where it is added.
        base: What it replaces in the base; None where it is added to the model.
        tuned: The vector.
    """

    name: str
    base: TensorInfo | None
    tuned: TensorInfo


@dataclass(frozen=True)
class Comparison:
    """One base matrix and its fine-tuned version: ``W = (tuned or base) + update``.

    It holds paths and names, no tensors, so sending it to a worker process is cheap.

    Attributes:
        base: The base matrix.
        tuned: The full matrix that replaces it, if any.
        factors: The stored update on top, if any.
        tuned_name: Its name on the tuned side.
        inputs: Where the moments of its inputs are, or why they are not known; None if drift is not
            requested.
        resized: The rows of base and tuned side, where these are two sizes of a vocabulary and the
            first rows are compared, those that both have.
        bias: The bias of its layer, where drift is requested and the fine-tune has changed it.
    """

    base: StoredMatrix
    tuned: StoredMatrix | None
    factors: StoredUpdate | None
    tuned_name: str
    inputs: StoredLayer | str | None = None
    resized: tuple[int, int] | None = None
    bias: Vector | None = None

    @property
    def transposed(self) -> bool:
        """Whether the base stores ``(in, out)``."""
        return self.base.transposed

    @property
    def base_key(self) -> tuple[str, str]:
        """What comparisons with the same base matrix have in common: its file and its name."""
        return str(self.base.info.file), self.base.name

    @property
    def matrices(self) -> tuple[StoredMatrix, ...]:
        """The full matrices of both sides."""
        return (self.base,) if self.tuned is None else (self.base, self.tuned)

    @property
    def stored_names(self) -> list[str]:
        """The tensors of the tuned side that it is read from, companions left out."""
        full = () if self.tuned is None else (self.tuned.info,)
        return [info.name for info in (*full, *(self.factors.infos if self.factors else ()))]

    @property
    def rounding(self) -> float:
        """The relative rounding of the form that a correction is stored in; 0 if none can be."""
        if self.factors is None:
            return (self.tuned or self.base).codec.rounding
        update = self.factors.correctable()
        return 0.0 if isinstance(update, str) else update.rounding

    @property
    def read_only(self) -> str | None:
        """Why a repair cannot write the matrix where it is stored; None if it can."""
        if self.factors is None:
            return None if self.tuned is None else _why_not_written(self.tuned)
        if self.base.info.name.endswith("in_proj_weight"):
            return ONE_RANK
        if self.resized is not None:
            return "an update of more rows than the base has: the vocabulary was resized"
        update = self.factors.correctable()
        return update if isinstance(update, str) else None

    @property
    def note(self) -> str | None:
        """What a reader should know about the update."""
        stored = self.factors.note if self.factors else None
        if self.resized is None:
            return stored
        rows, largest = min(self.resized), max(self.resized)
        resized = f"{rows} of {largest} rows compared: the vocabulary was resized"
        return f"{stored}; {resized}" if stored else resized


def _why_not_written(stored: StoredMatrix) -> str | None:
    """Why other numbers cannot be written over a full matrix."""
    shares = None if stored.alias is None else f"shares its tensor with {stored.info.name}"
    return stored.codec.read_only or shares
