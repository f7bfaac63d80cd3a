"""Make an update weaker as a whole: ``W0 + s ΔW``, one factor s for each layer.

The cheapest remedy.  In a PEFT adapter it is a change of α, and of nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bulkedge._errors import InputError
from bulkedge._fields import POSITIVE, check_fields, number, one_of, optional
from bulkedge.update import BaseSpectrum, budget

PART = number("between 0, excluded, and 1", lambda x: 0 < x <= 1)
BELOW = 1e-6
"""By what part a spike stays below its limit, so that the rounding of α does not lead beyond."""


@dataclass(frozen=True)
class Rescale:
    """Scale the update of each layer: ``W0 + s ΔW``.

    With ``level`` s is the largest factor, 1 at most, that keeps the strongest spike below the
    limit, ``s ‖ΔW‖₂ ≤ level · θ``; with ``uniform`` it is that number for every layer.  In a full
    fine-tune with a shorter side above 768, a bound stands for ``‖ΔW‖₂``: then s may be a part of
    0.01 smaller.  Matrices are scaled; biases and norms stay as they are, except for the bias of
    factors (``lora_bias`` of PEFT), which has their α: it is scaled with them, and the record says
    so.

    Attributes:
        level: In units of ``of``.
        of: ``"leading"``: θ_k, at which an outlier enters the k leading directions; ``"edge"``:
            θ_c, at which it appears.
        uniform: One factor for all layers.

    Raises:
        InputError: Unless exactly one of ``level`` and ``uniform`` is given, and in its range; or
            ``of`` is given with ``uniform``.

    References:
        Xie, arXiv:2607.23711, for ``level`` at the edge.

    Example:
        >>> Rescale(uniform=0.7).uniform, Rescale(level=0.5).of
        (0.7, 'leading')
    """

    level: float | None = None
    of: Literal["leading", "edge"] = "leading"
    uniform: float | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            level=optional(POSITIVE),
            of=one_of("leading", "edge"),
            uniform=optional(PART),
        )
        if self.uniform is not None and self.of != "leading":
            raise InputError("expected no of= with uniform, which uses no limit; give level")
        if (self.level is None) == (self.uniform is None):
            raise InputError(
                f"expected a level or one factor for all of Rescale, got level {self.level} and "
                f"uniform {self.uniform}; give one of them, such as level 0.9 or uniform 0.7"
            )

    def factor(self, spike: float, spectrum: BaseSpectrum | None, top_k: int = 10) -> float:
        """S of one layer.

        Args:
            spike: ``‖ΔW‖₂``.
            spectrum: Of the base; not needed for ``uniform``.
            top_k: How many leading directions count.

        Returns:
            A factor in (0, 1].

        Raises:
            InputError: If the base has no limit: no bulk, or one whose edge is hard.

        Example:
            >>> import torch
            >>> base = BaseSpectrum.of(torch.eye(40) + torch.randn(40, 40))
            >>> threshold = base.fit.threshold
            >>> round(Rescale(level=1, of="edge").factor(2 * threshold, base), 3)
            0.5
        """
        if self.uniform is not None:
            return self.uniform
        limit = 0.0
        if spectrum is not None and self.level is not None:
            found = budget(spectrum, 1, top_k=top_k)
            limit = self.level * (
                found.top_k_threshold if self.of == "leading" else found.threshold
            )
        if not limit > 0:
            raise InputError("the base has no bulk with an edge: no limit; use uniform instead")
        return 1.0 if spike <= limit else (1 - BELOW) * limit / spike
