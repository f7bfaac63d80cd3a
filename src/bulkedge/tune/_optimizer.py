"""What is done after each step of an optimiser, and which optimisers that suits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bulkedge._errors import InputError

from ._matrix import AdaptedMatrix, storage_of


def after_step(
    optimizer: Any, matrices: Sequence[AdaptedMatrix], action: Callable[[], object]
) -> RemovableHandle:
    """Do something after each step of an optimiser; ``handle.remove()`` ends it.

    Args:
        optimizer: One of torch, or what Accelerate or Lightning wraps around one.
        matrices: What the action is about: the optimiser must train it, at every step.
        action: What is done.

    Returns:
        A handle.

    Raises:
        InputError: If it is no optimiser of torch, or trains something else, or saves other weights
            than those that it leaves after a step.
    """
    inner = unwrapped(optimizer)
    if not hasattr(inner, "_optimizer_step_post_hooks"):
        raise InputError(
            f"expected an optimiser of torch, got {type(optimizer).__name__}; call step() after "
            "each of its steps"
        )
    require_trained(inner, matrices)

    def hook(*_: object) -> None:
        require_trained(inner, matrices)
        action()

    return inner.register_step_post_hook(hook)


def unwrapped(optimizer: Any) -> Any:
    """The optimiser of torch inside what other libraries wrap around it."""
    while hasattr(getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = optimizer.optimizer
    return optimizer


def require_trained(optimizer: Any, matrices: Sequence[AdaptedMatrix]) -> None:
    """InputError unless an optimiser trains some of the matrices, in the weights that are saved."""
    inner = unwrapped(optimizer)
    if all(callable(getattr(inner, mode, None)) for mode in ("train", "eval")):
        raise InputError(
            "expected an optimiser that leaves the weights that are saved, got "
            f"{type(inner).__name__}: it saves an average of them (schedule-free), which would not "
            "be held; use another optimiser, or hold_update for weights that are trained in full"
        )
    groups = inner.param_groups
    if matrices and not _among((x for group in groups for x in group["params"]), matrices):
        raise _of_another(f"an optimiser of what is held, got {type(inner).__name__}", matrices)


def require_of(model: torch.nn.Module, matrices: Sequence[AdaptedMatrix]) -> None:
    """InputError unless a model has some of the matrices."""
    if matrices and not _among(model.parameters(), matrices):
        raise _of_another(
            f"a penalty of the model that is trained, a {type(model).__name__}", matrices
        )


def _of_another(expected: str, matrices: Sequence[AdaptedMatrix]) -> InputError:
    """The model was copied or changed under what watches it."""
    return InputError(
        f"expected {expected}, which has no trained factor of the {len(matrices)} matrices, "
        f"{matrices[0].name} among them: the model was copied, or its parameters replaced; give "
        "this the model that is trained, and make the optimiser after the change"
    )


def _among(parameters: Iterable[Tensor], matrices: Sequence[AdaptedMatrix]) -> bool:
    """Whether any of these is a trained factor of any matrix."""
    for matrix in matrices:
        matrix.settle()
    held = {
        storage_of(parameter)
        for matrix in matrices
        for parameter, trained in zip(matrix.in_memory(), matrix.trained, strict=True)
        if trained
    }
    return any(storage_of(x) in held for x in parameters if not x.is_meta)
