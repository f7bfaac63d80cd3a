"""A layer whose weight never exceeds a spectral norm: a parametrization."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bulkedge._errors import InputError
from bulkedge._linmap import Dense, LinearMap
from bulkedge.triplet.solver._start import generic

from ._track import as_matrix, fresh_start, sound, track, working
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

    In place of ``torch.nn.utils.parametrizations.spectral_norm``, with the same leading arguments.
    What differs: **weights inside the ball are left alone**, unless ``shrink_only=False`` scales
    them up to the bound, as torch does.  σ is solved for to a tolerance, not by a fixed number of
    power iterations, at the first forward and in evaluation too; evaluation writes to no buffer;
    the gradient is right to second order.  Checkpoints of torch's parametrization load.

    The previous step's vectors start the solve, and one more vector looks for what they cannot
    see: ten thin passes over the weight and one to scale it.  The bound holds to what ``rtol``
    leaves, to rounding in the dtype of the weight, and unless a new direction has just overtaken
    all known ones unseen; ``certified`` holds without any of these.

    Inside ``torch.nn.utils.parametrize.cached()`` it is done once a forward, however often the
    weight is read.  Evaluation solves too; to be done with it, seal a trained layer:
    ``torch.nn.utils.parametrize.remove_parametrizations(module, name)`` keeps the capped weight.

    On the meta device nothing is solved; after ``to_empty`` and new weights the layer is capped
    like any other.

    Args:
        module: The module, changed in place.
        name: Its parameter.
        n_power_iterations: None solves until the residual is below ``rtol``; a number stops after
            as many steps at most, whatever the residual, as torch does.
        eps: Norms below it are taken for it.
        dim: The dimension of the outputs: None is 0, or 1 for transposed convolutions; the rest is
            flattened.
        bound: The largest norm allowed.
        shrink_only: Leave a weight inside the ball alone.
        rtol: Residual of the leading triplet, relative to σ₁.  The norm is better than that, by
            about residual/gap: docs/benchmarks.md measures it.
        input_size: For a convolution: the spatial size of its input, and the norm is that of the
            operator on inputs of that size (padding by zeros; not for transposed ones).  None takes
            the norm of the reshaped kernel, as torch does: a different number, smaller or larger.
        certified: True divides by a proved upper bound (:class:`Rigorous`), so that the norm in
            exact arithmetic is at most ``bound``; a certificate of another kind may be given.  A
            factorisation each forward: for evaluation, or small layers.

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
    operator = None if input_size is None else Convolution.of(module, input_size)
    parametrize.register_parametrization(
        module,
        name,
        SpectralCap(
            weight.detach(),
            bound,
            n_power_iterations=n_power_iterations,
            eps=eps,
            dim=dim,
            shrink_only=shrink_only,
            rtol=rtol,
            operator=operator,
            certified=Rigorous() if certified is True else certified or None,
        ),
    )
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
        self.operator = operator  # for its shape and strides: its kernel is replaced
        self.register_buffer("start", fresh_start(self._map(weight)))

    def forward(self, weight: Tensor) -> Tensor:
        """The capped weight."""
        if weight.is_meta:  # a shape without numbers has no norm
            return weight.clone()
        A = self._map(weight)
        start = sound(self.start.to(A.dtype))
        result, start = track(A, start, rtol=self.rtol, max_steps=self.max_steps)
        # inside torch.func nothing outside may change: the next step starts from an older guess
        if self.training and not torch._C._are_functorch_transforms_active():
            with torch.no_grad():
                self.start.copy_(start)
        norm = result.sigma[0].clamp_min(self.eps)
        if self.certified is not None:
            upper = self.certified.bound(A, result.v.detach()).upper
            norm = norm * ((upper + _rounding(weight, upper)) / float(norm.detach()))
        factor = cap_factor(norm, self.bound) if self.shrink_only else self.bound / norm
        # a half-precision weight times a number is rounded once, at the end
        return (weight.to(factor.dtype) * factor).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A weight assigned is the weight kept: the cap of it is what is read."""
        if hasattr(self, "start"):
            self.start.copy_(fresh_start(self._map(weight.detach())))
        return weight

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Checkpoints of torch's own have vectors of their own, of no use here."""
        if f"{prefix}_u" in state_dict:
            for name in ("_u", "_v"):
                state_dict.pop(f"{prefix}{name}")
            state_dict[f"{prefix}start"] = generic(*self.start.shape, like=self.start)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _map(self, weight: Tensor) -> LinearMap:
        """The linear map whose norm is meant, in float32 at least."""
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
    """Bound on what rounding adds to the norm of a scaled weight, before scaling.

    Each entry of the result is rounded once in its own dtype, half a unit: in norm at most
    ``½ eps ‖W‖_F``.  The factor is rounded four times in float32 at least, ``2 eps`` together.

    Returns:
        An absolute amount, in units of the norm of W.
    """
    working = torch.promote_types(weight.dtype, torch.float32)
    frobenius = float(torch.linalg.vector_norm(weight.detach().double()))
    entries = 0.51 * (torch.finfo(weight.dtype).eps + torch.finfo(working).eps) * frobenius
    return entries + 3 * torch.finfo(working).eps * upper
