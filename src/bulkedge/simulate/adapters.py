"""Spectral adapters, which are built on the leading triplets of the base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bulkedge.intruder import Verdict

from . import _draw
from ._experiment import Experiment, Row, Strengths
from ._model import EPSILON, Base, gaussian, gaussian_factors, noise_with_signals
from ._table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("additive", "rotational", "low rank as additive", "low rank as rotational")


class Adapters(Experiment):
    """Spectral adapters, additive and rotational, against low-rank updates of equal norm.

    Additive: ``[U₁ + A_U | U₂] S [V₁ + A_V | V₂]ᵀ``; rotational: ``[U₁R_U | U₂] S [V₁R_V | V₂]ᵀ``
    with ``R = exp(tK)``, K a random skew-symmetric matrix of norm 1.  U₁ has r columns, and those
    of A_U and A_V have norm t/2, about as far as a small rotation moves a column.

    References:
        Zhang and Pilanci, arXiv:2405.13952.
    """

    name: ClassVar[str] = "adapters"
    keys: ClassVar = {
        "method": "additive, rotational, or a low-rank update with the norm of either",
        "strength": "t: largest angle of a rotation; twice the norm of a column of A_U and A_V",
    }
    measured: ClassVar = {
        "norm": "‖ΔW‖_F/‖S₁‖_F, S₁ the r leading singular values of the base",
        "value_change": "largest change of a singular value, over the largest of the base",
        "score": "mean score of the r leading tuned directions",
        "overlap": "mean ‖U₁ᵀû‖ of the same",
        "counted": f"how many of them have a score < {EPSILON:g}",
        "rotated": "of these, mostly inside the 2r leading base directions",
        "intruders": "of these, mostly outside",
    }
    quick: ClassVar = {"size": 60, "repeats": 2, "rank": 4, "strengths": [0.2, 1.0]}

    size: int = Field(300, ge=20, le=2000, description="Side of the square matrix.")
    rank: int = Field(8, ge=2, description="Leading directions r that are adapted.")
    signals: int = Field(8, ge=1, description="Signals of the base.")
    strongest: float = Field(6.0, ge=2, le=1e6, description="Strongest signal; the weakest is 2.")
    strengths: Strengths = Field(
        (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0), description="t, ascending."
    )

    def trial(self, generator: torch.Generator) -> Iterator[Row]:
        """See :meth:`Experiment.trial`."""
        n, r = self.size, self.rank
        base = Base.of(noise_with_signals((n, n), self.signals, self.strongest, generator))
        noises = [gaussian((n, r), generator) / (2 * n**0.5) for _ in range(2)]
        skews = [_skew(gaussian((r, r), generator)) for _ in range(2)]
        B, A = gaussian_factors((n, n), r, 1.0, generator)
        U, V = base.U[:, :r], base.V[:, :r]
        for t in self.strengths:
            moved = (X + t * E for X, E in zip((U, V), noises, strict=True))
            rotated = (X @ torch.matrix_exp(t * K) for X, K in zip((U, V), skews, strict=True))
            changes = [_change_of_vectors(base, *vectors) for vectors in (moved, rotated)]
            changes += [change.norm() * B @ A for change in changes]
            for method, change in zip(METHODS, changes, strict=True):
                yield {"method": method, "strength": t, **self._measure(base, change)}

    def _measure(self, base: Base, change: Tensor) -> Row:
        """The measured columns for one change of the base."""
        judged = base.judge(base.matrix + change, self.rank)
        return {
            "norm": float(change.norm() / base.S[: self.rank].norm()),
            "value_change": float((judged.sigma - base.S).abs().max() / base.S[0]),
            "score": float(judged.scores.score.mean()),
            "overlap": float(base.scores(judged.u).subspace_overlap.mean()),
            "counted": judged.counted,
            "rotated": judged.verdicts(Verdict.ROTATED),
            "intruders": judged.verdicts(Verdict.INTRUDER),
        }

    def plot(self, table: Table) -> Figure:
        """See :meth:`Experiment.plot`."""
        note = (
            f"points: mean ± sd of {self.repeats} draws, {self.size}×{self.size}, "
            f"the {self.rank} leading directions adapted"
        )
        figure, axes = _draw.panels(2, 3, note=note)
        measures = {
            "value_change": r"$\max_i|\Delta s_i|/s_1$",
            "score": r"mean score $\max_i|\langle u_i, û\rangle|$",
            "overlap": r"mean overlap $\|U_1^\top û\|$",
            "counted": f"score < {EPSILON:g} (new)",
            "rotated": "of these rotated",
            "intruders": "of these intruders",
        }
        for panel, (name, title) in zip(axes, measures.items(), strict=True):
            for series, method in enumerate(METHODS):
                found = table.where(method=method)
                _draw.points(panel, found, "norm", name, series=series, label=method, joined=True)
            panel.set_xscale("log")
            _draw.set_labels(panel, r"$\|\Delta W\|_F/\|S_1\|_F$", title)
        axes[0].legend()
        return figure


def _skew(G: Tensor) -> Tensor:
    """A skew-symmetric matrix of norm 1."""
    K = G - G.mT
    return K / torch.linalg.matrix_norm(K, 2)


def _change_of_vectors(base: Base, U: Tensor, V: Tensor) -> Tensor:
    """The change of the base if U and V replace its leading singular vectors."""
    r = U.shape[1]
    return (U * base.S[:r]) @ V.mT - (base.U[:, :r] * base.S[:r]) @ base.V[:, :r].mT
