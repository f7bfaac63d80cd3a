"""The monitor in a real Trainer: logged, saved, resumed, and able to stop it."""

import json

import pytest
import torch

import bulkedge
from bulkedge import InputError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from bulkedge.tune.callback import IntruderMonitor  # noqa: E402

from bulkedge.tune import full_matrices  # noqa: E402
from helpers import some  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT of transformers


def make_model(*, lora=True):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=48, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    if not lora:
        return model
    settings = {"task_type": "SEQ_CLS", "r": 2, "lora_alpha": 16, "target_modules": ["query"]}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def make_trainer(folder, model, monitor, *, bind=True, **options):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 60, (64, 8), generator=generator)
    data = [{"input_ids": row, "labels": int(row[0]) % 3} for row in tokens]
    settings = {
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.05,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "logging_steps": 1, "lr_scheduler_type": "constant",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **(settings | options))
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[monitor])
    if bind:
        monitor.bind(trainer)
    return trainer


def test_figures_reach_the_log_and_losses_stay_in_it(tmp_path):
    model = make_model()
    monitor = IntruderMonitor(every=2, per_call=1, top_k=5)
    trainer = make_trainer(tmp_path, model, monitor)
    trainer.train()
    history = trainer.state.log_history
    assert sum("loss" in entry for entry in history) == 8
    logged = [entry for entry in history if "bulkedge/coverage" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6, 8]
    # a total is told once both layers were looked at
    assert [entry["bulkedge/coverage"] for entry in logged] == [0.5, 1.0, 1.0, 1.0]
    assert ["bulkedge/intruders" in entry for entry in logged] == [False, True, True, True]
    assert logged[-1]["bulkedge/intruders"] == monitor.history[-1][1]["bulkedge/intruders"]
    assert set(logged[0]) >= {
        "bulkedge/lowest_score", "bulkedge/strongest_spike", "bulkedge/effective_rank",
        "bulkedge/overhead",
    }  # fmt: skip


def test_the_last_figures_are_those_of_an_audit_of_what_was_saved(tmp_path):
    make_model(lora=False).save_pretrained(tmp_path / "base")
    model = make_model()
    monitor = IntruderMonitor(every=8, per_call=2, top_k=5)
    make_trainer(tmp_path, model, monitor).train()
    model.save_pretrained(tmp_path / "tuned")
    record = bulkedge.audit(tmp_path / "base", tmp_path / "tuned", recipe={"top_k": 5})
    audited = {row.name: row for row in record.matrices if "query" in row.name}
    assert len(audited) == len(monitor.monitor.figures) == 2
    for name, seen in some(monitor.monitor.figures.items()):
        row = audited[f"{name.removeprefix('base_model.model.')}.weight"]
        assert seen.intruders + seen.rotated == row.intruders
        assert seen.worst == pytest.approx(min(d.score for d in row.directions), abs=1e-2)
    assert sum(row.intruders for row in audited.values()) > 0


def test_checkpoints_have_the_figures_and_a_resumed_run_goes_on(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    monitor = IntruderMonitor(every=2, per_call=1, top_k=5)
    make_trainer(tmp_path, make_model(), monitor, **options).train()
    told = json.loads((tmp_path / "checkpoint-4" / "bulkedge.json").read_text())
    assert told["steps"] == 4
    assert len(told["layers"]) == 2
    resumed = IntruderMonitor(every=2, per_call=1, top_k=5)
    trainer = make_trainer(tmp_path, make_model(), resumed, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [step for step, _ in resumed.history] == [6, 8]
    whole, again = monitor.monitor.state_dict(), resumed.monitor.state_dict()
    assert again["thresholds"] == whole["thresholds"]
    assert again["layers"].keys() == whole["layers"].keys()
    for name, seen in some(whole["layers"].items()):
        assert again["layers"][name] == pytest.approx(seen, rel=1e-4)


def test_it_saves_once_and_stops(tmp_path):
    monitor = IntruderMonitor(every=1, per_call=2, top_k=5, save_at=1, stop_at=3)
    trainer = make_trainer(tmp_path, make_model(), monitor, max_steps=40)
    trainer.train()
    assert trainer.state.global_step < 40
    assert monitor.history[-1][1]["bulkedge/intruders"] >= 3
    first = next(step for step, seen in monitor.history if seen["bulkedge/intruders"] >= 1)
    assert (tmp_path / f"checkpoint-{first}" / "bulkedge.json").is_file()
    # the trainer itself saves where it stops
    assert len(list(tmp_path.glob("checkpoint-*"))) <= 2


def test_a_number_that_stops_is_one_of_all_layers(tmp_path):
    """A look at one layer of two finds enough, and yet nothing is stopped before the second."""
    monitor = IntruderMonitor(every=1, per_call=1, top_k=5, save_at=1, stop_at=1)
    model = make_model()
    trainer = make_trainer(tmp_path, model, monitor, max_steps=6, learning_rate=1e-4)
    for module in model.modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=2.0)
    trainer.train()
    first = monitor.history[0][1]
    assert first["bulkedge/new_directions_per_layer"] >= 1
    assert "bulkedge/intruders" not in first
    assert trainer.state.global_step == 2
    assert not (tmp_path / "checkpoint-1").exists()


def test_unbound_it_says_so_and_keeps_its_history(tmp_path):
    monitor = IntruderMonitor(every=4, top_k=5)
    trainer = make_trainer(tmp_path, make_model(), monitor, bind=False)
    with pytest.warns(UserWarning, match=r"logs nothing before monitor\.bind"):
        trainer.train()
    assert [step for step, _ in monitor.history] == [4, 8]
    assert not any("bulkedge/coverage" in entry for entry in trainer.state.log_history)


def test_a_full_fine_tune_is_watched(tmp_path):
    model = make_model(lora=False)
    monitor = IntruderMonitor(every=8, per_call=9, top_k=5, watch=full_matrices(model, "*query*"))
    make_trainer(tmp_path, model, monitor, learning_rate=1e-3).train()
    assert len(monitor.monitor.figures) == 2
    assert all(seen.strongest > 0 for seen in monitor.monitor.figures.values())


def test_what_is_refused():
    with pytest.raises(InputError, match="expected stop_at ≥ 1"):
        IntruderMonitor(stop_at=0)


@pytest.mark.parametrize("index", [0, 1])
def test_only_process_0_looks_where_all_have_the_same(index):
    """Under DDP; where parameters are spread, all take part (test_sharded.py)."""
    monitor = IntruderMonitor(every=1, top_k=5)
    monitor.bind(type("Trainer", (), {"log": print})())
    arguments = type("Arguments", (), {"process_index": index})()
    state = transformers.TrainerState()
    control = transformers.TrainerControl()
    monitor.on_train_begin(arguments, state, control, model=make_model())
    assert (monitor.monitor is None) is (index == 1)
    if index == 1:
        monitor.on_step_end(arguments, state, control)
        assert monitor.history == []
