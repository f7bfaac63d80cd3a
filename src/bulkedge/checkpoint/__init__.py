"""Checkpoints and adapters on disk: listed from their headers, read a tensor at a time."""

from bulkedge._globs import matches

from .adapter import Adapter, AdapterConfig, Unhandled, is_adapter, open_adapter
from .factors import LoraFactors
from .header import TensorInfo, read_header
from .kohya import is_lora_file, open_lora_file, unflatten
from .layout import Layout, Part
from .matrix import BlockScales, StoredMatrix
from .names import NameRule, Resolver, infer_rule
from .read import Checkpoint, open_checkpoint, read_tensor

__all__ = [
    "Adapter",
    "AdapterConfig",
    "BlockScales",
    "Checkpoint",
    "Layout",
    "LoraFactors",
    "NameRule",
    "Part",
    "Resolver",
    "StoredMatrix",
    "TensorInfo",
    "Unhandled",
    "infer_rule",
    "is_adapter",
    "is_lora_file",
    "matches",
    "open_adapter",
    "open_checkpoint",
    "open_lora_file",
    "read_header",
    "read_tensor",
    "unflatten",
]
