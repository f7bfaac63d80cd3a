"""Checkpoints and adapters on disk: listed from their headers, read a tensor at a time."""

from bulkedge._globs import matches

from .adapter import Adapter, Unhandled
from .adapter_config import AdapterConfig
from .codec import CODECS, BlockFp8, Codec, Plain
from .elements import read_tensor
from .format import AdapterFormat, Place
from .formats import FORMATS, is_adapter, open_adapter, open_base, open_path
from .header import TensorInfo, read_header
from .kohya import is_lora_file, open_lora_file, unflatten
from .layout import Layout, Part
from .lora import LoraFactors
from .matrix import StoredMatrix
from .names import NameRule, Resolver, infer_rule
from .read import Checkpoint, open_checkpoint
from .update import Correctable, StoredUpdate

__all__ = [
    "CODECS",
    "FORMATS",
    "Adapter",
    "AdapterConfig",
    "AdapterFormat",
    "BlockFp8",
    "Checkpoint",
    "Codec",
    "Correctable",
    "Layout",
    "LoraFactors",
    "NameRule",
    "Part",
    "Place",
    "Plain",
    "Resolver",
    "StoredMatrix",
    "StoredUpdate",
    "TensorInfo",
    "Unhandled",
    "infer_rule",
    "is_adapter",
    "is_lora_file",
    "matches",
    "open_adapter",
    "open_base",
    "open_checkpoint",
    "open_lora_file",
    "open_path",
    "read_header",
    "read_tensor",
    "unflatten",
]
