"""Which base direction became which tuned direction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from . import _draw
from ._model import Base, dense, trained, uneven
from ._table import Experiment, Row, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UPDATES = ("dense", "low rank")


class Similarity(Experiment):
    """Cosines of base and tuned directions: an intruder shifts the diagonal by one place."""

    name: ClassVar[str] = "similarity"
    keys: ClassVar = {
        "update": "dense or low rank, of equal norm",
        "base_index": "rank i of a base direction, 0 the leading one",
        "tuned_index": "rank j of a tuned direction",
    }
    measured: ClassVar = {"cosine": "|⟨u_i, û_j⟩|"}
    quick: ClassVar = {"size": 60, "signals": 4, "tracked": 8}

    size: int = Field(300, ge=20, le=2000, description="Side of the square matrix.")
    rank: int = Field(2, ge=1, description="Rank of the low-rank update.")
    norm: float = Field(8.0, gt=0, le=1e6, description="‖ΔW‖_F/θ_c of either update.")
    signals: int = Field(14, ge=1, description="Signals of the base.")
    strongest: float = Field(10.0, ge=2, le=1e6, description="Strongest signal; the weakest is 2.")
    tracked: int = Field(20, ge=2, le=40, description="Leading directions that are compared.")
    repeats: int = Field(1, ge=1, le=100_000, description="How often everything is drawn.")

    def trial(self, generator: torch.Generator) -> Iterator[Row]:
        """See :meth:`Experiment.trial`."""
        shape = (self.size, self.size)
        base = Base.of(trained(shape, self.signals, self.strongest, generator))
        B, A = uneven(shape, self.rank, self.norm, generator)
        changes = dense(shape, self.norm, generator), B @ A
        for update, change in zip(UPDATES, changes, strict=True):
            tuned = base.judge(base.matrix + change, self.tracked)
            cosines = (base.U[:, : self.tracked].mT @ tuned.u).abs().tolist()
            for i, row in enumerate(cosines):
                for j, cosine in enumerate(row):
                    yield {"update": update, "base_index": i, "tuned_index": j, "cosine": cosine}

    def paint(self, table: Table) -> Figure:
        """See :meth:`Experiment.paint`."""
        note = (
            f"{self.size}×{self.size}, {self.signals} signals, "
            rf"$\|\Delta W\|_F = {self.norm:g}\,\theta_c$, low rank: {self.rank}"
        )
        figure, axes = _draw.panels(1, 2, note=note, size=(3.6, 3.2))
        image = None
        for panel, update in zip(axes, UPDATES, strict=True):
            cosines = table.where(update=update).numbers("cosine")
            square = cosines.reshape(self.tracked, self.tracked)
            image = panel.imshow(square, cmap="cividis", vmin=0, vmax=1, origin="upper")
            _draw.integers(panel)
            _draw.labels(panel, r"tuned direction $j$", r"base direction $i$", update)
        if image is not None:
            label = r"$|\langle u_i, û_j\rangle|$"
            figure.colorbar(image, ax=axes, label=label, shrink=0.9)
        return figure
