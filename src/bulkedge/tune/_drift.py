"""The drift of a layer: how far its outputs on known texts are from those of the base.

    drift = tr(ΔW C ΔWᵀ) / tr(W0 C W0ᵀ) = E‖ΔW x‖² / E‖W0 x‖²

with ``C = E[x xᵀ]`` the second moment of the layer's inputs in the base.  Of ``ΔW = s·B·A`` it is
``s² tr(BᵀB · A C Aᵀ)`` over the same: one product of the r×n factor A with C.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bulkedge._errors import InputError, count
from bulkedge._precision import exact, full_precision
from bulkedge.checkpoint.names import infer_rule
from bulkedge.moments import Layer, Moment, Moments, Sketch, alike, sample, width
from bulkedge.moments._watched import plain_name

from ._core_svd import column_grams, inner_products
from ._full import FullMatrix
from ._matrix import DORA, AdaptedMatrix, is_distributed, looked_up_once

BLOCK = 256
"""The width of the blocks of a moment of which one triangle is read."""
SMALLEST = 1e-30
"""A drift below this may be that of squares that are too small for single precision."""
REMEDY = "collect moments of the base that is trained with `bulkedge moments`, or with Moments"
"""What to do where moments do not fit a model."""


class Shared:
    """A moment in the dtype and on the device of those that use it; layers share it.

    Args:
        moment: C, as it was measured.

    Attributes:
        trace: ``tr C``.
    """

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self.trace = _trace(moment)

    def times(self, A: Tensor) -> Tensor:
        """``A C`` in the dtype of A, shape ``(r, n)``; a sketch takes two thin products."""
        now = self._moment = _placed(self._moment, A)
        if isinstance(now, Sketch):
            return (A @ now.vectors * now.values) @ now.vectors.mT + A * now.rest
        return A * now if now.ndim == 1 else A @ now

    def half_times(self, A: Tensor) -> Tensor:
        """``A L`` with ``L + Lᵀ = C``: of a large moment half of the numbers are read."""
        now = self._moment = _placed(self._moment, A)
        n = A.shape[1]
        if isinstance(now, Sketch) or now.ndim == 1 or n < 2 * BLOCK:
            return self.times(A) / 2
        found = torch.empty_like(A)
        for first in range(0, n, BLOCK):
            last = min(first + BLOCK, n)
            found[:, first:last] = A[:, first:last] @ now[first:last, first:last] / 2
            found[:, first:last] += A[:, last:] @ now[last:, first:last]
        return found


@dataclass(frozen=True)
class Grams:
    """What the drift of an update of low rank is, in r×r matrices, float64.

    Attributes:
        of_B: ``BᵀB``.
        of_A: ``A C Aᵀ``.
    """

    of_B: Tensor
    of_A: Tensor


@dataclass(frozen=True)
class LayerDrift:
    """What the drift of a matrix is computed from.

    Attributes:
        matrix: The matrix.
        moment: C of its inputs.
        output: ``tr(W0 C W0ᵀ)``.
    """

    matrix: AdaptedMatrix | FullMatrix
    moment: Shared
    output: float

    @property
    def factor(self) -> float:
        """What ``tr(BᵀB · A C Aᵀ)`` is multiplied with: s² over the output."""
        return self.matrix.scale**2 / self.output  # pyright: ignore[reportAttributeAccessIssue]

    def value(self) -> Tensor:
        """The present drift, a scalar that is differentiable in the trained weights.

        Cost: one product of A with C, forward and backward together, and O((m + n) r²).

        Returns:
            A scalar.
        """
        matrix = self.matrix
        if isinstance(matrix, FullMatrix):
            update = matrix.difference()
            return _FullDrift.apply(update, self.moment, self.output)  # pyright: ignore
        matrix.prepare_factors()
        update = matrix.update_map()
        return _LowRankDrift.apply(update.B, update.A, self.moment, self.factor)  # pyright: ignore


def layer_drifts(matrices: Sequence[Any], moments: Moments) -> list[LayerDrift]:
    """The moments of each matrix, found by name.

    Args:
        matrices: Adapted or full matrices.
        moments: Of the base; its layers may have a prefix more or less than the model's.

    Returns:
        One entry per matrix, in the same order.

    Raises:
        InputError: If a matrix is of another kind, a LoRA layer has a bias that is trained, a layer
            was not measured, or the moments are of another model.
    """
    if not isinstance(moments, Moments):
        raise InputError(f"expected moments to be Moments, got {moments!r:.60}; {REMEDY}")
    for matrix in matrices:
        if not isinstance(matrix, (AdaptedMatrix, FullMatrix)):
            raise InputError(
                f"{matrix.name}: expected an AdaptedMatrix or a FullMatrix, whose drift is known, "
                f"got {type(matrix).__name__}; leave out moments="
            )
        if matrix.form == DORA:
            raise InputError(
                f"{matrix.name}: expected W0 + s·B·A, whose drift is known, got DoRA, whose rows "
                "are scaled as well; leave it out with exclude=, hold it with SpikeClip, or train "
                "it with use_dora=False"
            )
        if isinstance(matrix, AdaptedMatrix) and (bias := matrix.bias_beside):
            raise InputError(
                f"{matrix.name}: expected an update of the weight alone, whose drift is known, got "
                f"{bias}, which moves the outputs besides; train without it, or leave the layer "
                "out with exclude="
            )
    _warn_of_biases(matrices)
    known = _by_weight(moments, {_weight_name(x.name): x.shape for x in matrices})
    shared: dict[int, Shared] = {}
    found = []
    for matrix in matrices:
        layer = _checked(matrix, known.get(_weight_name(matrix.name)))
        moment = shared.setdefault(id(layer.moment), Shared(layer.moment))
        found.append(LayerDrift(matrix, moment, layer.output))
    return found


def values(layers: Sequence[LayerDrift]) -> list[Tensor]:
    """The present drift of each layer, in full precision even under autocast.

    Args:
        layers: The layers.

    Returns:
        Scalars that are differentiable in the trained weights, in the same order.
    """
    with precise(layers):
        return [layer.value() for layer in layers]


@contextmanager
def precise(layers: Sequence[LayerDrift]) -> Iterator[None]:
    """Products in full precision on all devices on which these layers lie."""
    with ExitStack() as stack:
        for kind in {_device(layer.matrix).type for layer in layers}:
            stack.enter_context(full_precision(kind))
        yield


def measure(layers: Sequence[LayerDrift]) -> list[float]:
    """The present drift of each layer; devices are waited for once.

    Args:
        layers: The layers.

    Returns:
        Drifts, in the same order.

    Raises:
        InputError: If one is not finite.
    """
    return [drift for drift, _ in measure_grams(layers)]


def measure_grams(layers: Sequence[LayerDrift]) -> list[tuple[float, Grams | None]]:
    """The present drift of each layer, and what it is made of.

    Args:
        layers: The layers.

    Returns:
        Drifts and Gram matrices, in the same order; none where a number was too large or too small
        for them.

    Raises:
        InputError: If a drift is not finite.
    """
    matrices = [layer.matrix for layer in layers]
    with torch.no_grad(), precise(layers), looked_up_once(matrices):
        grams = _grams_of(layers)
        own = [
            exact(layer.value()) if made is None else layer.factor * (made.of_B * made.of_A).sum()
            for layer, made in zip(layers, grams, strict=True)
        ]
        found = torch.stack([x.to(own[0].device) for x in own]).tolist() if own else []
        for i, layer in enumerate(layers):
            # of factors of very different sizes one square may be infinite, the other zero
            if not SMALLEST < found[i] < math.inf:
                found[i], grams[i] = float(layer.value()), None
    _require_finite(layers, found)
    return list(zip(found, grams, strict=True))


def _grams_of(layers: Sequence[LayerDrift]) -> list[Grams | None]:
    """The Gram matrices of the updates of low rank; None for weights that are trained in full.

    Cost: one product of half of each C with all A that it belongs to, and O((m + n) r²).

    Args:
        layers: The layers.

    Returns:
        In the same order.
    """
    found: list[Grams | None] = [None] * len(layers)
    low = [i for i, layer in enumerate(layers) if isinstance(layer.matrix, AdaptedMatrix)]
    adapted: list[Any] = [layers[i].matrix for i in low]
    factors = [matrix.factors for matrix in adapted]
    B, A = [x for x, _ in factors], [x for _, x in factors]
    AL = _half_times_moments(
        [layers[i].moment for i in low], [x.to(m.dtype) for x, m in zip(A, adapted, strict=True)]
    )
    pairs = zip(low, column_grams(B), inner_products(AL, A), strict=True)
    for i, of_B, half in pairs:
        found[i] = Grams(of_B, half + half.mT)
    return found


def _half_times_moments(moments: Sequence[Shared], A: Sequence[Tensor]) -> list[Tensor]:
    """``A L`` of each, ``L + Lᵀ = C``; a moment that layers share is read once for all of them."""
    groups: dict[object, list[int]] = defaultdict(list)
    for i, (moment, X) in enumerate(zip(moments, A, strict=True)):
        groups[id(moment), X.dtype, X.device].append(i)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        parts = [A[i] for i in members]
        product = moments[members[0]].half_times(torch.cat(parts) if len(parts) > 1 else parts[0])
        found |= zip(members, product.split([len(x) for x in parts]), strict=True)
    return [found[i] for i in range(len(A))]


def _require_finite(layers: Sequence[LayerDrift], found: Sequence[float]) -> None:
    """InputError that names the first layer whose drift is not finite."""
    for layer, drift in zip(layers, found, strict=True):
        if not math.isfinite(drift):
            what = "entries" if isinstance(layer.matrix, FullMatrix) else "factors"
            raise InputError(
                f"{layer.matrix.name}: expected finite {what}, got NaN or infinity; training has "
                "diverged: lower the learning rate, or go back to a checkpoint"
            )


class _LowRankDrift(torch.autograd.Function):
    """``c tr(BᵀB · A C Aᵀ)``; the gradients ``2c B G`` and ``2c K A C`` reuse the one product."""

    @staticmethod
    def forward(ctx: Any, B: Tensor, A: Tensor, moment: Shared, factor: float) -> Tensor:
        # of factors of very different sizes one square may be infinite, the other zero
        b, a = _power_of_two(B), _power_of_two(A)
        B, A = B / b, A / a
        AC = moment.times(A)
        K, G = B.mT @ B, AC @ A.mT
        b, a = exact(b), exact(a)
        ctx.factor = factor
        ctx.save_for_backward(B, AC, K, G, b, a)
        return (factor * (b * a) ** 2 * (exact(K) * exact(G)).sum()).to(K)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore
        B, AC, K, G, b, a = ctx.saved_tensors
        slope = 2 * ctx.factor * exact(g) * b * a
        with full_precision(g.device):
            in_B, in_A = (slope * a).to(B.dtype) * (B @ G), (slope * b).to(B.dtype) * (K @ AC)
        return in_B, in_A, None, None


class _FullDrift(torch.autograd.Function):
    """``tr(D C Dᵀ)`` over the output; its gradient reuses the product D C."""

    @staticmethod
    def forward(ctx: Any, D: Tensor, moment: Shared, output: float) -> Tensor:
        DC = moment.times(D)
        ctx.output = output
        ctx.save_for_backward(DC)
        return (DC * D).sum() / output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (DC,) = ctx.saved_tensors
        return 2 * g / ctx.output * DC, None, None


def _trace(moment: Moment) -> float:
    """``tr C``."""
    if isinstance(moment, Sketch):
        return float(moment.values.sum() + moment.rest.sum())
    return float(moment.diagonal().sum() if moment.ndim == 2 else moment.sum())


def _power_of_two(x: Tensor) -> Tensor:
    """A power of two near the largest entry, by which division rounds nothing; 1 of zeros."""
    exponent = torch.frexp(x.abs().amax()).exponent
    return torch.ldexp(torch.ones((), dtype=x.dtype, device=x.device), exponent)


def _warn_of_biases(matrices: Sequence[Any]) -> None:
    """One note on biases that are trained besides weights that are trained in full."""
    names = [matrix.name for matrix in matrices if getattr(matrix, "has_trained_bias", False)]
    if names:
        warnings.warn(
            f"{count(len(names), 'layer')} with a bias that is trained, too, such as that of "
            f"{names[0]}: what it changes is no part of the drift",
            stacklevel=4,
        )


def _device(matrix: AdaptedMatrix | FullMatrix) -> torch.device:
    own = matrix.weight if isinstance(matrix, FullMatrix) else matrix.in_memory()[0]
    return own.device


def _placed(moment: Moment, like: Tensor) -> Moment:
    """A moment in the dtype and on the device of a factor."""
    if isinstance(moment, Tensor):
        return moment.to(like)
    vectors, values, rest = (x.to(like) for x in (moment.vectors, moment.values, moment.rest))
    return Sketch(vectors, values, rest, moment.loss)


def _weight_name(name: str) -> str:
    """The name of the weight of a matrix in the model that was wrapped."""
    return f"{plain_name(name.removesuffix('.weight'))}.weight"


def _by_weight(moments: Moments, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Layer]:
    """The measured layers by the names of the model's weights."""
    layers = {f"{name}.weight": layer for name, layer in moments.layers.items()}
    rule = infer_rule(layers, shapes, lambda name, shape: width(layers[name].moment) == shape[1])
    found = {rule.find(name): layer for name, layer in layers.items()}
    return {name: layer for name, layer in found.items() if name is not None}


def _checked(matrix: AdaptedMatrix | FullMatrix, layer: Layer | None) -> Layer:
    """What was measured of a matrix; InputError if nothing was, or of another model."""
    name = matrix.name
    if layer is None:
        raise InputError(
            f"{name}: expected moments of its inputs, got none; measure this layer, too, or leave "
            "it out with exclude="
        )
    n = matrix.shape[1]
    if width(layer.moment) != n:
        raise InputError(
            f"{name}: expected moments of {n} inputs, got {width(layer.moment)}; {REMEDY}"
        )
    base = matrix.base
    # one that is spread over processes is not gathered for this
    if not is_distributed(base) and not any(
        alike(layer.sample, sample(stored)) for stored in (base, base.mT)
    ):
        raise InputError(f"{name}: expected moments of this model, got another one's; {REMEDY}")
    if not layer.output > 0:
        raise InputError(
            f"{name}: expected a base with an output on the texts of the moments, got zeros; leave "
            "it out with exclude="
        )
    return layer
