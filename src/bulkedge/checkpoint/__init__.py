"""Checkpoints and adapters on disk: listed from their headers, read a tensor at a time."""

from .adapter import Adapter, AdapterConfig, LoraFactors, Unhandled, is_adapter, open_adapter
from .header import TensorInfo, read_header
from .names import NameRule, infer_rule
from .read import Checkpoint, open_checkpoint, read_tensor

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Checkpoint",
    "LoraFactors",
    "NameRule",
    "TensorInfo",
    "Unhandled",
    "infer_rule",
    "is_adapter",
    "open_adapter",
    "open_checkpoint",
    "read_header",
    "read_tensor",
]
