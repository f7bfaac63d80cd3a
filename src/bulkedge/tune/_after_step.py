"""Actions after each step of an optimiser, and which optimisers they suit."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bulkedge._errors import InputError

from ._held import Held
from ._matrix import is_distributed, looked_up_once

SHOWN = 5
"""How many names an error message lists."""


class _Hook:
    """What torch calls after each step of an optimiser.

    Args:
        optimizer: The optimiser of torch.
        matrices: What the action changes.
        action: What is done.
    """

    def __init__(
        self, optimizer: Any, matrices: Sequence[Held], action: Callable[[], object]
    ) -> None:
        self.optimizer, self.matrices, self.action = optimizer, matrices, action

    def __call__(self, *_: object) -> None:
        with looked_up_once(self.matrices):
            # parameters may have been replaced since the last step
            require_trained(self.optimizer, self.matrices)
            self.action()


def after_step(
    optimizer: Any, matrices: Sequence[Held], action: Callable[[], object]
) -> RemovableHandle:
    """Register an action to be run after each step of an optimiser.

    Args:
        optimizer: One of torch, or what Accelerate or Lightning wraps around one.
        matrices: What the action changes: the optimiser must train it, at every step; a frozen one
            needs no optimiser.
        action: What is done.

    Returns:
        A handle: ``handle.remove()`` ends it.

    Raises:
        InputError: If it is not an optimiser of torch, trains something else or not all of the
            matrices, saves other weights than those that it leaves after a step, or runs this
            action after its steps already.
    """
    inner = unwrapped(optimizer)
    hooks = getattr(inner, "_optimizer_step_post_hooks", None)
    if hooks is None:
        raise InputError(
            f"expected an optimiser of torch, got {type(optimizer).__name__}; call step() after "
            "each of its steps"
        )
    require_trained(inner, matrices)
    if any(isinstance(hook, _Hook) and hook.action == action for hook in hooks.values()):
        owner = type(getattr(action, "__self__", action)).__name__
        raise InputError(
            f"expected an optimiser to which this {owner} is not attached yet, got one to which it "
            "is; call remove() on the handle of the first attach() before the second"
        )
    return inner.register_step_post_hook(_Hook(inner, matrices, action))


def unwrapped(optimizer: Any) -> Any:
    """The optimiser of torch inside what other libraries wrap around it."""
    while hasattr(getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = optimizer.optimizer
    return optimizer


def require_trained(optimizer: Any, matrices: Sequence[Held]) -> None:
    """InputError unless an optimiser trains what is trained of the matrices, as it is saved."""
    inner = unwrapped(optimizer)
    if all(callable(getattr(inner, mode, None)) for mode in ("train", "eval")):
        raise InputError(
            "expected an optimiser that leaves the weights that are saved, got "
            f"{type(inner).__name__}: it saves an average of them (schedule-free), which would not "
            "be held; use another optimiser, or hold_update for weights that are trained in full"
        )
    parameters = _Parameters(x for group in inner.param_groups for x in group["params"])
    others = [matrix for matrix in matrices if not parameters.train(matrix)]
    if matrices and len(others) == len(matrices):
        raise _not_trained(f"an optimiser of what is held, got {type(inner).__name__}", matrices)
    if by_another := [x.name for x in others if _is_trained(x)]:
        more = f" and {len(by_another) - SHOWN} more" if len(by_another) > SHOWN else ""
        raise InputError(
            f"expected one optimiser of all that is held, got {type(inner).__name__}, which does "
            f"not train {', '.join(by_another[:SHOWN])}{more}: those would not be held after the "
            "steps of another one; build a holder for each optimiser with include=, or call step() "
            "after the last of them"
        )


def require_in_model(model: torch.nn.Module, matrices: Sequence[Held]) -> None:
    """InputError unless a model has some of the matrices."""
    parameters = _Parameters(model.parameters())
    if matrices and not any(map(parameters.train, matrices)):
        raise _not_trained(
            f"a penalty of the model that is trained, a {type(model).__name__}", matrices
        )


def _not_trained(expected: str, matrices: Sequence[Held]) -> InputError:
    """The error for a model that was copied or changed after a holder was built on it."""
    return InputError(
        f"expected {expected}, which has no trained factor of the {len(matrices)} matrices, "
        f"{matrices[0].name} among them: the model was copied, or its parameters replaced; give "
        "this the model that is trained, and make the optimiser after the change"
    )


class _Parameters:
    """Parameters by where they are stored, so that views of them are found: experts, heads.

    Args:
        parameters: Those of an optimiser or a model.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._own = {id(x): x for x in parameters}

    @functools.cached_property
    def _spans(self) -> dict[object, list[range]]:
        """Where they are stored; those over processes are not there: an address says nothing."""
        found: dict[object, list[range]] = defaultdict(list)
        for x in self._own.values():
            if not is_distributed(x) and not x.is_meta:
                first = x.storage_offset()
                found[_storage(x)].append(range(first, first + x.numel()))
        return found

    def train(self, matrix: Held) -> bool:
        """Whether a trained factor of a matrix is one of them, or a view of one."""
        if any(x.requires_grad and id(x) in self._own for side in matrix.leaves for x in side):
            return True
        matrix.prepare_factors()
        matrix.in_memory()
        sides = zip(matrix.leaves, matrix.trained, strict=True)
        return any(trained and self._hold(x) for side, trained in sides for x in side)

    def _hold(self, x: Tensor) -> bool:
        if id(x) in self._own:
            return True
        return not is_distributed(x) and any(
            x.storage_offset() in span for span in self._spans.get(_storage(x), ())
        )


def _is_trained(matrix: Held) -> bool:
    """Whether any of its parameters requires a gradient."""
    return any(x.requires_grad for side in matrix.leaves for x in side)


def _storage(x: Tensor) -> object:
    """A key that is equal for two tensors of one storage."""
    return x.device, x.untyped_storage().data_ptr()
