"""What an audit measures: everything that the result depends on, besides the two inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bulkedge._errors import RecipeError, problems
from bulkedge.checkpoint.header import read_regular

from .ranges import Positive

MAX_RECIPE_BYTES = 2**20
Glob = Annotated[str, Field(min_length=1)]
Rows = Positive


class Recipe(BaseModel):
    """The settings of an audit, frozen and checked.

    Example:
        >>> Recipe(top_k=5).epsilon
        0.5
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: Positive = Field(10, description="How many leading tuned directions are judged.")
    epsilon: float = Field(0.5, gt=0, le=1, description="Score below which the paper counts one.")
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
    split: dict[Glob, tuple[Rows, ...]] = Field(
        {}, description="Fused weights to judge block by block: a glob, and the rows of each block."
    )
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d{1,4})?)$", description="Where to compute.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the solver's start block.")

    @property
    def sides(self) -> tuple[Literal["left", "right"], ...]:
        """The sides to judge."""
        return ("left", "right") if self.side == "both" else (self.side,)


def make_recipe(settings: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from plain values.

    Args:
        settings: Field values.
        source: Where they come from, for the message.

    Returns:
        The recipe.

    Raises:
        RecipeError: Naming every unknown field and every bad value at once.
    """
    try:
        return Recipe.model_validate(dict(settings))
    except ValidationError as error:
        fields = ", ".join(Recipe.model_fields)
        raise RecipeError(f"{source}: {problems(error)} (the fields are {fields})") from None


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML (or JSON) recipe file, not yet checked.

    Args:
        path: The file.

    Returns:
        Its mapping.

    Raises:
        RecipeError: If it cannot be read, or is not one mapping.
    """
    try:
        settings = yaml.safe_load(read_regular(path, MAX_RECIPE_BYTES).decode("utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); is it a recipe?") from None
    # ValueError: PyYAML builds dates and integers that are none, and text that is no UTF-8
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: expected fields and values, got {type(settings).__name__}")
    return settings
