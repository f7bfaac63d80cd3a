"""A bound on the spectral norm of a layer's weight, as a parametrization."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bulkedge._errors import InputError
from bulkedge._linmap import Dense, LinearMap, frobenius
from bulkedge.triplet.solver._start import generic

from ._track import as_matrix, fresh_start, track, working
from .certificate import Certificate, Rigorous
from .convolution import Convolution
from .norm import cap_factor, require_bound

Module = TypeVar("Module", bound=nn.Module)


def spectral_cap(
    module: Module,
    name: str = "weight",
    n_power_iterations: int | None = None,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    bound: float = 1.0,
    shrink_only: bool = True,
    rtol: float = 1e-3,
    input_size: int | tuple[int, ...] | None = None,
    certified: bool | Certificate = False,
) -> Module:
    """Cap the spectral norm of a weight: ``W ↦ min(1, bound/‖W‖₂) · W``.

    This replaces ``torch.nn.utils.parametrizations.spectral_norm``, with the same leading
    arguments, and differs from it in four ways.  **Weights inside the ball are left alone**, unless
    ``shrink_only=False`` scales them up to the bound, as torch does.  σ is computed to a tolerance,
    not by a fixed number of power iterations, also at the first forward pass and in evaluation.
    Evaluation writes to no buffer.  The gradient is right to second order.  Checkpoints of torch's
    parametrization load.

    The solve starts from the vectors of the previous step, and one more vector searches for a new
    leading direction: ten thin passes over the weight and one to scale it.  The bound holds up to
    ``rtol`` and to rounding in the dtype of the weight, unless a new direction has just overtaken
    all known ones and was missed; with ``certified`` it holds without these exceptions.

    Inside ``torch.nn.utils.parametrize.cached()`` the solve is done once a forward pass, however
    often the weight is read.  Evaluation solves, too; for a trained layer
    ``torch.nn.utils.parametrize.remove_parametrizations(module, name)`` ends that and keeps the
    capped weight.

    On the meta device nothing is solved; after ``to_empty`` and new weights the layer is capped
    like any other.

    Args:
        module: The module, changed in place.
        name: Its parameter.
        n_power_iterations: None solves until the residual is below ``rtol``; a number stops after
            as many steps at most, whatever the residual, as torch does.
        eps: A smaller norm is replaced by it.
        dim: The dimension of the outputs: None is 0, or 1 for transposed convolutions; the rest is
            flattened.
        bound: The largest norm allowed.
        shrink_only: Leave a weight inside the ball alone.
        rtol: The residual of the leading triplet, relative to σ₁.  The relative error of the norm
            is smaller by a factor of about residual/gap, which docs/benchmarks.md measures.
        input_size: For a convolution: the spatial size of its input, and the norm is that of the
            operator on inputs of that size (padding by zeros; not for transposed convolutions).
            None takes the norm of the reshaped kernel, as torch does, which may be smaller or
            larger than that of the operator.
        certified: True divides by a proved upper bound (:class:`Rigorous`), so that the norm in
            exact arithmetic is at most ``bound``; another certificate may be given.  This costs a
            factorisation each forward pass: use it for evaluation, or for small layers.

    Returns:
        The module.

    Raises:
        InputError: If the parameter, the bound or ``dim`` does not fit.

    Example:
        >>> layer = spectral_cap(nn.Linear(20, 30), bound=0.5)
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) <= 0.5001)
        True
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise InputError(
            f"expected a parameter {name!r} of at least two dimensions in "
            f"{type(module).__name__}, got {'none' if weight is None else tuple(weight.shape)}"
        )
    if dim is None:
        transposed = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
        dim = 1 if isinstance(module, transposed) else 0
    cap = SpectralCap(
        weight.detach(),
        bound,
        n_power_iterations=n_power_iterations,
        eps=eps,
        dim=dim,
        shrink_only=shrink_only,
        rtol=rtol,
        operator=None if input_size is None else Convolution.of(module, input_size),
        certified=Rigorous() if certified is True else certified or None,
    )
    parametrize.register_parametrization(module, name, cap)
    return module


class SpectralCap(nn.Module):
    """The parametrization behind :func:`spectral_cap`."""

    start: Tensor

    def __init__(
        self,
        weight: Tensor,
        bound: float,
        *,
        n_power_iterations: int | None,
        eps: float,
        dim: int,
        shrink_only: bool,
        rtol: float,
        operator: LinearMap | None,
        certified: Certificate | None,
    ) -> None:
        super().__init__()
        require_bound(bound)
        if not -weight.ndim <= dim < weight.ndim:
            raise InputError(f"expected a dim of a {weight.ndim}-dimensional weight, got {dim}")
        if n_power_iterations is not None and n_power_iterations < 1:
            raise InputError(f"expected n_power_iterations ≥ 1 or None, got {n_power_iterations}")
        if certified is not None and not hasattr(certified, "bound"):
            raise InputError(f"expected certified to be True or a certificate, got {certified!r}")
        self.bound, self.eps, self.dim = bound, eps, dim
        self.max_steps, self.rtol = n_power_iterations, rtol
        self.shrink_only, self.certified = shrink_only, certified
        self.operator = operator  # its shape and strides are used; its kernel is replaced
        self.register_buffer("start", fresh_start(self._map(weight)))

    def forward(self, weight: Tensor) -> Tensor:
        """The capped weight."""
        if weight.is_meta:  # a weight without values has no norm
            return weight.clone()
        A = self._map(weight)
        result, start = track(A, self.start.to(A.dtype), rtol=self.rtol, max_steps=self.max_steps)
        # torch.func forbids changes of buffers: the next step starts from an older guess
        if self.training and not torch._C._are_functorch_transforms_active():
            with torch.no_grad():
                self.start.copy_(start)
        norm = result.sigma[0].clamp_min(self.eps)
        if self.certified is not None:
            upper = self.certified.bound(A, result.v.detach()).upper
            norm = norm * ((upper + _rounding(weight, upper)) / float(norm.detach()))
        factor = cap_factor(norm, self.bound) if self.shrink_only else self.bound / norm
        # a weight in half precision is rounded once, after the product
        return (weight.to(factor.dtype) * factor).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The identity: an assigned weight is stored as it is, and capped when it is read."""
        if hasattr(self, "start"):
            self.start.copy_(fresh_start(self._map(weight.detach())))
        return weight

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Load checkpoints of torch's parametrization, too, without the vectors that they hold."""
        if f"{prefix}_u" in state_dict:
            for name in ("_u", "_v"):
                state_dict.pop(f"{prefix}{name}")
            state_dict[f"{prefix}start"] = generic(*self.start.shape, like=self.start)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _map(self, weight: Tensor) -> LinearMap:
        """The linear map whose norm is bounded, in float32 or float64."""
        if self.operator is not None:
            return self.operator.with_tensors(working(weight))
        return Dense(as_matrix(weight, self.dim))

    def extra_repr(self) -> str:
        """For printing a module."""
        parts = [f"bound={self.bound}", f"rtol={self.rtol}"]
        parts += [] if self.shrink_only else ["shrink_only=False"]
        parts += [f"operator={self.operator.shape}"] if self.operator else []
        parts += [repr(self.certified)] if self.certified else []
        return ", ".join(parts)


def _rounding(weight: Tensor, upper: float) -> float:
    """A bound on what rounding adds to the norm of a scaled weight.

    Each entry of the result is rounded once in the dtype of the weight, which changes the norm by
    at most ``½ eps ‖W‖_F``.  The factor is rounded four times in float32 or float64, which adds
    ``2 eps``.

    Returns:
        The bound for the weight before it is scaled, an absolute amount.
    """
    working = torch.promote_types(weight.dtype, torch.float32)
    rounding = torch.finfo(weight.dtype).eps + torch.finfo(working).eps
    entries = 0.51 * rounding * frobenius(weight.detach())
    return entries + 3 * torch.finfo(working).eps * upper
