"""The real trainers: what was saved is held, as the audit says, or refused by name."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers

from bulkedge import InputError
from bulkedge.tune import IntruderMonitor

sys.path.insert(0, str(Path(__file__).parent))

import small

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1200)]
HELD = 1 + 1e-4
"""A multiple of the limit up to which a cell is right: the rounding of what an audit prints."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The bases: a dense one, and one of mixed experts."""
    dense = small.make_base(tmp_path_factory.mktemp("small"))
    mixed = small.make_base(tmp_path_factory.mktemp("experts"), small.make_experts)
    return defaultdict(lambda: dense, experts=mixed)


@pytest.fixture(scope="module")
def folder(folders):
    return folders["LoRA"]


def rows_of(columns):
    import datasets

    return datasets.Dataset.from_list(columns)


def run_trainer(folder, out, config, callbacks, model=None, **options):
    """transformers' own, with a model that is wrapped before."""
    import peft

    model = model or small.load_base(folder)
    model = model if config is None else peft.get_peft_model(model, config)
    arguments = transformers.TrainingArguments(str(out / "run"), **(small.TRAINING | options))
    tokens = [torch.arange(3, 15) + i % 7 for i in range(32)]
    data = [{"input_ids": x, "labels": x} for x in tokens]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    trainer.save_model(str(out / "tuned"))


def run_sft(folder, out, config, callbacks, model=None, **options):
    import trl

    arguments = trl.SFTConfig(str(out / "run"), max_length=32, **(small.TRAINING | options))
    trainer = trl.SFTTrainer(
        model or small.load_base(folder), arguments,
        train_dataset=rows_of([{"text": x} for x in small.texts()]),
        processing_class=small.make_tokenizer(), peft_config=config, callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out / "tuned"))


def run_dpo(folder, out, config, callbacks):
    import trl

    texts = small.texts()
    data = [{"prompt": x, "chosen": " w1 w2 w3", "rejected": " w7 w8 w9"} for x in texts[:16]]
    arguments = trl.DPOConfig(str(out / "run"), max_length=32, **small.TRAINING)
    trainer = trl.DPOTrainer(
        small.load_base(folder), args=arguments, train_dataset=rows_of(data),
        processing_class=small.make_tokenizer(), peft_config=config, callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out / "tuned"))


def run_grpo(folder, out, config, callbacks):
    import trl

    def reward(completions, **_):
        return [float(len(set(x.split()))) for x in completions]

    arguments = trl.GRPOConfig(
        str(out / "run"), num_generations=2, max_completion_length=6, **small.TRAINING
    )
    trainer = trl.GRPOTrainer(
        small.load_base(folder), reward, args=arguments,
        train_dataset=rows_of([{"prompt": x} for x in small.texts(8)]),
        processing_class=small.make_tokenizer(), peft_config=config, callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out / "tuned"))


def run_compiled(folder, out, config, callbacks):
    run_trainer(folder, out, config, callbacks, torch_compile_backend="aot_eager")


def run_8bit_optimiser(folder, out, config, callbacks):
    run_trainer(folder, out, config, callbacks, optim="adamw_bnb_8bit")


def run_schedule_free(folder, out, config, callbacks):
    run_trainer(folder, out, config, callbacks, optim="schedule_free_adamw")


def run_lightning(folder, out, config, callbacks):
    """In a module of Lightning a holder is attached to the optimiser where that is made."""
    import lightning
    import peft

    network = small.load_base(folder)
    network = network if config is None else peft.get_peft_model(network, config)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network

        def training_step(self, batch, _):
            return self.network(**batch).loss

        def configure_optimizers(self):
            trained = [p for p in self.network.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=0.03)
            for callback in callbacks:
                callback._build(self.network).attach(optimizer)
            return optimizer

    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(out),
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(list(small.batches(4)), batch_size=None)
    trainer.fit(Module(), loader)
    network.save_pretrained(out / "tuned")


def packed(bits):
    def run(folder, out, config, callbacks):
        four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        eight = transformers.BitsAndBytesConfig(load_in_8bit=True)
        model = small.load_base(
            folder, quantization_config=four if bits == 4 else eight, device_map="cpu"
        )
        base = folder / f"base-{bits}"
        if not base.exists():
            model.save_pretrained(base)
        run_sft(folder, out, config, callbacks, model=model)

    return run


TRAINERS = {
    "Trainer": run_trainer,
    "Trainer, torch.compile": run_compiled,
    "Trainer, 8-bit AdamW": run_8bit_optimiser,
    "Trainer, schedule-free": run_schedule_free,
    "TRL SFT": run_sft,
    "TRL DPO": run_dpo,
    "TRL GRPO": run_grpo,
    "TRL SFT, nf4": packed(4),
    "TRL SFT, int8": packed(8),
    "Lightning": run_lightning,
}
LORA, DORA, DRIFT = ("leading", "LoRA"), ("edge", "DoRA"), ("drift", "LoRA")
EXPERTS, FULL = ("leading", "experts"), ("leading", "in full")
EVERY = [LORA, DORA, DRIFT, EXPERTS, FULL]
OTHER = {
    "Trainer": [*EVERY, ("drift", "DoRA"), ("drift", "experts")],
    # experts are not packed, and packed weights are not trained in full
    "TRL SFT, nf4": [LORA, DORA, DRIFT],
    "TRL SFT, int8": [LORA, DRIFT],  # PEFT's DoRA does not run on int8 on a CPU
}
CASES = [(trainer, *cell) for trainer in TRAINERS for cell in OTHER.get(trainer, EVERY)]
TWO = ("Accelerate, 2 processes", "FSDP2, 2 processes")
REFUSED = {
    **{("Trainer, schedule-free", *cell): "got AdamW" for cell in EVERY},
    ("Trainer", "drift", "DoRA"): "got DoRA",
    ("Trainer", "drift", "experts"): "expected moments of its inputs, got none",
    (TWO[1], *DORA): "expected a DoRA in one piece",
    (TWO[1], *EXPERTS): "expected the factors of experts in one piece",
}
"""What is refused by name, and what the error says."""


@pytest.mark.parametrize(("trainer", "holder", "kind"), CASES)
def test_a_trainer(trainer, holder, kind, folders, cells, tmp_path):
    base = {"TRL SFT, nf4": "base-4", "TRL SFT, int8": "base-8"}.get(trainer, "base")
    folder = folders[kind]
    config, own = small.config_of(kind), small.hold(holder, folder)
    key = f"{trainer} | {holder} | {kind}"
    if message := REFUSED.get((trainer, holder, kind)):
        with pytest.raises(InputError) as caught:
            TRAINERS[trainer](folder, tmp_path, config, [own])
        cells[key] = f"refused: {caught.value}"
        assert message in str(caught.value)
        return
    TRAINERS[trainer](folder, tmp_path, config, [own])
    note(cells, key, small.multiple(folder, tmp_path / "tuned", holder, base))


def note(cells, key, found):
    """A cell, held: up to its limit, and near it, or the limit would be out of reach."""
    cells[key] = round(found, 4)
    assert 0.2 < found <= HELD


@pytest.mark.parametrize(("holder", "kind"), EVERY)
@pytest.mark.parametrize("way", TWO)
def test_two_processes(way, holder, kind, folders, cells, tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            str(script), way.split(",")[0], holder, kind, str(folders[kind]), str(tmp_path),
        ],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    key, refusal = f"{way} | {holder} | {kind}", tmp_path / "refused"
    found = refusal.read_text() if refusal.exists() else ""
    if message := REFUSED.get((way, holder, kind)):
        cells[key] = f"refused: {found}"
        assert message in found
        return
    assert not found
    note(cells, key, small.multiple(folders[kind], tmp_path / "tuned", holder))


LLAMA_FACTORY = Path(__file__).parents[2] / "build/integrations/llama-factory"


@pytest.mark.parametrize(("holder", "kind"), [LORA, DORA, DRIFT, FULL])
def test_llama_factory(holder, kind, folder, cells, tmp_path):
    """Its own ``run_exp``, with callbacks; the package is of the pinned version."""
    script = Path(__file__).with_name("llama_factory.py")
    path = os.pathsep.join([str(LLAMA_FACTORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(script), holder, kind, str(folder), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path, "DISABLE_VERSION_CHECK": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    key = f"LLaMA-Factory | {holder} | {kind}"
    note(cells, key, small.multiple(folder, tmp_path / "tuned", holder))


def test_the_monitor_beside_a_holder_says_what_the_audit_says(folder, cells, tmp_path):
    monitor = IntruderMonitor(every=2)
    run_sft(folder, tmp_path, small.config_of("LoRA"), [small.hold("leading", folder), monitor])
    import bulkedge

    record = bulkedge.audit(folder / "base", tmp_path / "tuned")
    last = monitor.history[-1][1]
    assert last["bulkedge/coverage"] == 1
    assert last["bulkedge/new_directions"] == record.summary.new_directions


SCRIPT = """
import trl
{recipe}
arguments = trl.SFTConfig(str(out / "run"), max_length=32, **small.TRAINING)
trainer = trl.SFTTrainer(
    small.load_base(folder), arguments, train_dataset=data,
    processing_class=small.make_tokenizer(), peft_config=config, callbacks=callbacks,
)
trainer.train()
trainer.save_model(str(out / "tuned"))
"""


def test_the_recipe_of_the_page_pasted_into_a_script(folder, cells, tmp_path):
    """The first lines of docs/fine-tuning.md, as they stand there."""
    page = Path(__file__).parents[2].joinpath("docs/fine-tuning.md").read_text()
    recipe = page.split("```python\n", 1)[1].split("```", 1)[0]
    assert page.count("```", 0, page.index(recipe)) == 1
    assert len([line for line in recipe.splitlines() if line and line[0] != "#"]) <= 3
    data = rows_of([{"text": x} for x in small.texts()])
    known = {"small": small, "folder": folder, "out": tmp_path, "data": data}
    known["config"] = small.config_of("LoRA")
    exec(compile(SCRIPT.format(recipe=recipe), "script", "exec"), known)  # noqa: S102
    hold, monitor = known["callbacks"]
    assert small.multiple(folder, tmp_path / "tuned", "leading") <= 0.9 / small.LEVEL * HELD
    assert all(x <= 0.9 * (1 + 1e-6) for x in after(hold))
    logged = known["trainer"].state.log_history
    assert any("bulkedge/new_directions" in entry for entry in logged)
    assert monitor.history[-1][1]["bulkedge/coverage"] == 1


def after(hold):
    """The strongest spikes over their thresholds, as the factors are now."""
    held, known = hold.holder.matrices, hold.holder.thresholds
    return [float(matrix.strengths[0]) / known[matrix.name] for matrix in held]
