"""Which work a method means."""

from __future__ import annotations

from typing import TypeAlias

from bulkedge._errors import InputError
from bulkedge.comparison import Plan
from bulkedge.records import Recipe

from .method import Method
from .protect import Protect
from .protection import Protection
from .rescale import Rescale
from .rescaling import Rescaling
from .work import Corrections, Options, Work

Remedy: TypeAlias = Method | Protect | Rescale
"""What :func:`bulkedge.repair` takes."""


def work_for(plan: Plan, recipe: Recipe, method: Remedy, options: Options) -> Work:
    """What is to be done to the matrices of a plan.

    Args:
        plan: Both inputs.
        recipe: Of the audits.
        method: How.
        options: What is asked for beside the method.

    Returns:
        The work, not begun.

    Raises:
        InputError: If no work takes the method, or the options do not go with it.
    """
    if isinstance(method, Protect):
        return Protection(plan, recipe, method, options)
    if isinstance(method, Rescale):
        return Rescaling(plan, recipe, method, options)
    if isinstance(method, Method) and not isinstance(method, type):
        return Corrections(plan, recipe, method, options)
    what = f"the class {method.__name__}" if isinstance(method, type) else f"{method!r:.60}"
    raise InputError(f"expected a method such as Clip(), got {what}")
