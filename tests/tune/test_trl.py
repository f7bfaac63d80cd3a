"""The three lines in a trainer of TRL, which wraps the model itself; where TRL is installed."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

from bulkedge.moments import Moments  # noqa: E402
from bulkedge.tune import DriftPenalty, Hold, IntruderMonitor  # noqa: E402
from helpers import some  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def make_tokenizer():
    words = [*SPECIAL.values(), *(f"w{i}" for i in range(60))]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate(words)}, unk_token=SPECIAL["unk_token"]
        )
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


def make_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_a_supervised_fine_tune(tmp_path):
    model = make_model()
    with Moments(model) as moments, torch.no_grad():
        model(input_ids=torch.randint(3, 60, (16, 16)))
    texts = [" ".join(f"w{i * j % 60}" for j in range(1, 12)) for i in range(64)]
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=0.02,
        logging_steps=2, report_to="none", use_cpu=True, max_length=32, bf16=False,
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    leading, drift = Hold("leading", 0.5), Hold("drift", 0.005, moments=moments)
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_list([{"text": x} for x in texts]),
        processing_class=make_tokenizer(), peft_config=lora,
        callbacks=[leading, drift, IntruderMonitor(every=4, moments=moments)],
    )  # fmt: skip
    trainer.train()
    assert max(some(DriftPenalty(trainer.model, moments).values().values())) <= 0.005 * (1 + 1e-5)
    for matrix in some(leading.holder.matrices):
        limit = 0.5 * leading.holder.thresholds[matrix.name]
        assert float(matrix.strengths[0]) <= limit * (1 + 1e-9)
    history = trainer.state.log_history
    losses = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4, 6]
    assert all("mean_token_accuracy" in entry for entry in losses)  # TRL's own are in its own log
    figures = [entry for entry in history if "bulkedge/drift" in entry]
    assert [entry["step"] for entry in figures] == [0, 4, 6]
    assert not any("mean_token_accuracy" in entry for entry in figures)
