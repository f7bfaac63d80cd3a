"""What a spectral adapter is asked to be, as a configuration of PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field

import peft
from peft.utils.peft_types import PeftType

from bulkedge._errors import InputError

NAME = "SPECTRAL"


def _enter_type() -> None:
    """Make the method's name one of PEFT's: its registry takes no others."""
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


_enter_type()


@dataclass
class SpectralConfig(peft.PeftConfig):
    """Configuration of a spectral adapter.

    Attributes:
        r: How many leading triplets of each weight are trained.
        variant: ``"additive"`` trains r(m + n) numbers a layer and may move values and spaces;
            ``"rotational"`` trains r(r − 1) and keeps both.
        rotation: Of the rotational one: ``"cayley"`` or ``"exp"``.
        target_modules: As in ``LoraConfig``.
        exclude_modules: Likewise.
        layers_to_transform: Likewise.
        layers_pattern: Likewise.
        modules_to_save: Likewise.
        spectral_dropout: Dropout on the input of the update.
        bias: Only ``"none"``.

    References:
        Zhang and Pilanci, arXiv:2405.13952; corrected as docs/errata-intruders.md has it.
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
        if self.r < 1:
            raise InputError(f"expected r ≥ 1, got {self.r}")
        if self.variant not in ("additive", "rotational"):
            raise InputError(f'expected variant "additive" or "rotational", got {self.variant!r}')
        if self.rotation not in ("cayley", "exp"):
            raise InputError(f'expected rotation "cayley" or "exp", got {self.rotation!r}')
        if not 0 <= self.spectral_dropout < 1:
            raise InputError(f"expected spectral_dropout in [0, 1), got {self.spectral_dropout}")
        if self.bias != "none":
            raise InputError(f'expected bias "none", got {self.bias!r}: biases are not trained')
