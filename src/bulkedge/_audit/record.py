"""The record: the product of an audit, of which every report is a view.

One row a matrix, one a direction.  The schema is versioned: a field may be added within a version,
never change its meaning.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bulkedge._errors import CheckpointError
from bulkedge.checkpoint.header import read_regular
from bulkedge.intruder import Verdict
from bulkedge.update import Expectation

from .recipe import Recipe

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEMA_VERSION = "2"
MAX_RECORD_BYTES = 2**30
Side = Literal["base", "tuned"]
Fate = Literal["judged", "kept", "lost", "excluded", "apart"]
MAX_SHARDS, MAX_MATRICES = 2**20, 2**24  # records are merged by counting up to them


class Row(BaseModel):
    """A part of a record: frozen, no fields but its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")


class File(Row):
    """One input file."""

    name: str = Field(description="File name.")
    bytes: int = Field(description="Size.")
    sha256: str = Field(description="Digest of its content.")


class Source(Row):
    """One of the two inputs."""

    path: str = Field(description="As the caller gave it.")
    kind: Literal["file", "folder", "sharded", "lora"] = Field(description="What lay there.")
    files: list[File] = Field(description="The files that were read.")
    trained_on: str | None = Field(
        None, description="What an adapter names as its base; not checked."
    )


class Inputs(Row):
    """What was compared."""

    base: Source
    tuned: Source


class Tool(Row):
    """What made the record."""

    name: str = "bulkedge"
    version: str
    torch: str


class Skipped(Row):
    """A tensor that was not audited."""

    name: str = Field(description="Its name in the file that holds it.")
    reason: str
    lost: bool = Field(description="Part of the update of a weight, which went unjudged.")
    side: Side = Field(default="tuned", description="Which input holds it.")
    accepted: bool = Field(default=False, description="A weight that the recipe leaves out.")


class Stored(Row):
    """A tensor of two or more dimensions of either side, and what became of it."""

    side: Side = Field(description="Which input holds it.")
    name: str = Field(description="Its name in the file that holds it.")
    fate: Fate = Field(
        description="`judged`: read for `rows`; `kept`: a weight of the base that no part of an "
        "adapter updates; `lost`: unjudged; `excluded`: left out by the recipe; `apart`: no "
        "weight, or one that no layer of the other side corresponds to."
    )
    rows: list[int] = Field([], description="The matrices that it is a part of, by position.")


class Counts(Row):
    """The tensors of two or more dimensions of both sides, each counted once."""

    base: int = Field(ge=0, description="Of the base.")
    tuned: int = Field(ge=0, description="Of the tuned side.")
    compared: int = Field(ge=0, description="Of both, read for a matrix that was audited.")
    equal: int = Field(ge=0, description="Proved equal, or kept as they are by an adapter.")
    lost: int = Field(ge=0, description="Weights that went unjudged.")
    excluded: int = Field(ge=0, description="Left out by the recipe.")
    apart: int = Field(ge=0, description="No weights, or new heads beside the base's layers.")

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        """Each tensor is counted in one place."""
        counted = self.compared + self.equal + self.lost + self.excluded + self.apart
        if counted != self.base + self.tuned:
            raise ValueError(
                f"expected counts that add up to {self.base + self.tuned} tensors, got {counted}"
            )
        return self


class Direction(Row):
    """One leading singular vector of a tuned matrix, seen from the base."""

    index: int = Field(description="Rank of its singular value in the tuned matrix, 0 the largest.")
    sigma: float = Field(description="Singular value.")
    side: Literal["left", "right"]
    score: float = Field(description="Largest |cosine| with a base vector of the same side.")
    score_lower: float = Field(description="It is at least this.")
    score_upper: float = Field(description="It is at most this.")
    matched_index: int = Field(description="The base vector that attains it; -1 without one.")
    subspace_overlap: float = Field(description="Norm of its projection on the base's top 2k.")
    overlap_lower: float = Field(description="It is at least this.")
    overlap_upper: float = Field(description="It is at most this.")
    verdict: Verdict = Field(description="What holds at both ends of both intervals.")
    method: Literal["certified", "dense"] = Field(description="By products alone, or by SVDs.")
    residual: float = Field(description="Residual of the triplet over the largest singular value.")


class Angles(Row):
    """The tuned top k as a space, against the base's top 2k: what mixing of vectors cannot hide."""

    side: Literal["left", "right"]
    cosines_lower: list[float] = Field(description="Of the principal angles; at least these.")
    cosines_upper: list[float] = Field(description="At most these.")
    similarity: list[list[float]] = Field(
        [], description="|cosine| of each direction (rows) with the base's top 2k, to 3 digits."
    )
    outside: int = Field(description="How many are certainly below √½.")
    undecided: int = Field(description="How many may be on either side of √½.")


class Spectrum(Row):
    """The singular values of a base matrix in outline: the leading ones, then ever fewer."""

    ranks: list[int] = Field(description="Which, from 0 for the largest.")
    values: list[float] = Field(description="Their values, to 5 digits.")


class Bulk(Row):
    """The singular values of a base matrix: what of them is noise, and where it ends."""

    exact: bool = Field(description="From all singular values; else from a quadrature of them.")
    white: bool = Field(description="Whether the Marchenko–Pastur law describes them.")
    sigma: float = Field(description="Noise level (of an entry) by that law; a guess if not white.")
    edge: float = Field(description="Upper edge: by that law if white, else from the values.")
    misfit: float = Field(description="Kolmogorov–Smirnov distance from that law.")
    misfit_limit: float = Field(description="What noise reaches once in a thousand times.")
    spikes: int = Field(description="How many values of the base stand beyond the edge.")
    p_value: float = Field(description="Of the last of them; of the largest value without any.")


class Predicted(Row):
    """One spike (singular value of a low-rank update): expected, and measured."""

    theta: float = Field(description="Its strength.")
    separated: bool = Field(description="Whether it exceeds the threshold.")
    expected: Expectation = Field(description="What generic vectors of that strength would do.")
    location: float | None = Field(description="Expected outlier; null, as below, without one.")
    sd: float | None = Field(description="Its standard deviation.")
    left_overlap: float | None = Field(description="Expected |⟨u, û⟩|².")
    right_overlap: float | None = Field(description="Expected |⟨v, v̂⟩|².")
    left_score: float | None = Field(description="Expected (median) score of û.")
    right_score: float | None = Field(description="Expected (median) score of v̂.")
    measured_index: int | None = Field(
        None, description="The direction that carries the spike; null if no judged one does."
    )
    measured_location: float | None = Field(None, description="Its singular value.")
    measured_left_overlap: float | None = Field(None, description="Its |⟨u, û⟩|².")
    measured_right_overlap: float | None = Field(None, description="Its |⟨v, v̂⟩|².")


class Matrix(Row):
    """One audited matrix."""

    name: str = Field(description="Name of the base tensor.")
    tuned_name: str = Field(description="Name of what was compared with it.")
    shape: tuple[int, int] = Field(description="As the base stores it.")
    transposed: bool = Field(description="The base stores (in, out): sides are those of (out, in).")
    dtype: str = Field(description="Of the base, as safetensors spells it.")
    update: Literal["dense", "lora"]
    rank: int | None = Field(description="Rank of the factors; null for a dense update.")
    scale: float | None = Field(description="The number in front of B·A; null for a dense update.")
    status: Literal["audited", "unchanged", "not_finite", "failed"]
    note: str | None = Field(None, description="What a reader should know about the status.")
    spectral_norm_base: float | None = None
    spectral_norm_update: float | None = None
    intruders: int = Field(0, description="The paper's count: directions with score < epsilon.")
    directions: list[Direction] = []
    angles: list[Angles] = Field([], description="One a side.")
    passes: int = Field(0, description="Block products with the base or the tuned matrix.")
    spectrum: Spectrum | None = Field(None, description="Of the base.")
    bulk: Bulk | None = Field(None, description="Of the base; null where none could be fitted.")
    threshold: float | None = Field(
        None, description="Strength beyond which a generic spike makes an outlier."
    )
    spikes: int | None = Field(None, description="Spikes of a low-rank update: its true rank.")
    separated: int | None = Field(None, description="Of these, beyond the threshold.")
    predicted: list[Predicted] = Field([], description="The strongest of them, at most top_k.")


class Summary(Row):
    """The counts."""

    matrices: int = Field(description="Rows in `matrices`.")
    audited: int = Field(description="Of these, compared direction by direction.")
    unchanged: int = Field(description="Of these, equal to the base.")
    not_audited: int = Field(description="Of these, not finite or failed.")
    intruders: int = Field(description="The paper's count: directions with score < epsilon.")
    verdicts: dict[Verdict, int] = Field(description="Directions by verdict.")
    skipped: int = Field(description="Rows in `skipped`.")
    lost: int = Field(description="Of these, updates of weights, which went unjudged.")
    spikes: int = Field(0, description="Spikes of low-rank updates in matrices with a threshold.")
    separated: int = Field(0, description="Of these, beyond their threshold.")
    tensors: Counts | None = Field(
        None, description="All tensors of two or more dimensions; null of a part of an audit."
    )

    @property
    def complete(self) -> bool:
        """Whether every update was judged and every direction decided."""
        undecided = self.verdicts[Verdict.UNDECIDED]
        judged = sum(self.verdicts.values())
        return judged > 0 and not (self.not_audited or self.lost or undecided)


class Run(Row):
    """How the computation went: what alone differs between equal audits on equal processors."""

    started: str = Field(description="UTC, ISO 8601.")
    seconds: float
    engine: str = Field("local", description="Where rows were computed.")
    jobs: int | None = Field(description="Worker processes; null where a cluster decides.")
    resumed: int = Field(0, description="Rows taken from the journal of an earlier run.")


class Part(Row):
    """Which part of an audit a record has."""

    index: int = Field(ge=1, description="Which, counted from 1.")
    count: int = Field(ge=1, le=MAX_SHARDS, description="Of how many.")
    positions: list[int] = Field(description="The place of each row in the whole audit.")
    matrices: int = Field(ge=0, le=MAX_MATRICES, description="How many rows the whole audit has.")


class Document(Row):
    """A record that is a file of its own.

    Attributes:
        kind: What a message calls it.
    """

    kind: ClassVar[str]

    def to_json(self) -> str:
        """The record as indented JSON text with a final newline."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a record back.

        Args:
            path: A file that :meth:`to_json` text was written to.

        Returns:
            The record.

        Raises:
            CheckpointError: If the file is missing, or is not a record of this schema.
        """
        try:
            return cls.model_validate_json(read_regular(Path(path), MAX_RECORD_BYTES))
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror}); give the file of a {cls.kind}"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            raise CheckpointError(
                f"{path}: not a {cls.kind} of schema {SCHEMA_VERSION} "
                f"({'.'.join(map(str, first['loc']))}: {first['msg']})"
            ) from None


class Record(Document):
    """The result of :func:`bulkedge.audit`."""

    kind: ClassVar = "bulkedge record"

    schema_version: Literal["2"] = SCHEMA_VERSION
    tool: Tool
    inputs: Inputs
    recipe: Recipe
    shard: Part | None = Field(None, description="Null for a whole audit.")
    summary: Summary
    skipped: list[Skipped]
    tensors: list[Stored] = Field(
        description="Every tensor of two or more dimensions of either side, once."
    )
    matrices: list[Matrix]
    run: Run

    @model_validator(mode="after")
    def _counts_all(self) -> Self:
        """The counts are those of the list."""
        if self.shard is not None or self.summary.tensors is None:  # the record of a part
            return self
        if any(i not in range(len(self.matrices)) for row in self.tensors for i in row.rows):
            raise ValueError("expected tensors of the matrices that are here, got others")
        if self.summary.tensors != count_tensors(self.tensors, self.matrices):
            raise ValueError("expected the counts of the tensors listed, got others")
        return self


def count_tensors(tensors: list[Stored], matrices: list[Matrix]) -> Counts:
    """How many tensors were compared, how many are equal, how many lost.

    Args:
        tensors: All tensors of two or more dimensions.
        matrices: All rows of an audit.

    Returns:
        The counts.  One of several matrices counts as lost if one of these could not be audited,
        and as equal only if all are.
    """
    counts = Counter(_fate(row, matrices) for row in tensors)
    sides = Counter(row.side for row in tensors)
    return Counts(
        base=sides["base"],
        tuned=sides["tuned"],
        **{name: counts[name] for name in ("compared", "equal", "lost", "excluded", "apart")},
    )


def _fate(row: Stored, matrices: list[Matrix]) -> str:
    """Where a tensor is counted."""
    if row.fate != "judged":
        return "equal" if row.fate == "kept" else row.fate
    statuses = {matrices[i].status for i in row.rows}
    if not statuses or statuses & {"not_finite", "failed"}:
        return "lost"
    return "equal" if statuses == {"unchanged"} else "compared"


def summarise(
    matrices: list[Matrix], skipped: list[Skipped], tensors: list[Stored] | None = None
) -> Summary:
    """The counts of a record.

    Args:
        matrices: Its rows.
        skipped: What was left out.
        tensors: All tensors of two or more dimensions; None where not all rows are here.

    Returns:
        The counts.
    """
    verdicts = dict.fromkeys(Verdict, 0)
    for matrix in matrices:
        for direction in matrix.directions:
            verdicts[direction.verdict] += 1
    statuses = [matrix.status for matrix in matrices]
    audited, unchanged = statuses.count("audited"), statuses.count("unchanged")
    return Summary(
        matrices=len(matrices),
        audited=audited,
        unchanged=unchanged,
        not_audited=len(matrices) - audited - unchanged,
        intruders=sum(matrix.intruders for matrix in matrices),
        verdicts=verdicts,
        skipped=len(skipped),
        lost=sum(row.lost for row in skipped),
        spikes=sum(matrix.spikes or 0 for matrix in matrices if matrix.separated is not None),
        separated=sum(matrix.separated or 0 for matrix in matrices),
        tensors=None if tensors is None else count_tensors(tensors, matrices),
    )
