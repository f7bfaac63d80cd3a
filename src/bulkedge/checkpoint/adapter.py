"""What an adapter is, whatever format it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .adapter_config import AdapterConfig
from .base_class import BaseClass
from .experts import Wrapped
from .header import EMPTY, TensorInfo
from .targets import Targets
from .update import StoredUpdate


@dataclass(frozen=True)
class Unhandled:
    """A stored tensor that is neither an update nor a replacement.

    Attributes:
        info: The tensor.
        name: What the base tensor would be called.
        reason: Why it is left out; for an empty tensor, always that it is damaged.
        set_aside: Whether no update of a weight is lost with it.
    """

    info: TensorInfo
    name: str
    reason: str
    set_aside: bool = False

    def __post_init__(self) -> None:
        if self.info.empty:
            object.__setattr__(self, "reason", EMPTY)
            object.__setattr__(self, "set_aside", False)


@dataclass(frozen=True)
class Adapter:
    """An adapter: updates of the weights of a base model.

    Attributes:
        path: What the caller named.
        files: Its weights first, then the configuration that has their scale.
        factors: Updates, by the name that the base tensor would have in the tuned model.
        config: The checked part of its configuration, PEFT's defaults without one.
        tensors: Full tensors that replace the base's, by name: trained heads, embeddings.
        unhandled: Everything else, with the reason.
        wrapped: Updates of bare parameters, mainly experts: only the base shows which parameter is
            meant, not their names.
        flattened: Whether the names have underscores for dots, as kohya's scripts write them.
        beside: Weights files and indexes in the same folder that are not part of it.
        method: The name of its method; a record has it in lower case.
        origin: One line about the program that wrote it; empty if there is nothing to say.
        stored: All stored tensors, for a file other than safetensors; otherwise empty.
        targets: Which modules its configuration names; None without one that does.
        disagreements: Where that and its tensors disagree, in sentences; filled in once both inputs
            are known.
        base_class: How PEFT loads its base; None where its configuration does not say, and of other
            formats.
    """

    path: Path
    files: tuple[Path, ...]
    factors: Mapping[str, StoredUpdate]
    config: AdapterConfig = field(default_factory=lambda: AdapterConfig(peft_type="LORA"))
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    unhandled: tuple[Unhandled, ...] = ()
    wrapped: tuple[Wrapped, ...] = ()
    flattened: bool = False
    beside: tuple[str, ...] = ()
    method: str = "LoRA"
    origin: str = ""
    stored: tuple[TensorInfo, ...] = ()
    targets: Targets | None = None
    disagreements: tuple[str, ...] = ()
    base_class: BaseClass | None = None

    @property
    def kind(self) -> str:
        """Its name in a record: the method, in lower case."""
        return self.method.lower()
