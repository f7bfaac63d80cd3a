"""Fine-tunes that keep the outputs of the base on known texts: a penalty, and a holder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import NOT_NEGATIVE, POSITIVE, check_values
from bulkedge.moments import Moments

from ._clip_spikes import changeable_factors, first_of_tied
from ._drift import Grams, LayerDrift, layer_drifts, measure, measure_grams, values
from ._layers import Adapted, AdaptedMatrix, require_same_layers
from ._matrix import looked_up_once
from ._saved import BY_NAME, entries
from ._shrink import Target, lower
from ._watched import Model, watched_matrices
from .holder import AdapterHolder
from .penalty import Schedule, Scheduled


def check_limit(owner: object, limit: float) -> None:
    """InputError unless a limit of drift is positive.

    Args:
        owner: What it is given to.
        limit: The limit.
    """
    check_values(owner, limit=(limit, POSITIVE))


class DriftPenalty(Scheduled):
    """A loss that rises with the change of the base's outputs on known texts.

        weight · Σ_layers tr(ΔW C ΔWᵀ) / tr(W0 C W0ᵀ)

    C is the second moment of a layer's inputs in the base.  Each term is ``E‖ΔW x‖²/E‖W0 x‖²``:
    0 for the base, 1 for an update as large as the base's own output.  The division makes layers
    comparable, whatever the sizes of their weights and inputs are.

    The gradient is exact: ``2c B (A C Aᵀ)`` in B and ``2c (BᵀB) A C`` in A, with
    ``c = weight s²/tr(W0 C W0ᵀ)``.

    Cost of a call with its gradient: for each layer one product of its A with C, r·n², of a
    sketch 2·r·n·rank; n² numbers for each distinct input.

    Args:
        model: A model wrapped by PEFT, on the device where it trains; or matrices, those of
            :func:`full_matrices` included, which keep a copy of their base and take m·n² a call.
        moments: Of the base, on texts whose outputs are to be kept.
        weight: The factor: a number, or a function of the number of calls so far.
        adapter: Which adapter; the active one if None.
        include: Patterns of module names.
        exclude: Patterns of the names of those that are left out.

    Attributes:
        calls: The number of calls so far.
        matrices: The matrices that are penalised.

    Raises:
        InputError: If a weight is negative, the moments are of another model or lack a layer; at a
            call, if a layer is gone or replaced, or all its weights are frozen.

    References:
        Jin et al., arXiv:2212.09849, merge weights by the same quadratic form; elastic weight
        consolidation, arXiv:1612.00796, keeps weights by another.

    Example:
        >>> from torch import nn
        >>> from bulkedge.tune import AdaptedMatrix
        >>> base = nn.Linear(3, 2, bias=False).requires_grad_(False)
        >>> with Moments(base) as moments, torch.no_grad():
        ...     _ = base(torch.eye(3))
        >>> A, B = torch.ones(1, 3), torch.ones(2, 1, requires_grad=True)
        >>> penalty = DriftPenalty([AdaptedMatrix("", base.weight, A, B)], moments, weight=0.1)
        >>> penalty().backward()
        >>> B.grad.shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        model: Model,
        moments: Moments,
        weight: Schedule = 1.0,
        *,
        adapter: str | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
    ) -> None:
        super().__init__(weight)
        self.matrices = watched_matrices(model, adapter, include, exclude)
        self._layers = layer_drifts(self.matrices, moments)

    def __call__(self) -> Tensor:
        """The present penalty times its weight: a scalar to be added to the loss."""
        weight = self.next_weight()
        for layer in self._layers:
            _require_trained(layer)
        terms = values(self._layers)
        return weight * torch.stack([term.to(terms[0]) for term in terms]).sum()

    def values(self) -> dict[str, float]:
        """The drift of every layer by name, without the weight and without a gradient."""
        names = [layer.matrix.name for layer in self._layers]
        return dict(zip(names, measure(self._layers), strict=True))


class DriftClip(AdapterHolder):
    """Hold the drift of every layer at or below a limit: its change of the base's own outputs.

        tr(ΔW C ΔWᵀ) / tr(W0 C W0ᵀ) ≤ limit

    C is the second moment of a layer's inputs in the base, on known texts; see
    :class:`DriftPenalty`.  After each step, a layer beyond its limit gets the update nearest to
    its own in the Frobenius norm among those of the same row space:

        B' = B · S (S + λ G)⁻¹,   S = A Aᵀ,  G = A C Aᵀ,   with λ so that the limit is met

    Directions that move the outputs most for their size shrink most.  Scaling ΔW as a whole would
    move the *outputs* least, and the weights more: it would give up what the update does elsewhere,
    too.  With one direction the two are the same.  Each factor takes half of the change; if one is
    frozen, the other takes all of it.  Updates that share both factors are scaled.

    Drift is measured again after the factors are rounded to their dtype: the stored ones obey.

    Cost: one product of A with C for each layer, r·n², and two more for one that exceeds its limit,
    whatever the form of C; n² numbers for each distinct input.

    Args:
        model: A model wrapped by PEFT, on the device where it trains; or adapted matrices.
        moments: Of the base, on texts whose outputs are to be kept.
        limit: The drift that no layer may exceed.
        adapter: Which adapter; the active one if None.
        include: Patterns of module names.
        exclude: Patterns of the names of those that are left out.

    Attributes:
        drift: The drift of each layer, before the last step lowered it.
        clipped: How many layers the last step changed.

    Raises:
        InputError: If the limit is not positive, or the moments are of another model or lack a
            layer; later, if a layer is gone or another one, or its numbers are not finite.

    Example:
        >>> from torch import nn
        >>> from bulkedge.tune import AdaptedMatrix
        >>> base = nn.Linear(3, 2, bias=False).requires_grad_(False)
        >>> with Moments(base) as moments, torch.no_grad():
        ...     _ = base(torch.eye(3))
        >>> A, B = torch.ones(1, 3), 10 * base.weight[:, :1]
        >>> clip = DriftClip([AdaptedMatrix("", base.weight, A, B)], moments, limit=0.01)
        >>> clip.step()
        1
        >>> round(float((B @ A).square().sum() / base.weight.square().sum()), 4)
        0.01
    """

    def __init__(
        self,
        model: Adapted,
        moments: Moments,
        limit: float,
        *,
        adapter: str | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
    ) -> None:
        check_limit(self, limit)
        super().__init__(model, adapter=adapter, include=include, exclude=exclude)
        self.limit = limit
        self.drift: dict[str, float] = {}
        self.clipped = 0
        self._layers = layer_drifts(self.matrices, moments)

    def step(self) -> int:
        """Lower the drift of all layers to the limit now.

        Returns:
            How many layers were changed.
        """
        with looked_up_once(self.matrices):
            return self._step()

    def _step(self) -> int:
        """Measure all, and lower those beyond the limit; how many there were."""
        found = measure_grams(self._layers)
        names = [matrix.name for matrix in self.matrices]
        self.drift = {name: drift for name, (drift, _) in zip(names, found, strict=True)}
        beyond = [i for i, (drift, _) in enumerate(found) if drift > self.limit]
        self.clipped = len(beyond)
        if beyond:
            self._lower(beyond, found)
        return self.clipped

    def _lower(self, beyond: Sequence[int], found: Sequence[tuple[float, Grams | None]]) -> None:
        """Lower the layers beyond the limit: those with factors of their own together."""
        with torch.no_grad():
            changeable, first = changeable_factors(self.matrices), first_of_tied(self.matrices)
            tied = [i for i in beyond if first.count(first[i]) > 1]
            alone = [i for i in beyond if i not in tied]
            own = [
                Target(self._layers[i], found[i][0], changeable[i], scale=False, grams=found[i][1])
                for i in alone
            ]
            lower(own, self.limit)
            for i in tied:
                (drift,) = measure([self._layers[i]])  # it may have been lowered with another one
                if drift > self.limit:
                    both = Target(self._layers[i], drift, changeable[i], scale=True)
                    lower([both], self.limit)

    def state_dict(self) -> dict[str, Any]:
        """The drift of each layer at the last step, as JSON."""
        return {"limit": self.limit, "drift": dict(self.drift)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the limit is the one that this was built with.

        Raises:
            InputError: If it is the state of other layers, or not what :meth:`state_dict` returns.
        """
        rules = {"limit": POSITIVE, "drift": BY_NAME}
        saved = entries(type(self).__name__, state, **rules)["drift"]
        names = [matrix.name for matrix in self.matrices]
        require_same_layers(names, saved)
        check_values("the state of DriftClip", **{x: (saved[x], NOT_NEGATIVE) for x in names})
        self.drift = {name: float(saved[name]) for name in names}


def _require_trained(layer: LayerDrift) -> None:
    """InputError if nothing of a layer is trained, so that a penalty has no effect on it."""
    matrix = layer.matrix
    if isinstance(matrix, AdaptedMatrix):
        matrix.check()
        trained = any(x.requires_grad for x in matrix.parameters)
    else:
        trained = matrix.weight.requires_grad
    if torch.is_grad_enabled() and not trained:
        raise InputError(
            f"{matrix.name}: expected weights that are trained, got frozen ones, on which a "
            "penalty has no effect; leave it out with exclude="
        )
