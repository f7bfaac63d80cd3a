"""Small healthy inputs, one of each kind that is read: what the mutations begin with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from safetensors.torch import save

from fuzz.mutate import join, split
from helpers import weights
from packing import affine, awq, eight_bits, four_bits, fp4, gptq, packed_int, scaled


@dataclass(frozen=True)
class Victim:
    """Files by path, which of them are given to an audit, and fields of its recipe."""

    files: dict[str, bytes]
    base: str
    tuned: str
    recipe: dict[str, Any] = field(default_factory=dict)


M, N, VOCAB = 9, 7, 11
SHAPES = {"embed.weight": (VOCAB, N), "h.0.q.weight": (M, N), "h.1.q.weight": (M, N)}
CONFIG = {"model_type": "llama", "tie_word_embeddings": False, "quantization_config": None}
LORA = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "use_dora": False,
    "fan_in_fan_out": False, "bias": "none", "target_modules": ["q"], "modules_to_save": None,
    "rank_pattern": {"h.0.q": 2}, "alpha_pattern": {".*q": 3}, "init_lora_weights": True,
    "target_parameters": None, "base_model_name_or_path": "org/name", "peft_version": "0.21.2",
    "auto_mapping": {"base_model_class": "X", "parent_library": "os"},
}  # fmt: skip


def to_safetensors(tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    """A file that is the same in every process: the library writes metadata in any order."""
    tree, data = split(save(tensors, metadata))
    if metadata:
        tree["__metadata__"] = dict(sorted(metadata.items()))
    return join(tree, data)


def _base(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    tensors = {name: weights(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    return {name: W.to(dtype) for name, W in tensors.items()} | {"norm.weight": torch.ones(N)}


def _tuned(base: dict[str, Any]) -> dict[str, Any]:
    return {name: W + 3 * weights(*W.shape, seed=7).to(W.dtype) for name, W in base.items()}


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()


def _model(folder: str, tensors: dict[str, Any], config: Any = None) -> dict[str, bytes]:
    return {
        f"{folder}/model.safetensors": to_safetensors(tensors, {"format": "pt"}),
        f"{folder}/config.json": _json(CONFIG | (config or {})),
    }


def _sharded(folder: str, tensors: dict[str, Any]) -> dict[str, bytes]:
    names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    files = {
        f"{folder}/{shard}": to_safetensors({n: tensors[n] for n in tensors if names[n] == shard})
        for shard in dict.fromkeys(names.values())
    }
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    return files | {f"{folder}/model.safetensors.index.json": _json(index)}


def _adapter(tensors: dict[str, Any], **config: Any) -> dict[str, bytes]:
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    return {
        "tuned/adapter_model.safetensors": to_safetensors(named),
        "tuned/adapter_config.json": _json(LORA | config),
    }


def _pair(module: str, out: int, into: int, r: int = 2) -> dict[str, Any]:
    return {f"{module}.lora_A.weight": weights(r, into), f"{module}.lora_B.weight": weights(out, r)}


def _files() -> Victim:
    base = _base()
    files = {"b.safetensors": to_safetensors(base), "t.safetensors": to_safetensors(_tuned(base))}
    return Victim(files, "b.safetensors", "t.safetensors")


def _half_precision() -> Victim:
    base = _base(torch.bfloat16)
    tuned = {name: W.to(torch.float16) for name, W in _tuned(base).items()}
    return Victim(_model("base", base) | _model("tuned", tuned), "base", "tuned")


def _shards() -> Victim:
    base = _base()
    tuned = {f"model.{name}": W for name, W in _tuned(base).items()}
    return Victim(_sharded("base", base) | _sharded("tuned", tuned), "base", "tuned")


def _lora() -> Victim:
    factors = _pair("h.0.q", M, N) | _pair("h.1.q", M, N)
    return Victim(_model("base", _base()) | _adapter(factors), "base", "tuned")


def _lora_and_more() -> Victim:
    tensors = _pair("h.0.q", M, N) | {
        "embed.lora_embedding_A": weights(2, VOCAB),
        "embed.lora_embedding_B": weights(N, 2),
        "h.0.q.lora_B.bias": weights(M),
        "h.1.q.weight": weights(M, N),
        "head.weight": weights(3, N),
    }
    config = {"rank_pattern": {}, "use_rslora": True, "modules_to_save": ["h.1.q", "head"]}
    return Victim(_sharded("base", _base()) | _adapter(tensors, **config), "base", "tuned")


def _kernels() -> Victim:
    base = {"conv.weight": weights(M, 3, 2, 2), "down.weight": weights(5, M, 1, 1)}
    factors = {
        "conv.lora_A.weight": weights(2, 3, 2, 2),
        "conv.lora_B.weight": weights(M, 2, 1, 1),
        "down.weight": weights(5, M, 1, 1, seed=3),
    }
    return Victim(_model("base", base) | _adapter(factors, rank_pattern={}), "base", "tuned")


def _dora() -> Victim:
    tensors = _pair("h.0.q", M, N) | {"h.0.q.lora_magnitude_vector": weights(M).abs()}
    tensors |= {
        "embed.lora_embedding_A": weights(2, VOCAB),
        "embed.lora_embedding_B": weights(N, 2),
        "embed.lora_magnitude_vector": weights(N).abs(),
    }
    return Victim(_model("base", _base()) | _adapter(tensors, use_dora=True), "base", "tuned")


def _attention() -> Victim:
    base = {"a.in_proj_weight": weights(3 * N, N), "a.out_proj.weight": weights(N, N)}
    tensors = _pair("a", 3 * N, N) | _pair("a.base_layer.out_proj", N, N)
    return Victim(_model("base", base) | _adapter(tensors, rank_pattern={}), "base", "tuned")


def _fp8() -> Victim:
    """Blocks of 4×4: the scales are as many as the configuration makes them."""
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}
    base: dict[str, Any] = {
        "q.weight": weights(M, N).to(torch.float8_e4m3fn),
        "q.weight_scale_inv": weights(3, 2).abs(),
        "norm.weight": torch.ones(N, dtype=torch.bfloat16),
    }
    tuned = base | {"q.weight": weights(M, N, seed=5).to(torch.float8_e4m3fn)}
    return Victim(_model("base", base, config) | _model("tuned", tuned, config), "base", "tuned")


def _bitsandbytes() -> Victim:
    """A base in four and in eight bits, and a LoRA on it."""
    base = four_bits(weights(M, N), nested=True, block=16, name="h.0.q")[0]
    base |= eight_bits(weights(M, N, seed=1), name="h.1.q")[0]
    factors = _pair("h.0.q", M, N) | _pair("h.1.q", M, N)
    return Victim(_model("base", base) | _adapter(factors), "base", "tuned")


def _resized() -> Victim:
    """Two more rows in the vocabulary of the fine-tune."""
    names = ("embed_tokens.weight", "lm_head.weight")
    base = {name: weights(VOCAB, N, seed=i) for i, name in enumerate(names)}
    tuned = {name: weights(VOCAB + 2, N, seed=i) for i, name in enumerate(names)}
    files = _model("base", base | {"h.0.q.weight": weights(M, N)})
    files |= _model("tuned", tuned | {"h.0.q.weight": weights(M, N, seed=3)})
    return Victim(files, "base", "tuned")


def _experts() -> Victim:
    """One side stores a tensor an expert, the other stacks them."""
    E = 3
    apart = {
        f"m.experts.{e}.{w}.weight": weights(5, 4, seed=e) for e in range(E) for w in ("w1", "w3")
    }
    apart |= {f"m.experts.{e}.w2.weight": weights(4, 5, seed=e) for e in range(E)}
    together = {
        "m.experts.gate_up_proj": weights(E, 10, 4, seed=7),
        "m.experts.down_proj": weights(E, 4, 5, seed=8),
    }
    config = {"model_type": "mixtral", "hidden_size": 4}
    files = _model("base", apart, config) | _model("tuned", together, config)
    return Victim(files, "base", "tuned")


def _stacked_fp8() -> Victim:
    config = {"quantization_config": {"weight_block_size": [4, 4]}, "hidden_size": 6}
    name = "m.experts.gate_up_proj"

    def side(seed: int) -> dict[str, Any]:
        stack = weights(3, 10, 6, seed=seed).to(torch.float8_e4m3fn)
        return {name: stack, f"{name}_scale_inv": weights(3, 3, 2, seed=seed).abs()}

    files = _model("base", side(0), config) | _model("tuned", side(1), config)
    return Victim(files, "base", "tuned", {"split": {"*gate_up_proj": [4, 6]}})


def _expert_parameters() -> Victim:
    """Updates of bare parameters: A expert by expert, B rank by rank, one inside the other."""
    E, r = 3, 2
    base = {
        "m.experts.gate_up_proj": weights(E, 10, 4),
        "m.experts.down_proj": weights(E, 4, 5, seed=1),
    }
    tensors = {
        "m.experts.lora_A.weight": weights(E * r, 5),
        "m.experts.lora_B.weight": weights(4, r * E),
        "m.experts.base_layer.lora_A.weight": weights(E * r, 4),
        "m.experts.base_layer.lora_B.weight": weights(10, r * E),
    }
    named = ["experts.gate_up_proj", "experts.down_proj"]
    adapter = _adapter(tensors, target_parameters=named, rank_pattern={})
    config = {"model_type": "qwen3_moe", "hidden_size": 4}
    return Victim(_model("base", base, config) | adapter, "base", "tuned")


def _renamed_and_tied() -> Victim:
    """The same layers behind other wrappings, and an output layer that the base shares."""
    config = {"tie_word_embeddings": True}
    base = {
        "language_model.model.embed_tokens.weight": weights(VOCAB, N),
        "language_model.model.layers.0.q.weight": weights(M, N),
        "vision_tower.layers.0.q.weight": weights(M, N, seed=2),
    }
    tuned = {
        "model.language_model.layers.0.q.weight": weights(M, N, seed=3),
        "model.vision_tower.layers.0.q.weight": weights(M, N, seed=4),
        "lm_head.weight": weights(VOCAB, N, seed=5),
    }
    return Victim(_model("base", base, config) | _model("tuned", tuned, config), "base", "tuned")


UNET = {
    "down_blocks.0.attn1.to_q.weight": weights(M, N),
    "down_blocks.0.attn1.to_out.0.weight": weights(N, M, seed=1),
    "mid_block.conv.weight": weights(5, 3, 2, 2, seed=2),
}


def _kohya() -> Victim:
    """Paths with underscores for dots, alpha as a tensor."""
    tensors: dict[str, Any] = {}
    for name, W in UNET.items():
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        tensors[f"{flat}.lora_down.weight"] = weights(2, *W.shape[1:])
        tensors[f"{flat}.lora_up.weight"] = weights(W.shape[0], 2, *[1] * (W.ndim - 2))
        tensors[f"{flat}.alpha"] = torch.tensor(1.0)
    files = {"unet.safetensors": to_safetensors(UNET), "lora.safetensors": to_safetensors(tensors)}
    return Victim(files, "unet.safetensors", "lora.safetensors")


def _diffusers() -> Victim:
    """Keys of several years, alpha and rank in the metadata."""
    tensors = {
        "unet.down_blocks.0.attn1.to_q.lora_A.weight": weights(2, N),
        "unet.down_blocks.0.attn1.to_q.lora_B.weight": weights(M, 2),
        "unet.down_blocks.0.attn1.processor.to_out_lora.down.weight": weights(2, M),
        "unet.down_blocks.0.attn1.processor.to_out_lora.up.weight": weights(N, 2),
    }
    told = {"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {}, "unet.use_dora": False}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(told)}
    files = {"lora.safetensors": to_safetensors(tensors, metadata)}
    return Victim(files | _model("base", UNET), "base", "lora.safetensors")


def _lora_file() -> Victim:
    """Factors behind another prefix than the base has, alpha as a tensor, one layer without."""
    tensors: dict[str, Any] = {}
    for name, W in UNET.items():
        key = "transformer." + name.removesuffix(".weight")
        tensors[f"{key}.lora_A.weight"] = weights(2, *W.shape[1:])
        tensors[f"{key}.lora_B.weight"] = weights(W.shape[0], 2, *[1] * (W.ndim - 2))
        tensors[f"{key}.alpha"] = torch.tensor(3.0)
    del tensors["transformer.mid_block.conv.alpha"]
    base = {f"model.diffusion_model.{name}": W for name, W in UNET.items()}
    return Victim(
        _model("base", base) | {"l.safetensors": to_safetensors(tensors)}, "base", "l.safetensors"
    )


def _scaled() -> Victim:
    """fp8 with a scale for each row, and with one for all; a full fine-tune that was only cast."""
    base = scaled(weights(M, N), name="h.0.q")[0]
    base |= scaled(weights(M, N, seed=1), per_row=False, scales="scale_weight", name="h.1.q")[0]
    tuned = {f"h.{i}.q.weight": weights(M, N, seed=7).to(torch.float8_e4m3fn) for i in range(2)}
    return Victim(_model("base", base) | _model("tuned", tuned), "base", "tuned")


def _packed() -> Victim:
    """Packed integers, MXFP4, and a LoRA on both."""
    base = packed_int(weights(M, 16), 4, 8, symmetric=False, name="h.0.q")[0]
    codes, scales, _ = fp4(weights(M, 32))
    base |= {"h.1.q.weight_packed": codes, "h.1.q.weight_scale": scales}
    factors = _pair("h.0.q", M, 16) | _pair("h.1.q", M, 32)
    return Victim(_model("base", base) | _adapter(factors), "base", "tuned")


def _mlx() -> Victim:
    """A base in four bits, and an adapter of MLX-LM on it."""
    tensors = (
        affine(weights(M, 16), 4, 8, name="h.0.q")[0] | affine(weights(M, 8), 8, 8, name="v")[0]
    )
    config = {"quantization": {"bits": 4, "group_size": 8, "v": {"bits": 8, "group_size": 8}}}
    factors = {"h.0.q.lora_a": weights(16, 2), "h.0.q.lora_b": weights(2, M)}
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 4.0}}
    files = {
        "tuned/adapters.safetensors": to_safetensors(factors),
        "tuned/adapter_config.json": _json(settings),
    }
    return Victim(_model("base", tensors, config) | files, "base", "tuned")


def _closed_form() -> Victim:
    """LoHa on one layer, with patterns."""
    shapes = {"w1_a": (M, 2), "w1_b": (2, N), "w2_a": (M, 2), "w2_b": (2, N)}
    tensors = {
        f"h.{i}.q.hada_{part}": weights(*shape, seed=i)
        for i in (0, 1)
        for part, shape in shapes.items()
    }
    adapter = _adapter(tensors, peft_type="LOHA", alpha=3, alpha_pattern={"h.0.q": 2})
    return Victim(_model("base", _base()) | adapter, "base", "tuned")


def _kronecker() -> Victim:
    """LoKr on one layer."""
    tensors = {"h.0.q.lokr_w1": weights(3, 1), "h.0.q.lokr_w2_a": weights(3, 2)}
    tensors |= {"h.0.q.lokr_w2_b": weights(2, N)}
    adapter = _adapter(tensors, peft_type="LOKR", alpha=3)
    return Victim(_model("base", _base()) | adapter, "base", "tuned")


def _from_the_base() -> Victim:
    """PiSSA on one layer and trainable tokens beside it, both relative to the base."""
    tensors = _pair("h.0.q", M, N) | {
        "embed.token_adapter.trainable_tokens_delta": weights(2, N, seed=3)
    }
    config = {"init_lora_weights": "pissa", "trainable_token_indices": {"embed": [1, 4]}}
    return Victim(_model("base", _base()) | _adapter(tensors, **config), "base", "tuned")


def _rotated() -> Victim:
    """OFT with shared blocks."""
    tensors = {"h.0.q.oft_R.weight": weights(1, 21), "h.1.q.oft_R.weight": weights(1, 21)}
    config = {"peft_type": "OFT", "block_share": True, "coft": True, "eps": 0.5}
    config |= {"use_cayley_neumann": True, "num_cayley_neumann_terms": 4}
    return Victim(_model("base", _base()) | _adapter(tensors, **config), "base", "tuned")


def _multiplied() -> Victim:
    """IA³, scaling the outputs of one layer and the inputs of another."""
    tensors = {"h.0.q.ia3_l": weights(M, 1), "h.1.q.ia3_l": weights(1, N)}
    return Victim(_model("base", _base()) | _adapter(tensors, peft_type="IA3"), "base", "tuned")


def _spectrum() -> Victim:
    """FourierFT, whose places follow from a seed and the shape of the base."""
    tensors = {"h.0.q.fourierft_spectrum": weights(6), "h.1.q.fourierft_spectrum": weights(6)}
    config = {"peft_type": "FOURIERFT", "random_loc_seed": 5, "scaling": 30.0}
    return Victim(_model("base", _base()) | _adapter(tensors, **config), "base", "tuned")


def _lycoris() -> Victim:
    """LoHa and a full difference in one file without a configuration."""
    shapes = {"w1_a": (M, 2), "w1_b": (2, N), "w2_a": (M, 2), "w2_b": (2, N)}
    tensors = {f"lycoris_h_0_q.hada_{part}": weights(*shape) for part, shape in shapes.items()}
    tensors |= {"lycoris_h_0_q.alpha": torch.tensor(3.0), "lycoris_h_1_q.diff": weights(M, N)}
    files = {"lora.safetensors": to_safetensors(tensors)}
    return Victim(_model("base", _base()) | files, "base", "lora.safetensors")


def _words(pack: Callable[..., Any], **said: Any) -> Victim:
    """Codes in 32-bit words with groups along the inputs, and a LoRA on them."""
    base = pack(weights(8, 16), name="h.0.q")[0]
    config = {"quantization_config": {"bits": 4, "group_size": 8, **said}}
    return Victim(_model("base", base, config) | _adapter(_pair("h.0.q", 8, 16)), "base", "tuned")


def _gguf() -> Victim:
    """A base with its rows in llama.cpp's order and in blocks, and a LoRA in GGUF on it."""
    from ggufs import to_bytes

    q, down = "blk.0.attn_q.weight", "blk.0.ffn_down.weight"
    settings = {"attention.head_count": 2, "attention.head_count_kv": 2}
    base = to_bytes({q: (weights(8, 6), None), down: (weights(6, 32), "Q8_0")}, settings=settings)
    parts = {f"{q}.lora_a": (weights(2, 6), None), f"{q}.lora_b": (weights(8, 2), None)}
    parts |= {f"{down}.lora_a": (weights(2, 32), None), f"{down}.lora_b": (weights(6, 2), None)}
    kinds = {"general_type": "adapter", "adapter_type": "lora", "adapter_lora_alpha": 4.0}
    tuned = to_bytes(parts, settings=settings, **kinds)
    return Victim({"b.gguf": base, "t.gguf": tuned}, "b.gguf", "t.gguf")


VICTIMS = {
    "files": _files,
    "half_precision": _half_precision,
    "shards": _shards,
    "lora": _lora,
    "lora_and_more": _lora_and_more,
    "kernels": _kernels,
    "dora": _dora,
    "attention": _attention,
    "fp8": _fp8,
    "experts": _experts,
    "stacked_fp8": _stacked_fp8,
    "expert_parameters": _expert_parameters,
    "kohya": _kohya,
    "diffusers": _diffusers,
    "bitsandbytes": _bitsandbytes,
    "lora_file": _lora_file,
    "resized": _resized,
    "scaled": _scaled,
    "packed": _packed,
    "mlx": _mlx,
    "closed_form": _closed_form,
    "kronecker": _kronecker,
    "from_the_base": _from_the_base,
    "rotated": _rotated,
    "multiplied": _multiplied,
    "spectrum": _spectrum,
    "lycoris": _lycoris,
    "gptq": partial(_words, gptq, quant_method="gptq", checkpoint_format="gptq"),
    "awq": partial(_words, awq, quant_method="awq", version="gemm"),
    **({"gguf": _gguf} if find_spec("gguf") else {}),  # it is a test dependency
    "renamed_and_tied": _renamed_and_tied,
}
