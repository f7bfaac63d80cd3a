"""GGUF files made by the library that owns the format, as llama.cpp's converters make them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

HEADS, KV_HEADS = 4, 2
SETTINGS = {
    "context_length": 64, "embedding_length": 64, "block_count": 1, "feed_forward_length": 96,
    "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "vocab_size": 40,
}  # fmt: skip


def to_llama_cpp(W, heads):
    """The rows of q or k as the converter writes them: halves of a head become pairs."""
    return W.reshape(heads, 2, len(W) // heads // 2, -1).swapaxes(1, 2).reshape(W.shape)


def llama(tensors, path, quantised=None, **settings):
    """A llama in GGUF; ``quantised`` names a type for its matrices."""
    return write(
        {name: (W, quantised if W.ndim > 1 else None) for name, W in tensors.items()},
        path, arch="llama", settings=SETTINGS | settings,
    )  # fmt: skip


def write(tensors, path, arch="llama", settings=(), **texts):
    """A file with tensors, each with the name of its type or None, and with settings."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    for key, value in dict(settings).items():
        writer.add_uint32(f"{arch}.{key}", value)
    if settings:
        writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in texts.items():
        name = key.replace("_", ".")
        (writer.add_float32 if isinstance(value, float) else writer.add_string)(name, value)
    for name, (W, kind) in tensors.items():
        if kind is None:
            writer.add_tensor(name, W.contiguous().numpy())
            continue
        type_ = gguf.GGMLQuantizationType[kind]
        packed = W.numpy() if W.dtype is torch.uint8 else gguf.quantize(W.float().numpy(), type_)
        writer.add_tensor(name, packed, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def to_bytes(*arguments, **settings):
    """The same as the bytes of a file."""
    with tempfile.TemporaryDirectory() as folder:
        return write(arguments[0], Path(folder) / "x.gguf", **settings).read_bytes()


def lora(factors, path, alpha=8.0, arch="llama", **settings):
    """A LoRA: for each weight A, B, and how many heads' rows B has."""
    parts = {}
    for name, (A, B, heads) in factors.items():
        parts[f"{name}.lora_a"] = (A, None)
        parts[f"{name}.lora_b"] = (to_llama_cpp(B, heads) if heads else B, None)
    return write(
        parts, path, arch=arch, settings=SETTINGS | settings,
        general_type="adapter", adapter_type="lora", adapter_lora_alpha=alpha,
    )  # fmt: skip


__all__ = ["HEADS", "KV_HEADS", "llama", "lora", "to_bytes", "to_llama_cpp", "write"]
