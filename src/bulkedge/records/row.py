"""What every part of a record is: frozen, and a mapping of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Row(BaseModel):
    """A part of a record: frozen, no fields but its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")

    def keys(self) -> list[str]:
        """The names of the fields: with ``row[name]`` so that a row is a mapping."""
        return list(type(self).model_fields)

    def __len__(self) -> int:
        """The number of fields."""
        return len(type(self).model_fields)

    def items(self) -> list[tuple[str, Any]]:
        """The fields with their values: pandas prints a mapping by them."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def __getitem__(self, name: str) -> Any:
        """The value of a field."""
        if name not in type(self).model_fields:
            raise KeyError(name)
        return getattr(self, name)


# so that pandas.DataFrame(record.matrices) has a column for each field
Mapping.register(Row)  # pyright: ignore[reportAttributeAccessIssue] — an ABC
