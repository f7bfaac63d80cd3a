"""What an audit measures: everything that the result depends on, besides the two inputs."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from bulkedge._errors import RecipeError, settings_problems
from bulkedge._fields import DEFAULT_EPSILON, no_truth_value
from bulkedge.checkpoint.header import read_regular

from .ranges import Positive

MAX_RECIPE_BYTES = 2**20
HARMLESS = frozenset({"device", "seed", "method", "critical_scale"})
"""Settings that change no verdict."""
P = ParamSpec("P")
R = TypeVar("R")


def _device_name(given: object) -> object:
    """What a ``torch.device`` is called; torch is not loaded for that."""
    return str(given) if type(given).__name__ == "device" else given


def _known_device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", text, re.ASCII):
        raise ValueError("use cpu, cuda or cuda:0")
    return text


Device = Annotated[str, BeforeValidator(_device_name), AfterValidator(_known_device)]
Glob = Annotated[str, Field(min_length=1)]
Rows = Annotated[Positive, BeforeValidator(no_truth_value)]


class Recipe(BaseModel):
    """The settings of an audit, frozen and checked.

    Example:
        >>> Recipe(top_k=5).epsilon
        0.5
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: Positive = Field(10, description="How many leading tuned directions are judged.")
    epsilon: float = Field(
        DEFAULT_EPSILON, gt=0, le=1, description="Score below which the paper counts one."
    )
    side: Literal["left", "right", "both"] = Field("left", description="Singular vectors compared.")
    method: Literal["auto", "certified", "dense"] = Field(
        "auto", description="Certified, then dense where that leaves a verdict open; or one alone."
    )
    include: tuple[Glob, ...] = Field(
        (), description="Only tensors whose name on either side matches."
    )
    exclude: tuple[Glob, ...] = Field(
        (), description="No tensors whose name on either side matches."
    )
    partial: bool = Field(
        False,
        description="Whether a checkpoint may store only some of the weights: it is then meant to "
        "be loaded over the base, whose others stay as they are.",
    )
    critical_scale: bool = Field(
        False, description="Whether to measure at what scale of the update the first is new."
    )
    split: dict[Glob, tuple[Rows, ...]] = Field(
        {}, description="Fused weights to judge block by block: a glob, and the rows of each block."
    )
    device: Device = Field("cpu", description="Where to compute.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the solver's start block.")

    _numbers = field_validator("top_k", "epsilon", "seed", mode="before")(no_truth_value)

    @property
    def sides(self) -> tuple[Literal["left", "right"], ...]:
        """The sides to judge."""
        return ("left", "right") if self.side == "both" else (self.side,)


def make_recipe(
    settings: Mapping[str, Any],
    source: str = "recipe",
    spelled: Mapping[str, str] | None = None,
    beside: Iterable[str] = (),
) -> Recipe:
    """A recipe from plain values.

    Args:
        settings: Field values.
        source: Where they come from, for the message.
        spelled: The options by which some of them were given, for the message.
        beside: What else may stand where they come from, for the message.

    Returns:
        The recipe.

    Raises:
        RecipeError: Naming every unknown field and every bad value at once.
    """
    if not isinstance(settings, Mapping):
        raise RecipeError(
            f"expected {source} as a Recipe or a mapping of settings, got {settings!r:.60}; the "
            "command line reads files of settings (--recipe)"
        )
    try:
        return Recipe.model_validate(dict(settings))
    except ValidationError as error:
        message = settings_problems(error, source, (*Recipe.model_fields, *beside), spelled)
        raise RecipeError(message) from None


def told_setting(value: object) -> str:
    """The value of a setting, for people."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def changed_settings(was: Recipe, now: Recipe) -> str:
    """The settings in which two recipes differ, with both values.

    Args:
        was: One recipe.
        now: The other.

    Returns:
        Such as ``"top_k=10, not 5"``; empty where they are the same.
    """
    pairs = ((name, getattr(was, name), getattr(now, name)) for name in Recipe.model_fields)
    return ", ".join(
        f"{name}={told_setting(old) or 'none'}, not {told_setting(new) or 'none'}"
        for name, old, new in pairs
        if old != new
    )


def takes_recipe(function: Callable[P, R]) -> Callable[P, R]:
    """A function with an argument ``recipe``, which says so to those who give settings beside it.

    Args:
        function: The function.

    Returns:
        The same; RecipeError where an argument is a field of a recipe instead.
    """
    own = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name in Recipe.model_fields and name not in own:
                raise RecipeError(
                    f"{function.__name__}(): {name} is a setting of the recipe; give "
                    f"recipe={{{name!r}: {kwargs[name]!r:.40}}}"
                )
        return function(*args, **kwargs)

    return checked


class _Loader(yaml.SafeLoader):
    """Plain values, and no key twice in a mapping, of which PyYAML would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written: before anything is merged into it."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            named, line = (key.tag, key.value), key.start_mark.line + 1
            if named in lines:
                first = lines[named]
                where = f"in line {line}" if line == first else f"in lines {first} and {line}"
                raise yaml.YAMLError(f"{key.value!r:.40} is given twice, {where}; leave one out")
            lines[named] = line
        return node


def read_recipe(path: Path, *, may_be_empty: bool = False) -> dict[str, Any]:
    """The settings in a YAML (or JSON) recipe file, not yet checked.

    Args:
        path: The file.
        may_be_empty: Whether a file without a setting, or with comments alone, will do.

    Returns:
        Its mapping.

    Raises:
        RecipeError: If it cannot be read, or is not one mapping.
    """
    try:
        text = read_regular(path, MAX_RECIPE_BYTES).decode("utf-8")
        settings = _Loader(text).get_single_data()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); is it a recipe?") from None
    # ValueError: PyYAML builds dates and integers that are none, and text that is no UTF-8
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if settings is None:
        if may_be_empty:
            return {}
        raise RecipeError(f"{path}: holds no settings; write some, or leave the file out")
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: expected fields and values, got {type(settings).__name__}")
    return settings
