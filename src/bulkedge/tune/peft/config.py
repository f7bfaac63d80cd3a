"""The configuration of a spectral adapter, as PEFT has one for each method."""

from __future__ import annotations

from dataclasses import dataclass, field

import peft
from peft.utils.peft_types import PeftType

from bulkedge._errors import InputError
from bulkedge._fields import check_values, number, one_of, whole

NAME = "SPECTRAL"


def _register_type() -> None:
    """Add the name of the method to PEFT's enum: its registry accepts only members of it."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    hashable = getattr(PeftType, "_hashable_values_", None)  # Python 3.12 and later
    if hashable is not None:
        hashable.append(NAME)


_register_type()


@dataclass
class SpectralConfig(peft.PeftConfig):
    """Configuration of a spectral adapter.

    Attributes:
        r: How many leading triplets of each weight are trained; at least 2 for the rotational
            variant.
        variant: ``"additive"`` trains r(m + n) numbers a layer and may move values and spaces;
            ``"rotational"`` trains r(r − 1) and keeps both.
        rotation: For the rotational variant: ``"cayley"`` or ``"exp"``.
        target_modules: As in ``LoraConfig``.
        exclude_modules: As in ``LoraConfig``.
        layers_to_transform: As in ``LoraConfig``.
        layers_pattern: As in ``LoraConfig``.
        modules_to_save: As in ``LoraConfig``.
        spectral_dropout: Dropout on the input of the update.
        bias: Only ``"none"``.

    References:
        Zhang and Pilanci, arXiv:2405.13952; corrected as in docs/errata-intruders.md.
    """

    r: int = field(default=8)
    variant: str = field(default="additive")
    rotation: str = field(default="cayley")
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    spectral_dropout: float = field(default=0.0)
    bias: str = field(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NAME]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        check_values(
            self,
            r=(self.r, whole(1)),
            variant=(self.variant, one_of("additive", "rotational")),
            rotation=(self.rotation, one_of("cayley", "exp")),
            spectral_dropout=(self.spectral_dropout, number("in [0, 1)", lambda x: 0 <= x < 1)),
        )
        if self.variant == "rotational" and self.r == 1:
            raise InputError(
                "expected r ≥ 2 for the rotational variant, got 1: one direction cannot be rotated "
                "within its own span, and nothing would be trained"
            )
        if self.bias != "none":
            raise InputError(f'expected bias "none", got {self.bias!r}: biases are not trained')
