"""The rows of a record: a matrix, its directions, its base's bulk, and what was expected."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from bulkedge.intruder import COUNTED, Verdict
from bulkedge.update import Expectation

from .ranges import (
    MOST,
    Count,
    Dtype,
    Fraction,
    Kind,
    Positive,
    Real,
    Size,
    check_between,
    check_frobenius,
    check_parts,
    check_ratio,
)
from .row import Row

if TYPE_CHECKING:
    from typing_extensions import Self


MOST_SCALED = 2.0**40
"""No update is judged at a larger scale."""
FARTHEST = 8.5
"""No scale is expected at which an update exceeds this many times the norm of its base."""


class Direction(Row):
    """One leading singular vector of a tuned matrix, seen from the base."""

    index: Count = Field(
        description="Rank of its singular value in the tuned matrix, 0 the largest."
    )
    sigma: Size = Field(description="Singular value.")
    side: Literal["left", "right"]
    score: Fraction = Field(description="Largest |cosine| with a base vector of the same side.")
    score_lower: Fraction = Field(description="It is at least this.")
    score_upper: Fraction = Field(description="It is at most this.")
    matched_index: int = Field(
        ge=-1, le=MOST, description="The base vector that attains it; -1 without one."
    )
    subspace_overlap: Fraction = Field(description="Norm of its projection on the base's top 2k.")
    overlap_lower: Fraction = Field(description="It is at least this.")
    overlap_upper: Fraction = Field(description="It is at most this.")
    verdict: Verdict = Field(description="What holds at both ends of both intervals.")
    method: Literal["certified", "dense"] = Field(description="By products alone, or by SVDs.")
    residual: Size = Field(description="Residual of the triplet over the largest singular value.")
    drift_along: Size | None = Field(
        None,
        description="E⟨y, ΔW x⟩² / E‖W0 x‖²: the part of the matrix's drift along this direction y "
        "of its outputs; null on the side of its inputs, and where no drift was measured.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        """Each value lies in its interval."""
        check_between(self.score_lower, self.score, self.score_upper, "score")
        overlap = self.subspace_overlap
        check_between(self.overlap_lower, overlap, self.overlap_upper, "overlap")
        return self


class Angles(Row):
    """The tuned top k as a space, against the base's top 2k: what mixing of vectors cannot hide."""

    side: Literal["left", "right"]
    cosines_lower: list[Fraction] = Field(description="Of the principal angles; at least these.")
    cosines_upper: list[Fraction] = Field(description="At most these.")
    similarity: list[list[Fraction]] = Field(
        [], description="|cosine| of each direction (rows) with the base's top 2k, to 3 digits."
    )
    outside: Count = Field(description="How many are certainly below √½.")
    undecided: Count = Field(description="How many may be on either side of √½.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        """Both ends of each interval, in order."""
        if len(self.cosines_lower) != len(self.cosines_upper):
            raise ValueError("expected as many lower as upper ends")
        for low, high in zip(self.cosines_lower, self.cosines_upper, strict=True):
            check_between(low, low, high, "cosine")
        if self.outside + self.undecided > len(self.cosines_lower):
            raise ValueError(f"expected at most {len(self.cosines_lower)} angles, got more")
        return self


class Spectrum(Row):
    """The singular values of a base matrix in outline: the leading ones, then ever fewer."""

    ranks: list[Count] = Field(description="Which, from 0 for the largest.")
    values: list[Size] = Field(description="Their values, to 5 digits.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        """A value for each rank, in order."""
        if len(self.ranks) != len(self.values) or sorted(set(self.ranks)) != self.ranks:
            raise ValueError("expected ranks in order, and a value for each")
        return self


class Bulk(Row):
    """The singular values of a base matrix: what of them is noise, and where it ends."""

    exact: bool = Field(description="From all singular values; else from a quadrature of them.")
    white: bool = Field(description="Whether the Marchenko–Pastur law describes them.")
    sigma: Size = Field(description="Noise level (of an entry) by that law; a guess if not white.")
    edge: Size = Field(description="Upper edge: by that law if white, else from the values.")
    misfit: Size = Field(description="Kolmogorov–Smirnov distance from that law.")
    misfit_limit: Size = Field(description="What noise reaches once in a thousand times.")
    spikes: Count = Field(description="How many values of the base stand beyond the edge.")
    p_value: Fraction = Field(description="Of the last of them; of the largest value without any.")
    repulsion: Fraction | None = Field(
        None,
        description="Mean ratio of neighbouring spacings below the edge, 0.53 in noise; null where "
        "not all values are exact.",
    )
    repulsion_p_value: Fraction | None = Field(
        None, description="Of noise with a ratio as far from that: below 0.001 it is not white."
    )
    small: Count | None = Field(
        None, description="How many values stand below the lower edge; null as `repulsion`."
    )
    small_p_value: Fraction | None = Field(
        None, description="Of the last of them; of the smallest value without any."
    )

    @property
    def looks_untrained(self) -> bool:
        """Whether a base with this bulk is noise, from which nothing stands out."""
        return self.white and not self.spikes


class ScalePoint(Row):
    """The leading directions of a matrix whose update is scaled by some factor."""

    scale: Size = Field(le=MOST_SCALED, description="The factor; 1 is the update as it is.")
    new: Size = Field(
        le=MOST, description="How many have a score below epsilon; expected: the mean."
    )
    score: Fraction = Field(description="The lowest score; expected: its median, 1 without a new.")


class ScaleCurve(Row):
    """New directions and lowest score against the factor on the update."""

    expected: list[ScalePoint] = Field(
        [], description="By how it lies to the base, at 13 scales from 1/32 to 2."
    )
    judged: list[ScalePoint] = Field(
        [], description="As judged: at 1, and where the critical scale was sought."
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        """Ascending scales."""
        for points in (self.expected, self.judged):
            scales = [point.scale for point in points]
            if sorted(set(scales)) != scales:
                raise ValueError(f"expected ascending scales, got {scales[:4]}")
        return self


class CriticalScale(Row):
    """The factor on an update at which the first of the leading directions falls below ε."""

    expected: Size | None = Field(
        description="By the law: from how the update lies to the base where `aligned`, else θ_k / "
        "‖ΔW‖₂, that of a generic update; 0 if new at every scale, null if nothing turns new."
    )
    aligned: bool = Field(
        default=False, description="Whether `expected` knows the vectors of the update."
    )
    low: Size | None = Field(
        default=None,
        description="Nothing is new at it, nor at any lower scale that was tried: see the judged "
        "points of `scale_curve`. 0 if no such scale was found, null if not asked.",
    )
    high: Size | None = Field(
        default=None,
        description="The lowest that was tried at which something is new; null if none was found, "
        "or not asked.",
    )
    undecided: Count = Field(default=0, description="Scales tried at which a verdict stayed open.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        """The low end below the high one, of a bracket that was asked for."""
        if self.high is not None and (self.low is None or self.low >= self.high):
            raise ValueError(f"expected a low end below {self.high}, got {self.low}")
        return self


class Predicted(Row):
    """One spike (singular value of a low-rank update): expected, and measured."""

    theta: Size = Field(description="Its strength.")
    supercritical: bool = Field(description="Whether it exceeds the threshold.")
    expected: Expectation = Field(description="What generic vectors of that strength would do.")
    location: Size | None = Field(description="Expected outlier; null, as below, without one.")
    sd: Size | None = Field(description="Its standard deviation.")
    left_overlap: Fraction | None = Field(description="Expected |⟨u, û⟩|².")
    right_overlap: Fraction | None = Field(description="Expected |⟨v, v̂⟩|².")
    left_score: Fraction | None = Field(description="Expected (median) score of û.")
    right_score: Fraction | None = Field(description="Expected (median) score of v̂.")
    measured_index: Count | None = Field(
        None, description="The direction that carries the spike; null if no judged one does."
    )
    measured_location: Size | None = Field(None, description="Its singular value.")
    measured_left_overlap: Fraction | None = Field(None, description="Its |⟨u, û⟩|².")
    measured_right_overlap: Fraction | None = Field(None, description="Its |⟨v, v̂⟩|².")


class DriftPart(Row):
    """What one singular direction of an update adds to its drift."""

    index: Count = Field(description="Rank of its singular value in the update, 0 the largest.")
    sigma: Size = Field(description="Singular value of the update.")
    drift: Size = Field(description="σ² vᵀCv / tr(W0 C W0ᵀ): the parts of all add up to the drift.")


class Matrix(Row):
    """One audited matrix."""

    name: str = Field(description="Name of the base tensor.")
    tuned_name: str = Field(description="Name of what was compared with it.")
    shape: tuple[Positive, Positive] = Field(description="As the base stores it.")
    transposed: bool = Field(description="The base stores (in, out): sides are those of (out, in).")
    dtype: Dtype = Field(description="Of the base, as safetensors spells it.")
    update: Kind = Field(description="`dense`, or a kind: `lora`.")
    rank: Count | None = Field(description="Rank of the factors; null for a dense update.")
    scale: Real | None = Field(description="The number in front of B·A; null for a dense update.")
    status: Literal["audited", "unchanged", "not_finite", "failed"]
    note: str | None = Field(None, description="What a reader should know about the status.")
    read_only: str | None = Field(None, description="Why no repair can write it; null if one can.")
    spectral_norm_base: Size | None = Field(
        None, description="‖W0‖₂; null where nothing was judged, or its value has not converged."
    )
    spectral_norm_update: Size | None = None
    relative_update: Size | None = Field(
        None, description="‖ΔW‖_F / ‖W0‖_F; null where nothing was judged, or the base is zero."
    )
    new_directions: Count = Field(0, description="How many directions are new: score < epsilon.")
    directions: list[Direction] = Field([], description="The judged ones, of each side.")
    angles: list[Angles] = Field([], description="One per side.")
    passes: Count = Field(0, description="Block products with the base or the tuned matrix.")
    spectrum: Spectrum | None = Field(None, description="Of the base.")
    bulk: Bulk | None = Field(None, description="Of the base; null where none could be fitted.")
    threshold: Size | None = Field(
        None, description="Strength beyond which a generic spike makes an outlier."
    )
    top_k_threshold: Size | None = Field(
        None, description="Beyond it a spike is among the top_k directions; at most the k-th value."
    )
    critical_scale: CriticalScale | None = None
    scale_curve: ScaleCurve | None = Field(
        None, description="What scaling the update does to its new directions."
    )
    spikes: Count | None = Field(None, description="Spikes of a low-rank update: its true rank.")
    supercritical: Count | None = Field(None, description="Of these, beyond the threshold.")
    beyond_top_k_threshold: Count | None = Field(
        None, description="Of these, beyond `top_k_threshold`."
    )
    in_use: Count | None = Field(
        None, description="How many of the strongest spikes carry 99 % of the update's energy."
    )
    effective_rank: Size | None = Field(
        None,
        description="exp(−Σ pᵢ log pᵢ), pᵢ = γᵢ/Σγ, of its spikes γ; null for a dense update.",
    )
    stable_rank: Size | None = Field(
        None, description="‖ΔW‖_F²/‖ΔW‖₂², of its spikes; null for a dense update."
    )
    predicted: list[Predicted] = Field([], description="The strongest of them, at most top_k.")
    drift: Size | None = Field(
        None,
        description="tr(ΔW C ΔWᵀ)/tr(W0 C W0ᵀ) on the inputs that the moments are of; null without "
        "moments, and where `drift_note` says why.",
    )
    drift_bound: Size | None = Field(
        None,
        description="(√output_change + ‖δb‖)² / output_power, where the bias of the layer has "
        "changed by δb: E‖ΔW x + δb‖² / E‖W0 x‖² is at most that; null where it has not.",
    )
    drift_note: str | None = Field(
        None, description="Why the drift of a changed matrix is not known, moments being given."
    )
    drift_inputs: Count | None = Field(
        None, description="How many inputs the moments are of; null of an embedding."
    )
    output_change: Size | None = Field(
        None, description="tr(ΔW C ΔWᵀ): mean square of the change of the outputs."
    )
    output_power: Size | None = Field(
        None, description="tr(W0 C W0ᵀ): mean square of the base's outputs."
    )
    drift_parts: list[DriftPart] = Field(
        [], description="The directions of the update that carry most of it, at most top_k."
    )

    @model_validator(mode="after")
    def _limits_fit(self) -> Self:
        """Of the spikes fewer exceed the higher limit; a generic scale is that limit's."""
        exceed = [self.supercritical, self.beyond_top_k_threshold]
        if (self.top_k_threshold or 0.0) < (self.threshold or 0.0):  # a bulk that ends above σ_k
            exceed.reverse()
        counts = [count for count in (self.spikes, *exceed) if count is not None]
        if counts != sorted(counts, reverse=True):
            raise ValueError(f"expected no more spikes beyond a higher limit, got {counts}")
        if self.spikes is not None and (self.in_use or 0) > self.spikes:
            raise ValueError(f"expected at most {self.spikes} spikes in use, got {self.in_use}")
        for name in ("effective_rank", "stable_rank"):
            rank = getattr(self, name)
            if rank is not None and not (self.spikes and 0.999 <= rank <= 1.001 * self.spikes):
                raise ValueError(f"expected {name} of 1 to {self.spikes}, got {rank}")
        found, norm = self.critical_scale, self.spectral_norm_update or 0.0
        largest = math.inf if self.spectral_norm_base is None else self.spectral_norm_base
        if found is not None and found.expected is not None:
            if not found.aligned:
                check_ratio(self.top_k_threshold or 0.0, norm, found.expected, "critical scale")
            elif found.expected * norm > FARTHEST * largest:
                raise ValueError(f"expected a critical scale within reach, got {found.expected}")
        return self

    @model_validator(mode="after")
    def _norms_fit(self) -> Self:
        """A Frobenius norm is at least the spectral norm, and at most √rank of it."""
        base, update = self.spectral_norm_base, self.spectral_norm_update
        if self.relative_update is not None and base and update is not None:
            check_frobenius(self.relative_update, update / base, min(self.shape))
        return self

    @model_validator(mode="after")
    def _drift_adds_up(self) -> Self:
        """Parts are no more than the whole, which is the ratio of change and power."""
        along = [row.drift_along for row in self.directions if row.drift_along is not None]
        if self.drift is None:
            parts = self.output_change, self.output_power, self.drift_bound
            if self.drift_parts or along or any(part is not None for part in parts):
                raise ValueError("expected no parts of a drift that is not known")
            return self
        if self.drift_bound is not None and self.drift_bound < self.drift:
            raise ValueError(f"expected a bound of at least {self.drift}, got {self.drift_bound}")
        if self.output_power:
            check_ratio(self.output_change or 0.0, self.output_power, self.drift, "drift")
        check_parts((part.drift for part in self.drift_parts), self.drift, "drift")
        # of one side alone, that of the outputs
        check_parts(along, self.drift, "drift")
        return self

    def __repr__(self) -> str:
        """A line: its directions and spectra would fill a page."""
        worst = min((row.score for row in self.directions), default=None)
        score = "" if worst is None else f", worst score {worst:.3f}"
        new = f"{self.new_directions} new of {len(self.directions)}"
        return f"<Matrix {self.name!r} {self.shape}: {self.status}, {new}{score}>"

    __str__ = __repr__

    @property
    def looks_untrained(self) -> bool:
        """Whether its base is noise, from which nothing stands out; False where none was fitted."""
        return self.status == "audited" and self.bulk is not None and self.bulk.looks_untrained

    @property
    def energy_new(self) -> float | None:
        """The share of the judged directions' energy that new ones have, ``Σ_new σ² / Σ σ²``.

        Of both sides where both were judged; None where nothing was.  A count saturates where most
        directions are new; this still says how strong they are.
        """
        energy = sum(row.sigma**2 for row in self.directions)
        new = sum(row.sigma**2 for row in self.directions if row.verdict in COUNTED)
        return new / energy if energy else None

    @property
    def drift_along_new(self) -> float | None:
        """The part of the drift along new directions of the outputs; None where none are judged."""
        known = [row for row in self.directions if row.drift_along is not None]
        new = [row.drift_along or 0.0 for row in known if row.verdict in COUNTED]
        return sum(new) if known else None
