"""Give back what a fine-tune forgot: the update that keeps the task's outputs and the base's.

With the second moments of a layer's inputs on text of the kind to be kept, ``C_b``, and on the
task's, ``C_t``, each scaled to mean diagonal 1,

    min over D'  ‖(D' − ΔW) C_t^½‖² + λ ‖D' C_b^½‖²    ⇒    D' = ΔW T,   T = C_t (C_t + λ C_b)⁻¹.

T acts on the input side, so an update ``s·B·A`` becomes ``s·B·(A T)``: the rank stays, B stays.
The moments are regression means between base and fine-tune (RegMean, Jin et al., arXiv:2212.09849),
kept as an update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bulkedge._errors import InputError
from bulkedge._fields import NOT_NEGATIVE, check_fields
from bulkedge.moments import Moments, Sketch, to_dense

RIDGE = 1e-3
"""Part of the mean diagonal that is added to both moments, for directions that no text has used."""


@dataclass(frozen=True)
class Protect:
    """Move an update away from the inputs that the base is used on.

    Attributes:
        moments: Of the base's inputs, on text of the kind to be kept.
        task_moments: Of the fine-tune's inputs on text of its task.  Without, every direction of
            the input counts alike for the task, which costs much of it.
        strength: λ: what a unit of drift on the base's inputs costs, against a unit on the task's.

    Raises:
        InputError: If the strength is negative or not finite.

    References:
        Jin et al., arXiv:2212.09849.
    """

    moments: Moments
    task_moments: Moments | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, strength=NOT_NEGATIVE)

    def factor(self, A: Tensor, name: str, task_name: str | None = None) -> Tensor:
        """``A T`` for a layer.

        Args:
            A: Shape ``(r, n)``: the factor of an update on the input side, or all of the update.
            name: The layer in the moments of the base.
            task_name: In those of the task, if it has another name there.

        Returns:
            Shape ``(r, n)``, float64.

        Raises:
            InputError: If the moments do not know the layer, or are of another shape.
        """
        base = _moment(self.moments, name, A.shape[1])
        task = None
        if self.task_moments is not None:
            task = _moment(self.task_moments, task_name or name, A.shape[1])
        return protected(A, base, task, self.strength)


def protected(A: Tensor, base: Tensor, task: Tensor | None, strength: float) -> Tensor:
    """``A T`` with ``T = C_t (C_t + λ C_b)⁻¹``.

    Cost: one Cholesky factorisation in float64, n³/3; of an embedding nothing.

    Args:
        A: Shape ``(r, n)``.
        base: ``C_b``, shape ``(n, n)``, or ``(n,)`` if it is diagonal.
        task: ``C_t``, likewise; the identity if None.
        strength: λ ≥ 0.

    Returns:
        Shape ``(r, n)``, float64; A itself for λ = 0.

    Raises:
        InputError: If a moment is zero.

    Example:
        >>> A, C = torch.eye(2), torch.diag(torch.tensor([2.0, 0.0]))
        >>> protected(A, C, None, 1.0).diagonal().round(decimals=2).tolist()
        [0.33, 1.0]
    """
    A = A.double()
    if strength == 0:
        return A
    base = _scaled(base)
    task = torch.ones_like(base if base.ndim == 1 else base.diagonal()) if task is None else task
    task = _scaled(task)
    if base.ndim == 1:
        return A * (task / (task + strength * base))
    task = torch.diag(task) if task.ndim == 1 else task
    factor, failed = torch.linalg.cholesky_ex(task + strength * base)
    if int(failed):
        raise InputError(
            "expected moments that are positive, got one that is not; measure it again"
        )
    return torch.cholesky_solve(task @ A.mT, factor).mT


def drift(update: Tensor, W0: Tensor, moment: Tensor) -> float:
    """``tr(ΔW C ΔWᵀ) / tr(W0 C W0ᵀ)``: what part of a layer's output an update changes.

    Args:
        update: ΔW, shape ``(m, n)``.
        W0: The base.
        moment: Second moment of its inputs.

    Returns:
        The ratio of mean squares.

    Example:
        >>> drift(torch.eye(2), 2 * torch.eye(2), torch.eye(2))
        0.25
    """
    C = moment.double()
    moved, there = (float((W.double() * _times(W.double(), C)).sum()) for W in (update, W0))
    return moved / there if there else float("inf") if moved else 0.0


def _times(W: Tensor, moment: Tensor) -> Tensor:
    return W * moment if moment.ndim == 1 else W @ moment


def _moment(moments: Moments, name: str, width: int) -> Tensor:
    """The moment of a layer, checked."""
    found = moments[name].moment
    if isinstance(found, Sketch):
        found = to_dense(found)
    if len(found) != width:
        raise InputError(
            f"{name}: expected moments of {width} inputs, got {len(found)}; they are of another "
            "model"
        )
    return found


def _scaled(moment: Tensor) -> Tensor:
    """A moment with mean diagonal 1 and a ridge on it, in float64."""
    moment = moment.double()
    diagonal = moment if moment.ndim == 1 else moment.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:
        raise InputError("expected inputs that are not all zero, got a moment of zero")
    moment = moment / mean
    if moment.ndim == 1:
        return moment + RIDGE
    return moment + RIDGE * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
