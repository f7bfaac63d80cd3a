"""What the configurations of our methods of PEFT share, and how a method is registered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import peft
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType, register_peft_method

from bulkedge._errors import InputError
from bulkedge._fields import check_values, whole


@dataclass
class FactoredConfig(peft.PeftConfig):
    """Configuration of a method whose updates are thin factors, ``ΔW = X Yᵀ``.

    Attributes:
        method: The name of the method, in lower case: a class variable.
        r: The rank that the method is set to.
        target_modules: As in ``LoraConfig``.
        exclude_modules: As in ``LoraConfig``.
        layers_to_transform: As in ``LoraConfig``.
        layers_pattern: As in ``LoraConfig``.
        modules_to_save: As in ``LoraConfig``.
        bias: Only ``"none"``.
    """

    method: ClassVar[str]

    r: int = field(default=8)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    bias: str = field(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.method.upper()]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        check_values(self, r=(self.r, whole(1)))
        if self.bias != "none":
            raise InputError(f'expected bias "none", got {self.bias!r}: biases are not trained')

    @property
    def columns(self) -> int:
        """How many columns X and Y have."""
        return self.r

    @property
    def dropout(self) -> float:
        """The dropout on the input of an update."""
        return 0.0


METHODS: dict[str, type[FactoredConfig]] = {}
"""The methods that were registered, by their names."""


def register(config: type[FactoredConfig], model: type[BaseTuner]) -> None:
    """Make a method known to PEFT.

    Args:
        config: Its configuration, with the name of the method.
        model: Its model.
    """
    name = config.method.upper()
    _add_type(name)
    if PeftType[name] not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=config.method, config_cls=config, model_cls=model)
    METHODS[config.method] = config


def _add_type(name: str) -> None:
    """Add the name of a method to PEFT's enum: its registry accepts only members of it."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    hashable = getattr(PeftType, "_hashable_values_", None)  # Python 3.12 and later
    if hashable is not None:
        hashable.append(name)
