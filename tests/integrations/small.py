"""What all runs share: a small language model in a folder, adapters, holders, and the audit."""

from pathlib import Path

import peft
import tokenizers
import torch
import transformers

import bulkedge
from bulkedge.moments import Moments
from bulkedge.tune import Hold

LEVEL, DRIFT = 0.5, 0.002
TARGETS = ["q_proj", "v_proj", "down_proj"]
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = [f"w{i}" for i in range(60)]
TRAINING = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.03,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def make_model():
    torch.manual_seed(0)
    # widths are multiples of 64: on a CPU bitsandbytes 0.50 unpacks others wrongly
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def make_experts():
    """A model of mixed experts, which PEFT adapts as parameters."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, moe_intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def make_tokenizer():
    words = {word: i for i, word in enumerate([*SPECIAL.values(), *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


def make_base(folder, make=make_model):
    """The base in a folder, with the moments of its inputs beside it."""
    folder = Path(folder)
    model = make()
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    with Moments(model) as moments, torch.no_grad():
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            model(input_ids=torch.randint(3, 63, (16, 16), generator=generator))
    moments.save(folder / "base.moments")
    return folder


def load_base(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "base", **options)


def config_of(kind):
    """The adapter of a kind; None for weights that are trained in full."""
    if kind == "in full":
        return None
    if kind == "experts":
        return peft.LoraConfig(
            r=4, lora_alpha=16, task_type="CAUSAL_LM", target_modules=[],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        )  # fmt: skip
    return peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=TARGETS, use_dora=kind == "DoRA", task_type="CAUSAL_LM"
    )


def hold(holder, folder):
    if holder == "drift":
        return Hold("drift", DRIFT, moments=Path(folder) / "base.moments")
    return Hold(holder, LEVEL)


def texts(count=32):
    return [" ".join(WORDS[i * j % 60] for j in range(1, 12)) for i in range(count)]


def batches(count=4):
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, 20, (4, 12), generator=generator)
        yield {"input_ids": tokens, "labels": tokens}


def multiple(folder, tuned, holder, base="base"):
    """The largest multiple of its limit that the audit finds in what was saved."""
    folder = Path(folder)
    # moments are those of the base before it was packed, and a drift is a share of its output
    base = "base" if holder == "drift" else base
    moments = folder / "base.moments" if holder == "drift" else None
    record = bulkedge.audit(folder / base, tuned, moments=moments)
    rows = [row for row in record.matrices if row.status == "audited" and row.threshold]
    if not rows:
        raise AssertionError("the audit found nothing that was trained")
    if holder == "drift":
        return max(row.drift for row in rows if row.drift is not None) / DRIFT
    line = {"leading": "top_k_threshold", "edge": "threshold"}[holder]
    return max(row.spectral_norm_update / getattr(row, line) for row in rows) / LEVEL
