"""Updates held below the threshold of their own layer, where no generic spike makes an outlier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bulkedge._fields import NOT_NEGATIVE, check_values

from ._clip_spikes import strongest
from ._layers import Adapted, require_same_layers
from ._matrix import DORA, IN_FULL, SEVERAL
from ._saved import BY_NAME, entries
from ._thresholds import Line, Thresholds, known_thresholds
from .holder import LEVEL, ThresholdHolder


class SpikeClip(ThresholdHolder):
    """Clip the spikes of every update after each step: ``γ_j(s·B·A) ← min(γ_j, level·θ_c)``.

    θ_c is the strength beyond which a generic spike makes an outlier of W0, from the fitted bulk of
    that layer.  Below it a generic update makes no new leading singular vector.  A trained update
    is not generic, and may mix with vectors of the base: audit the result.

    Cost: the Gram matrices of the factors, O((m + n) r²), and one batched r×r decomposition for all
    layers.  Factors are changed only where a spike exceeds its limit, and measured again once they
    are rounded to their dtype: no spike of the stored factors exceeds its limit.

    A layer is found by its name at each step, so that its parameters may be moved, converted,
    replaced or spread over processes (FSDP2) meanwhile.  A frozen factor stays as it is, and the
    other factor takes the whole change.

    If several adapters are active, their sum is held.  The limit of a DoRA is one of its whole
    update ``W − W0``, its magnitudes included: the spikes of ``s·B·A`` are clipped, and if the
    update is still too strong, it is moved towards zero as a whole.  So is that of a weight that is
    trained in full, whose singular values are lowered one by one.  Either takes some products with
    the base.

    :class:`bulkedge.Clip` does the same to a finished fine-tune.

    Args:
        model: A model wrapped by PEFT, on the device where it trains; or adapted matrices.
        level: Where to hold the spikes, in units of their threshold.
        of: Which threshold: ``"edge"`` is θ_c; ``"leading"`` is θ_k, beyond which a generic spike
            is one of the ten leading directions.
        thresholds: Thresholds by name, or a file that ``bulkedge budget`` has written, for layers
            whose threshold is known already.
        adapter: Which adapter; the active one if None.
        include: Patterns of module names.
        exclude: Patterns of the names of those that are left out.
        full: Whether weights that are trained in full are held, too, for which a copy of each base
            is kept; if None, they are in a model without adapters.
        base: The weights before training by name, if the model has been trained already.

    Attributes:
        thresholds: The threshold of each layer that is held, by name.
        strongest: The strongest spike of each layer over it, before the last step clipped it.
        clipped: How many layers the last step changed.

    Raises:
        InputError: If ``level`` is not positive, or no base has a threshold; later, if a layer is
            gone or another one, its adapter is merged or not the active one, or its numbers are not
            finite.

    References:
        Benaych-Georges and Nadakuditi, arXiv:1103.2221: the threshold.

    Example:
        >>> import torch
        >>> from bulkedge.tune import AdaptedMatrix
        >>> generator = torch.Generator().manual_seed(0)
        >>> W0, B, A = (torch.randn(*s, generator=generator) for s in [(50, 40), (50, 2), (2, 40)])
        >>> clip = SpikeClip([AdaptedMatrix("layer", W0, A, B)], level=0.5)
        >>> clip.step()
        1
        >>> round(float(torch.linalg.svdvals(B @ A)[0]) / clip.thresholds["layer"], 3)
        0.5
    """

    takes = (SEVERAL, DORA, IN_FULL)

    def __init__(
        self,
        model: Adapted,
        *,
        level: float = LEVEL,
        of: Line = "edge",
        thresholds: Thresholds | None = None,
        adapter: str | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        full: bool | None = None,
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(
            model,
            level=level,
            of=of,
            thresholds=thresholds,
            adapter=adapter,
            include=include,
            exclude=exclude,
            full=full,
            base=base,
        )
        self.strongest: dict[str, float] = {}
        self.clipped = 0

    def step(self) -> int:
        """Clip all updates now.

        Returns:
            How many layers were changed.
        """
        before, changed = self.clip()
        for matrix, first in zip(self.matrices, strongest(before), strict=True):
            self.strongest[matrix.name] = first / self.thresholds[matrix.name]
        self.clipped = len(changed)
        return self.clipped

    def state_dict(self) -> dict[str, Any]:
        """The thresholds, and what the last step found, as JSON."""
        return {"thresholds": dict(self.thresholds), "strongest": dict(self.strongest)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, with its thresholds.

        Raises:
            InputError: If it is the state of other layers, or not what :meth:`state_dict` returns;
                then nothing is changed.
        """
        saved = entries(type(self).__name__, state, thresholds=BY_NAME, strongest=BY_NAME)
        thresholds = known_thresholds(saved["thresholds"])
        names = [matrix.name for matrix in self.matrices]
        require_same_layers(names, thresholds)
        require_same_layers(names, [*names, *saved["strongest"]])  # there may be no step yet
        found = {name: (x, NOT_NEGATIVE) for name, x in saved["strongest"].items()}
        check_values("the state of SpikeClip", **found)
        self.thresholds = thresholds
        self.strongest = {name: float(x) for name, x in saved["strongest"].items()}
