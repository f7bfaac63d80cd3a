"""Weights as bitsandbytes packs them, made from the published formulas, one number at a time."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from bulkedge.checkpoint.codec.bitsandbytes_4bit import TABLES

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def as_bytes(settings: Any) -> Tensor:
    """JSON as the numbers of a tensor."""
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def four_bits(
    W: Tensor, method: str = "nf4", *, nested: bool = False, block: int = 64, name: str = "q"
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a weight ``name.weight`` in four bits, and the numbers they stand for."""
    table, flat = [float(torch.tensor(x)) for x in TABLES[method]], W.double().flatten().tolist()
    absmax = [max(map(abs, flat[i : i + block])) for i in range(0, len(flat), block)]
    state: dict[str, Any] = {"quant_type": method, "blocksize": block, "shape": list(W.shape)}
    state["dtype"] = DTYPES[W.dtype]
    more: dict[str, Tensor] = {"absmax": torch.tensor(absmax)}
    if nested:  # the same again in eight bits: a map of fractions, blocks, an offset
        fractions = torch.linspace(-1, 1, 256)
        offset = sum(absmax) / len(absmax)
        largest = [
            max(abs(x - offset) for x in absmax[i : i + 3]) or 1.0 for i in range(0, len(absmax), 3)
        ]
        codes = [
            int((fractions - (x - offset) / largest[i // 3]).abs().argmin())
            for i, x in enumerate(absmax)
        ]
        absmax = [float(fractions[c]) * largest[i // 3] + offset for i, c in enumerate(codes)]
        more = {
            "absmax": torch.tensor(codes, dtype=torch.uint8),
            "nested_absmax": torch.tensor(largest),
            "nested_quant_map": fractions,
        }
        state |= {"nested_blocksize": 3, "nested_dtype": "float32", "nested_offset": offset}
    codes = [
        min(range(16), key=lambda c, x=x, i=i: abs(table[c] - x / absmax[i // block]))
        for i, x in enumerate(flat)
    ]
    values = [table[c] * absmax[i // block] for i, c in enumerate(codes)]
    codes += [0] * (len(codes) % 2)
    packed = [16 * a + b for a, b in zip(codes[::2], codes[1::2], strict=True)]
    more["quant_map"] = torch.tensor(table)
    more[f"quant_state.bitsandbytes__{method}"] = as_bytes(state)
    tensors = {f"{name}.weight": torch.tensor(packed, dtype=torch.uint8)[:, None]}
    tensors |= {f"{name}.weight.{part}": tensor for part, tensor in more.items()}
    return tensors, torch.tensor(values, dtype=torch.float64).reshape(W.shape).to(W.dtype)


def eight_bits(W: Tensor, name: str = "q") -> tuple[dict[str, Tensor], Tensor]:
    """The same in int8: one largest value for each row."""
    largest = W.float().abs().amax(dim=1)
    codes = (127 * W.float() / largest[:, None]).round().to(torch.int8)
    tensors = {f"{name}.weight": codes, f"{name}.SCB": largest}
    tensors[f"{name}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    return tensors, (codes.double() * largest.double()[:, None] / 127).float()


def scaled(
    W: Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    per_row: bool = True,
    scales: str = "weight_scale",
    name: str = "q",
) -> tuple[dict[str, Tensor], Tensor]:
    """The same in fp8 with one scale for each row, or for all."""
    largest = W.float().abs().amax(dim=1, keepdim=True) if per_row else W.float().abs().max()
    scale = largest / torch.finfo(dtype).max
    codes = (W.float() / scale).to(dtype)
    return {f"{name}.weight": codes, f"{name}.{scales}": scale}, codes.float() * scale


def affine(W: Tensor, bits: int, group: int, name: str = "q") -> tuple[dict[str, Tensor], Tensor]:
    """The same as MLX packs it: words of 32 bits, the first code lowest, scales and biases."""
    rows, columns = W.shape
    grouped = W.double().reshape(rows, -1, group)
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    scales, biases = ((high - low) / (2**bits - 1)).float(), low.float()
    codes = ((grouped - biases[..., None]) / scales[..., None]).round().clamp(0, 2**bits - 1)
    each = 32 // bits
    words = [
        [
            sum(int(code) << (bits * i) for i, code in enumerate(row[at : at + each]))
            for at in range(0, columns, each)
        ]
        for row in codes.reshape(rows, columns).tolist()
    ]
    numbers = codes * scales.double()[..., None] + biases.double()[..., None]
    stored = torch.tensor(words, dtype=torch.int64).to(torch.uint32)
    tensors = {f"{name}.weight": stored, f"{name}.scales": scales, f"{name}.biases": biases}
    return tensors, numbers.reshape(rows, columns)


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes of a row in 32-bit words, the first in the lowest bits."""
    each = 32 // bits
    rows = [row + [0] * (-len(row) % each) for row in codes.tolist()]
    packed = [
        [sum(int(c) << bits * i for i, c in enumerate(row[at : at + each])) for at in
         range(0, len(row), each)] for row in rows
    ]  # fmt: skip
    return torch.tensor(packed, dtype=torch.int64).to(torch.int32)


def packed_int(
    W: Tensor, bits: int = 4, group: int = 5, *, symmetric: bool = True, name: str = "q"
) -> tuple[dict[str, Tensor], Tensor]:
    """The same in integers as compressed-tensors packs them, with a scale for each group."""
    half = 2 ** (bits - 1)
    grouped = W.float().reshape(len(W), -1, group)
    scales = grouped.abs().amax(dim=2) / (half - 0.5)
    zeros = torch.zeros_like(scales) if symmetric else (grouped.mean(dim=2) / scales).round()
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(-half, half - 1)
    tensors = {
        f"{name}.weight_packed": words(codes.reshape(W.shape) + half, bits),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": torch.tensor(W.shape),
    }
    if not symmetric:
        tensors[f"{name}.weight_zero_point"] = words((zeros + half).mT, bits).mT.contiguous()
    return tensors, ((codes - zeros[..., None]) * scales[..., None]).reshape(W.shape)


def fp4(W: Tensor, group: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of E2M1, the exponents of their groups as MXFP4 stores them, and the numbers."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat([table, -table])
    grouped = W.float().unflatten(-1, (-1, group))
    exponents = (grouped.abs().amax(dim=-1) / 6).log2().ceil()
    scaled = grouped / exponents.exp2()[..., None]
    codes = (scaled[..., None] - table).abs().argmin(dim=-1).to(torch.uint8)
    numbers = (table[codes.int()] * exponents.exp2()[..., None]).reshape(W.shape)
    low, high = codes.reshape(*W.shape[:-1], -1, 2).unbind(dim=-1)
    return low + 16 * high, (exponents + 127).to(torch.uint8), numbers


def gptq(
    W: Tensor,
    bits: int = 4,
    group: int = 8,
    *,
    name: str = "q",
    v2: bool = False,
    seed: int | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a weight in GPTQ's words, a code at a time, and the numbers they stand for.

    With a seed the inputs are in groups in an order of their own, as ``desc_act`` leaves them.
    """
    out, width = W.shape
    order = torch.arange(width)
    if seed is not None:
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    groups, count, largest = order // group, -(-width // group), 2**bits - 1
    scales, zeros = torch.empty(count, out), torch.empty(count, out, dtype=torch.int64)
    codes, values = torch.empty(out, width, dtype=torch.int64), torch.empty(out, width)
    for g in range(count):
        part = W[:, groups == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[g] = ((high - low) / largest).half().float()
        zeros[g] = (-low / scales[g]).round().clamp(1, largest)
    for i, g in enumerate(groups.tolist()):
        codes[:, i] = (W[:, i] / scales[g] + zeros[g]).round().clamp(0, largest)
        values[:, i] = (codes[:, i] - zeros[g]) * scales[g]
    tensors = {
        f"{name}.qweight": _words(codes.mT, bits, 0),
        f"{name}.qzeros": _words(zeros - (0 if v2 else 1), bits, 1),
        f"{name}.scales": scales.half(),
        f"{name}.g_idx": groups.int(),
    }
    return tensors, values


def awq(W: Tensor, group: int = 8, *, name: str = "q") -> tuple[dict[str, Tensor], Tensor]:
    """The same in AWQ's words: eight outputs in one, the even ones first."""
    tensors, values = gptq(W, 4, group, name=name, v2=True)
    unpacked = {
        part: _codes(tensors[f"{name}.{part}"], axis)
        for part, axis in (("qweight", 0), ("qzeros", 1))
    }
    order = torch.tensor([8 * (i // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[i % 8] for i in range(len(W))])
    packed = {f"{name}.{part}": _words(codes[:, order], 4, 1) for part, codes in unpacked.items()}
    return packed | {f"{name}.scales": tensors[f"{name}.scales"]}, values


def _words(codes: Tensor, bits: int, axis: int) -> Tensor:
    """Codes in 32-bit words along an axis, the first in the lowest bits."""
    rows = codes.mT.tolist() if axis == 0 else codes.tolist()
    each = 32 // bits
    packed = [
        [
            sum(c << (bits * j) for j, c in enumerate(row[i : i + each]))
            for i in range(0, len(row), each)
        ]
        for row in rows
    ]
    words = torch.tensor(packed, dtype=torch.int64)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    return words.mT.contiguous() if axis == 0 else words


def _codes(words: Tensor, axis: int) -> Tensor:
    """Four-bit codes out of words, the inverse of :func:`_words`."""
    rows = words.mT.tolist() if axis == 0 else words.tolist()
    codes = [[(word >> (4 * j)) & 15 for word in row for j in range(8)] for row in rows]
    found = torch.tensor(codes)
    return found.mT if axis == 0 else found
