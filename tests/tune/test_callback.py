"""The monitor in a real Trainer: logged, saved, resumed, and able to stop it."""

import json
import sys
import types
from contextlib import nullcontext as nothing

import pytest
import torch

import bulkedge
from bulkedge import InputError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from bulkedge.moments import Moments  # noqa: E402
from bulkedge.tune import Monitor, full_matrices  # noqa: E402
from bulkedge.tune.trainer import Hold, IntruderMonitor  # noqa: E402
from helpers import some  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT of transformers


def make_model(*, lora=True, init=True):
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
    return peft.get_peft_model(model, peft.LoraConfig(**settings, init_lora_weights=init))


def make_trainer(folder, model, *callbacks, **options):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 60, (64, 8), generator=generator)
    data = [{"input_ids": row, "labels": int(row[0]) % 3} for row in tokens]
    settings = {
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.05,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "logging_steps": 1, "lr_scheduler_type": "constant",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **(settings | options))
    return transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:8], callbacks=list(callbacks)
    )


@pytest.fixture
def sent(monkeypatch):
    """The log of a run with ``report_to="reporter"``, as ``(step, logs)``."""
    from transformers.integrations import integration_utils

    found = []

    class Reporter(transformers.TrainerCallback):
        """Called before the callbacks of the user, as those that report_to names are."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            found.append((state.global_step, dict(logs)))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "reporter", Reporter)
    return found


def with_figures(entries):
    return [entry for entry in entries if "bulkedge/coverage" in entry]


def test_figures_reach_the_log_and_what_report_to_names(tmp_path, sent):
    monitor = IntruderMonitor(every=2, per_call=1, top_k=5, full_passes=False)
    trainer = make_trainer(tmp_path, make_model(), monitor, report_to="reporter")
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 9))
    logged = with_figures(history)
    assert [entry["step"] for entry in logged] == [2, 4, 6, 8]
    # a total is told once both layers were looked at
    assert [entry["bulkedge/coverage"] for entry in logged] == [0.5, 1.0, 1.0, 1.0]
    assert ["bulkedge/new_directions" in entry for entry in logged] == [False, True, True, True]
    assert set(logged[0]) >= {
        "bulkedge/lowest_score", "bulkedge/strongest_spike", "bulkedge/effective_rank",
        "bulkedge/energy_share", "bulkedge/new_directions_per_layer", "bulkedge/overhead", "epoch",
    }  # fmt: skip
    assert [step for step, logs in sent if "loss" in logs] == list(range(1, 9))
    assert with_figures(logs | {"step": step} for step, logs in sent) == logged
    assert [(step, figures) for step, figures in monitor.history] == [
        (entry["step"], {k: v for k, v in entry.items() if k.startswith("bulkedge/")})
        for entry in logged
    ]


def test_all_layers_are_checked_when_training_begins_and_ends(tmp_path, sent):
    monitor = IntruderMonitor(every=100, per_call=1, top_k=5)
    trainer = make_trainer(tmp_path, make_model(), monitor, report_to="reporter")
    with pytest.warns(UserWarning, match="checks 1 of 2 layers every 100 steps"):
        trainer.train()
    logged = with_figures(trainer.state.log_history)
    assert [(entry["step"], entry["bulkedge/coverage"]) for entry in logged] == [(0, 1), (8, 1)]
    assert logged[0]["bulkedge/new_directions"] == logged[0]["bulkedge/strongest_spike"] == 0
    assert logged[1]["bulkedge/new_directions"] > 0
    assert [step for step, logs in sent if "bulkedge/coverage" in logs] == [0, 8]


def test_a_run_that_ends_early_is_checked_at_its_end(tmp_path, sent):
    """Stopped by an evaluation, which comes after the last event of a step."""

    class Stop(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = True

    monitor = IntruderMonitor(every=100, top_k=5)
    options = {"eval_strategy": "steps", "eval_steps": 3, "report_to": "reporter"}
    make_trainer(tmp_path, make_model(), monitor, Stop(), **options).train()
    assert [step for step, _ in monitor.history] == [0, 3]
    assert [step for step, logs in sent if "bulkedge/coverage" in logs] == [0, 3]


def test_the_best_checkpoint_is_checked_once_it_is_loaded(tmp_path):
    monitor = IntruderMonitor(every=100, top_k=5)
    options = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 1.0,
    }  # fmt: skip
    model = make_model()
    trainer = make_trainer(tmp_path, model, monitor, **options)
    trainer.train()
    assert [step for step, _ in monitor.history] == [0, 2, 4, 6, 8, 8]  # before each is saved, too
    assert trainer.state.best_global_step != 8
    fresh = type(monitor.monitor)(model, top_k=5)
    fresh.check()
    assert monitor.history[-1][1]["bulkedge/lowest_score"] == pytest.approx(
        fresh.metrics()["bulkedge/lowest_score"], abs=1e-2
    )
    last = with_figures(trainer.state.log_history)[-1]
    assert last["bulkedge/strongest_spike"] == pytest.approx(
        fresh.metrics()["bulkedge/strongest_spike"], rel=1e-5
    )


def base_moments(model):
    with Moments(model) as moments, torch.no_grad():
        model(input_ids=torch.arange(56).reshape(7, 8))
    return moments


def test_the_last_figures_are_those_of_an_audit_of_what_was_saved(tmp_path):
    base = make_model(lora=False)
    base.save_pretrained(tmp_path / "base")
    base_moments(base).save(tmp_path / "base.moments")
    model = make_model()
    monitor = IntruderMonitor(every=4, per_call=1, top_k=5, moments=tmp_path / "base.moments")
    trainer = make_trainer(tmp_path, model, monitor)
    trainer.train()
    model.save_pretrained(tmp_path / "tuned")
    record = bulkedge.audit(tmp_path / "base", tmp_path / "tuned", recipe={"top_k": 5})
    audited = {row.name: row for row in record.matrices if "query" in row.name}
    assert len(audited) == len(monitor.monitor.figures) == 2
    for name, seen in some(monitor.monitor.figures.items()):
        row = audited[f"{name.removeprefix('base_model.model.')}.weight"]
        verdicts = [direction.verdict.value for direction in row.directions]
        assert (seen.intruders, seen.rotated, seen.undecided) == tuple(
            map(verdicts.count, ("intruder", "rotated", "undecided"))
        )
        assert seen.worst == pytest.approx(min(d.score for d in row.directions), abs=1e-2)
        assert seen.drift > 0
    last = with_figures(trainer.state.log_history)[-1]
    assert (
        last["bulkedge/new_directions"] == sum(row.new_directions for row in audited.values()) > 0
    )


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.filterwarnings("ignore:IntruderMonitor checks 2 of 2")
def test_an_adapter_that_began_with_a_part_of_the_base_is_watched(init, tmp_path):
    make_model(lora=False).save_pretrained(tmp_path / "base")
    model = make_model(init=init)
    monitor = IntruderMonitor(every=7, top_k=5)
    saving = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, model, monitor, **saving).train()
    assert monitor.history[0][1]["bulkedge/new_directions"] == 0  # W0 itself
    record = bulkedge.audit(tmp_path / "base", tmp_path / "checkpoint-8", recipe={"top_k": 5})
    figures = monitor.history[-1][1]
    assert figures["bulkedge/new_directions"] == record.summary.new_directions > 0
    assert figures["bulkedge/intruders"] == record.summary.verdicts["intruder"]
    norms = {row.name: row.spectral_norm_update for row in record.matrices}
    for matrix in some(monitor.monitor.matrices):
        name = f"{matrix.name.removeprefix('base_model.model.')}.weight"
        assert float(matrix.strengths[0]) == pytest.approx(norms[name], rel=1e-4)
    with pytest.raises(InputError, match="got trained ones"):
        Monitor(model)
    trainer = make_trainer(tmp_path, make_model(init=init), IntruderMonitor(every=7, top_k=5))
    with pytest.raises(InputError, match="got trained ones"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# -- what it has lost sight of --------------------------------------------------------------------

SETTINGS = {
    "defaults": ({}, [0, 2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20]),
    "a few in turn": ({"every": 4, "per_call": 1}, [0, 4, 5, 8, 10, 12, 15, 16, 20]),
    "a turn longer than the run": ({"every": 15, "per_call": 1}, [0, 5, 10, 15, 20]),
    "once in the run": ({"every": 50}, [0, 5, 10, 15, 20]),
}
RATE = 3e-3
"""At which new directions arise one after the other."""
COUNTS = ("new_directions", "intruders", "rotated", "undecided")


@pytest.mark.filterwarnings("ignore:IntruderMonitor checks 1 of 2 layers every 15 steps")
@pytest.mark.parametrize("chosen", SETTINGS)
def test_every_count_that_is_logged_beside_a_checkpoint_is_that_of_its_audit(tmp_path, chosen):
    options, steps = SETTINGS[chosen]
    make_model(lora=False).save_pretrained(tmp_path / "base")
    monitor = IntruderMonitor(top_k=5, **options)
    saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 20, "learning_rate": RATE}
    trainer = make_trainer(tmp_path, make_model(), monitor, **saving)
    trainer.train()
    assert [step for step, _ in monitor.history] == steps
    told = dict(monitor.history)
    found = []
    for folder in some(tmp_path / f"checkpoint-{step}" for step in (5, 10, 15, 20)):
        record = bulkedge.audit(tmp_path / "base", folder, recipe={"top_k": 5})
        written = json.loads((folder / "bulkedge.json").read_text())["metrics"]
        for figures in (told[int(folder.name.partition("-")[2])], written):
            assert figures["bulkedge/coverage"] == 1
            assert figures["bulkedge/oldest_check"] == 0
            assert figures["bulkedge/new_directions"] == record.summary.new_directions
            assert figures["bulkedge/intruders"] == record.summary.verdicts["intruder"]
        found.append(record.summary.new_directions)
    assert found[0] < found[1] < found[-1]


def test_what_was_seen_before_training_is_not_seen_after_it(tmp_path):
    monitor = IntruderMonitor(every=3, per_call=1, top_k=5)
    trainer = make_trainer(tmp_path, make_model(), monitor)
    trainer.train()
    seen = {
        step: (x["bulkedge/coverage"], x["bulkedge/oldest_check"]) for step, x in monitor.history
    }
    assert seen == {0: (1, 0), 3: (0.5, 3), 6: (1, 3), 8: (1, 0)}
    for name in COUNTS:
        told = [f"bulkedge/{name}" in figures for _, figures in monitor.history]
        assert told == [True, False, True, True], name
    # the layer that was not looked at yet is in no mean
    assert monitor.history[1][1]["bulkedge/lowest_score"] < 1


def test_a_run_that_is_too_short_for_a_round_is_told(tmp_path):
    monitor = IntruderMonitor(every=5, per_call=1, stop_at=100)
    trainer = make_trainer(tmp_path, make_model(), monitor)
    expected = (
        "checks 1 of 2 layers every 5 steps, so each had its turn after 10 steps, but this run has "
        "8: .* leave out every= and per_call="
    )
    with pytest.warns(UserWarning, match=expected):
        trainer.train()
    monitor = IntruderMonitor(every=9, stop_at=100)
    with pytest.warns(UserWarning, match="checks 2 of 2 layers every 9 steps"):
        make_trainer(tmp_path, make_model(), monitor).train()


@pytest.mark.parametrize("options", [{}, {"every": 4, "per_call": 1}, {"every": 3}])
def test_a_number_stops_a_run_at_the_first_check_that_finds_it(tmp_path, options):
    """In a run that is seen at every step, each check of a layer counts; all decide."""
    steps = {"max_steps": 20, "learning_rate": RATE}
    every = IntruderMonitor(every=1, top_k=5)
    make_trainer(tmp_path / "all", make_model(), every, **steps).train()
    counts = {step: figures["bulkedge/intruders"] for step, figures in every.history}
    limit = counts[20] / 2
    assert limit >= 2
    monitor = IntruderMonitor(top_k=5, stop_at=int(limit), **options)
    trainer = make_trainer(tmp_path / "stopped", make_model(), monitor, **steps)
    trainer.train()
    assert trainer.state.global_step < 20
    step, last = monitor.history[-1]
    assert step == trainer.state.global_step
    assert last["bulkedge/intruders"] == counts[step] >= int(limit)
    looked = [earlier for earlier, _ in monitor.history if 0 < earlier < step]
    if options.get("per_call") is None:
        assert all(counts[earlier] < int(limit) for earlier in looked)


@pytest.mark.parametrize(
    ("max_steps", "per_call", "every"), [(8, None, 1), (120, None, 12), (120, 1, 6), (9000, 2, 900)]
)
def test_a_run_is_seen_ten_times(tmp_path, max_steps, per_call, every):
    monitor = IntruderMonitor(per_call=per_call, full_passes=False)
    state, control = transformers.TrainerState(max_steps=max_steps), transformers.TrainerControl()
    arguments = type("Arguments", (), {"process_index": 0})()
    with pytest.warns(UserWarning, match="logs nothing"):
        monitor.on_train_begin(arguments, state, control, model=make_model())
    assert (monitor.every, monitor.monitor.every) == (every, every)
    assert monitor.monitor.round == every * (2 // (per_call or 2))


class Clock:
    """Time in which a look at a layer and a step take what they are said to."""

    def __init__(self, monkeypatch, look):
        self.now = 0.0
        self.perf_counter = lambda: self.now
        for place in ("bulkedge.tune.monitor.time", "bulkedge.tune.trainer._spacing.time"):
            monkeypatch.setattr(place, self)
        judged = Monitor._judged

        def slow(monitor, *args, **options):
            self.now += look
            return judged(monitor, *args, **options)

        monkeypatch.setattr(Monitor, "_judged", slow)


class Steps(transformers.TrainerCallback):
    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock.now += self.seconds


@pytest.mark.parametrize(
    ("look", "step", "options", "steps"),
    [  # of two layers, in 120 steps
        (0.05, 0.01, {}, [0, *range(12, 121, 12)]),  # together less than two seconds
        (1.5, 2.0, {}, [0, 36, 72, 108, 120]),  # 30 steps are 20 times a check
        (1.5, 0.25, {}, [0, 120]),
        (1.5, 0.25, {"every": 40}, [0, 40, 80, 120]),
        (1.5, 0.25, {"stop_at": 1000}, [0, *range(12, 121, 12)]),
        (1.5, 4.0, {"per_call": 1}, [0, 12, 24, 36, 48, 60, 72, 84, 96, 108, 120]),
    ],
)  # fmt: skip
def test_checks_that_no_one_asked_for_take_a_small_share(
    tmp_path, monkeypatch, look, step, options, steps
):
    clock = Clock(monkeypatch, look)
    monitor = IntruderMonitor(top_k=5, **options)
    begun = Steps(clock, step)
    trainer = make_trainer(tmp_path, make_model(), begun, monitor, max_steps=120, logging_steps=50)
    planned = 6 if "per_call" in options else 12
    widened = {"every", "stop_at"}.isdisjoint(options) and planned != steps[1]
    said = pytest.warns(UserWarning, match=f"not every {planned}: 5% of the time")
    with said if widened else nothing():
        trainer.train()
    assert [at for at, _ in monitor.history] == steps
    assert monitor.history[-1][1]["bulkedge/coverage"] == 1
    if widened:
        between = sum(look * options.get("per_call", 2) for at in steps if 0 < at < 120)
        assert between <= 0.05 * 120 * step


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_a_checkpoint_of_an_epoch_or_of_an_evaluation_has_the_figures_of_its_step(
    tmp_path, strategy
):
    monitor = IntruderMonitor(every=7, top_k=5)
    options = {
        "save_strategy": strategy, "max_steps": 20, "eval_strategy": "steps", "eval_steps": 5,
        "metric_for_best_model": "loss",
    }  # fmt: skip
    make_trainer(tmp_path, make_model(), monitor, **options).train()
    for folder in some(sorted(tmp_path.glob("checkpoint-*"))):
        told = json.loads((folder / "bulkedge.json").read_text())
        step = int(folder.name.partition("-")[2])
        assert told["steps"] == step
        assert {layer["step"] for layer in told["layers"].values()} == {step}


def test_the_same_of_weights_that_are_trained_in_full(tmp_path):
    model = make_model(lora=False)
    model.save_pretrained(tmp_path / "base")
    watch = lambda model: full_matrices(model, "*query.weight")  # noqa: E731
    monitor = IntruderMonitor(every=100, top_k=5, watch=watch)
    trainer = make_trainer(tmp_path, model, monitor, learning_rate=0.02)
    trainer.train()
    model.save_pretrained(tmp_path / "tuned")
    recipe = {"top_k": 5, "include": ["*query.weight"]}
    record = bulkedge.audit(tmp_path / "base", tmp_path / "tuned", recipe=recipe)
    last = with_figures(trainer.state.log_history)[-1]
    assert last["bulkedge/new_directions"] == record.summary.new_directions > 0


def test_checkpoints_have_the_figures_and_a_resumed_run_goes_on(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    monitor = IntruderMonitor(every=2, per_call=1, top_k=5, full_passes=False)
    make_trainer(tmp_path, make_model(), monitor, **options).train()
    told = json.loads((tmp_path / "checkpoint-4" / "bulkedge.json").read_text())
    assert told["steps"] == 4
    assert len(told["layers"]) == 2
    resumed = IntruderMonitor(every=2, per_call=1, top_k=5, full_passes=False)
    trainer = make_trainer(tmp_path, make_model(), resumed, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [step for step, _ in resumed.history] == [6, 8]
    whole, again = monitor.monitor.state_dict(), resumed.monitor.state_dict()
    assert again["thresholds"] == whole["thresholds"]
    assert again["layers"].keys() == whole["layers"].keys()
    for name, seen in some(whole["layers"].items()):
        assert again["layers"][name].pop("drift") is seen.pop("drift") is None
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
    monitor = IntruderMonitor(every=1, per_call=1, top_k=5, save_at=1, stop_at=1, full_passes=False)
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


def test_a_rate_that_stops_is_one_per_layer_that_was_looked_at(tmp_path):
    """It is known from the first look on, at one layer of two."""
    monitor = IntruderMonitor(every=1, per_call=1, top_k=5, stop_at=0.5, full_passes=False)
    model = make_model()
    trainer = make_trainer(tmp_path, model, monitor, max_steps=6, learning_rate=1e-4)
    for module in model.modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=2.0)
    trainer.train()
    assert trainer.state.global_step == 1
    assert monitor.history[0][1]["bulkedge/intruders_per_layer"] >= 1
    assert monitor.figure().axes


def test_a_trainer_of_another_kind_is_told(tmp_path):
    """One that calls the events itself: the figures are in the history."""
    monitor = IntruderMonitor(every=1, top_k=5)
    arguments = type("Arguments", (), {"process_index": 0})()
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    with pytest.warns(UserWarning, match="was not called by the callback handler .* logs nothing"):
        monitor.on_train_begin(arguments, state, control, model=make_model())
    assert [step for step, _ in monitor.history] == [0]
    assert [entry["step"] for entry in with_figures(state.log_history)] == [0]


def test_what_is_refused():
    with pytest.raises(InputError, match="expected stop_at to be positive"):
        IntruderMonitor(stop_at=0)


@pytest.mark.parametrize("index", [0, 1])
def test_only_process_0_looks_where_all_have_the_same(index):
    """Under DDP; where parameters are spread, all take part (test_sharded.py)."""
    monitor = IntruderMonitor(every=1, top_k=5)
    arguments = type("Arguments", (), {"process_index": index})()
    state = transformers.TrainerState()
    control = transformers.TrainerControl()
    with pytest.warns(UserWarning, match="logs nothing"):
        monitor.on_train_begin(arguments, state, control, model=make_model())
    assert (monitor.monitor is None) is (index == 1)
    if index == 1:
        monitor.on_step_end(arguments, state, control)
        assert monitor.history == []


# -- the forecast ---------------------------------------------------------------------------------


def test_the_forecast_is_logged_after_the_first_steps_and_has_a_range(tmp_path, sent):
    monitor = IntruderMonitor(every=10, top_k=5, full_passes=False)
    options = {"max_steps": 30, "lr_scheduler_type": "linear", "learning_rate": 0.01}
    trainer = make_trainer(tmp_path, make_model(), monitor, report_to="reporter", **options)
    trainer.train()
    name = "bulkedge/predicted_crossings"
    assert [step for step, logs in sent if name in logs] == [20, 30]
    found = monitor.forecast()
    assert [x.name for x in found] == sorted(
        monitor.monitor.top_k_thresholds, key=lambda x: -{y.name: y.at_end[1] for y in found}[x]
    )
    # at the last step nothing is left to come, and the strengths are those of the factors
    for layer in some(found):
        matrix = next(x for x in monitor.monitor.matrices if x.name == layer.name)
        theta = monitor.monitor.top_k_thresholds[layer.name]
        strength = float(matrix.strengths[0]) / theta
        assert layer.at_end == pytest.approx((strength,) * 3)
        assert layer.crossing == ((30,) * 3 if strength >= 1 else (None,) * 3)
    last = with_figures(trainer.state.log_history)[-1]
    assert last[name] == sum(layer.strength >= 1 for layer in found)


@pytest.mark.parametrize("held_first", [True, False])
def test_no_forecast_in_a_run_that_is_held(held_first, tmp_path, sent):
    """What is lowered after every step does not grow as updates do."""
    monitor = IntruderMonitor(every=10, top_k=5, full_passes=False)
    both = [Hold("leading"), monitor] if held_first else [monitor, Hold("leading")]
    options = {"max_steps": 30, "lr_scheduler_type": "linear", "learning_rate": 0.01}
    make_trainer(tmp_path, make_model(), *both, report_to="reporter", **options).train()
    assert monitor.history[-1][0] == 30
    assert monitor.forecast() == []
    assert not any("bulkedge/predicted_crossings" in logs for _, logs in sent)


def test_no_forecast_where_the_schedule_is_not_known_beforehand(tmp_path, sent):
    monitor = IntruderMonitor(every=10, top_k=5, full_passes=False)
    options = {"max_steps": 20, "lr_scheduler_type": "reduce_lr_on_plateau"}
    options |= {"eval_strategy": "steps", "eval_steps": 10}
    make_trainer(tmp_path, make_model(), monitor, report_to="reporter", **options).train()
    assert monitor.history[-1][0] == 20
    assert monitor.forecast() == []
    assert not any("bulkedge/predicted_crossings" in logs for _, logs in sent)


# -- what draws the figures -----------------------------------------------------------------------


class Run:
    """What transformers' callback asks of a run of wandb, by its documented interface."""

    def __init__(self):
        self.logged, self.summary = [], {}

    def log(self, data):
        self.logged.append(dict(data))


def test_figures_under_the_names_that_wandb_is_given(tmp_path, monkeypatch):
    """transformers' own callback, with the interface of the package in the place of the package."""
    from transformers.integrations import WandbCallback, integration_utils

    run = Run()
    fake = types.ModuleType("wandb")
    fake.run, fake.log, fake.config = run, run.log, {}
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    callback = WandbCallback()
    monkeypatch.setattr(callback, "setup", lambda *args, **kwargs: None)
    callback._initialized = True
    monitor = IntruderMonitor(every=4, top_k=5)
    trainer = make_trainer(tmp_path, make_model(), monitor)
    trainer.add_callback(callback)
    trainer.train()
    drawn = [x for x in run.logged if any("bulkedge" in name for name in x)]
    assert [x["train/global_step"] for x in drawn] == [0, 4, 8]
    last = monitor.history[-1][1]
    assert {f"train/{name}": value for name, value in last.items()}.items() <= drawn[-1].items()


def test_figures_in_the_file_that_tensorboard_reads(tmp_path, monkeypatch):
    """Needs tensorboard; the file is read by the package itself."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monitor = IntruderMonitor(every=4, top_k=5)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    make_trainer(tmp_path, make_model(), monitor, report_to="tensorboard").train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    known = events.Scalars("train/bulkedge/lowest_score")
    assert [(x.step, pytest.approx(x.value)) for x in known] == [
        (step, figures["bulkedge/lowest_score"]) for step, figures in monitor.history
    ]
