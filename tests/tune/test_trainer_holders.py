"""Holders and the penalty in a real Trainer: called at each step, saved, resumed, scaled right."""

import pytest
import torch

from bulkedge import InputError
from bulkedge.moments import Moments
from bulkedge.tune import (
    DriftClip,
    DriftPenalty,
    IntruderPenalty,
    OrthonormalFactors,
    RankController,
    SpikeClip,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT of transformers

from bulkedge.tune.trainer import Hold, IntruderMonitor, PenaltyMixin  # noqa: E402
from helpers import some  # noqa: E402

LORA = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}


def make_base():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def make_model(rank=4):
    return peft.get_peft_model(make_base(), peft.LoraConfig(r=rank, lora_alpha=4 * rank, **LORA))


def examples(count=64):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 60, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": int(row[0]) % 3} for row in tokens]


def make_trainer(folder, model, kind=None, callbacks=(), **options):
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.05,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "logging_steps": 1, "lr_scheduler_type": "constant",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **(settings | options))
    kind = kind or transformers.Trainer
    return kind(model, arguments, train_dataset=examples(), callbacks=list(callbacks))


def strongest(model, thresholds):
    """The strongest spike over its threshold, from the dense updates."""
    return max(
        float(torch.linalg.matrix_norm(layer.get_delta_weight("default").detach(), 2))
        / thresholds[name]
        for name, layer in model.named_modules()
        if name in thresholds
    )


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """Of the base's inputs, in a file."""
    base = make_base()
    with Moments(base) as found, torch.no_grad():
        base(input_ids=torch.stack([x["input_ids"] for x in examples()]))
    path = tmp_path_factory.mktemp("moments") / "base.moments"
    found.save(path)
    return path


class Wrapping(transformers.Trainer):
    """As the trainers of TRL: it wraps the model itself, and its log has averages of its own."""

    def __init__(self, model, args, peft_config=None, **options):
        self.measured = []
        super().__init__(peft.get_peft_model(model, peft_config), args, **options)

    def compute_loss(self, *args, **kwargs):
        self.measured.append(1.0)
        return super().compute_loss(*args, **kwargs)

    def log(self, logs, start_time=None):
        super().log({**logs, "measured": sum(self.measured)}, start_time)
        self.measured.clear()


def wrapping(folder, callbacks, **options):
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.05,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "logging_steps": 3, "lr_scheduler_type": "constant",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **(settings | options))
    config = peft.LoraConfig(r=4, lora_alpha=16, **LORA)
    return Wrapping(
        make_base(), arguments, config, train_dataset=examples(), callbacks=list(callbacks)
    )


def test_one_line_before_the_model_is_wrapped(tmp_path, moments):
    """All three, and the monitor; nothing is bound, and the trainer's own log is as it was."""
    holds = [Hold("leading", 0.5), Hold("edge", 0.5), Hold("drift", 0.01, moments=moments)]
    monitor = IntruderMonitor(every=2, top_k=3, moments=moments)
    trainer = wrapping(tmp_path, [*holds, monitor])
    assert all(hold.holder is None for hold in holds)
    trainer.train()
    leading, edge, drift = (hold.holder for hold in holds)
    assert [type(x) for x in (leading, edge, drift)] == [SpikeClip, SpikeClip, DriftClip]
    assert all(leading.thresholds[x] >= edge.thresholds[x] for x in some(edge.thresholds))
    assert strongest(trainer.model, edge.thresholds) <= 0.5 * (1 + 1e-5)
    after = DriftPenalty(trainer.model, Moments.load(moments)).values()
    assert max(some(after.values())) <= 0.01 * (1 + 1e-5)
    assert max(drift.drift.values()) > 0.01
    history = trainer.state.log_history
    assert [entry["measured"] for entry in history if "loss" in entry] == [3, 3]
    assert [entry["step"] for entry in history if "bulkedge/drift" in entry] == [0, 2, 4, 6]
    free = wrapping(tmp_path, [])
    free.train()
    assert strongest(free.model, edge.thresholds) > 1
    assert max(DriftPenalty(free.model, Moments.load(moments)).values().values()) > 0.02


@pytest.mark.parametrize(
    ("what", "given", "odd"),
    [
        ("leading", {"moments": "base.moments"}, r"expected no moments= with 'leading'"),
        (SpikeClip, {"limit": 0.5}, r"expected no limit= with <class .*, which makes no use of it"),
        (SpikeClip, {"include": "a*"}, r"expected no include= with <class"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(what, given, odd):
    with pytest.raises(InputError, match=odd):
        Hold(what, **given)


@pytest.mark.parametrize("what", ["leading", "drift"])
def test_a_resumed_run_is_that_without_a_break(tmp_path, moments, what):
    """By names alone: the same factors, bit for bit."""
    results = []
    given = {"moments": moments, "limit": 0.01} if what == "drift" else {"limit": 0.5}
    for broken in (False, True):
        folder = tmp_path / str(broken)
        for resume in (None, folder / "checkpoint-3")[: 1 + broken]:
            hold = Hold(what, **given)
            trainer = wrapping(folder, [hold], save_strategy="steps", save_steps=3)
            trainer.train(resume_from_checkpoint=resume and str(resume))
        results.append(list(trainer.model.state_dict().values()))
    assert all(torch.equal(x, y) for x, y in some(zip(*results, strict=True)))


@pytest.mark.parametrize("restore", [False, True])
def test_a_callback_that_a_checkpoint_makes_anew(tmp_path, moments, restore):
    """Names and files are all that it is made of."""
    options = {"save_strategy": "steps", "save_steps": 3}
    wrapping(tmp_path, [Hold("drift", 0.01, moments=moments)], **options).train()
    options["restore_callback_states_from_checkpoint"] = restore
    hold = Hold("drift", 0.01, moments=moments)
    trainer = wrapping(tmp_path, [hold], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (used,) = (x for x in trainer.callback_handler.callbacks if isinstance(x, Hold))
    assert (used is hold) is not restore
    after = DriftPenalty(trainer.model, Moments.load(moments)).values()
    assert max(some(after.values())) <= 0.01 * (1 + 1e-5)


def test_a_holder_that_is_made_anew_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    wrapping(tmp_path, [Hold(SpikeClip)], **options).train()
    options["restore_callback_states_from_checkpoint"] = True
    trainer = wrapping(tmp_path, [Hold(SpikeClip)], **options)
    with pytest.raises(InputError, match="leave restore_callback_states_from_checkpoint off"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_two_holders_of_one_kind_resume_with_their_own_states(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    for resume in (None, str(tmp_path / "checkpoint-4")):
        holds = [
            Hold(lambda model: RankController(model, start=1, include="*query", every=2)),
            Hold(lambda model: RankController(model, start=2, include="*value", every=2)),
        ]
        wrapping(tmp_path, holds, **options).train(resume_from_checkpoint=resume)
        assert [hold.holder.steps for hold in holds] == [7, 7]
        assert all("query" in name for name in some(holds[0].holder.state))
        assert all("value" in name for name in some(holds[1].holder.state))


ODD = {
    "order": (lambda: [Hold("edge"), Hold(RankController)], "in their order, got a SpikeClip"),
    "kind": (lambda: [Hold("edge"), Hold("edge")], "got a SpikeClip in the place of a RankContr"),
    "count": (lambda: [Hold(RankController)], "expected the 2 holders of the run .*, got 1; give"),
}


def test_a_resumed_run_has_the_same_holders(tmp_path):
    """The ranks of a controller would go nowhere, without a word."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    wrapping(tmp_path, [Hold(RankController), Hold("edge")], **options).train()
    for make, message in ODD.values():
        with pytest.raises(InputError, match=message):
            wrapping(tmp_path, make(), **options).train(
                resume_from_checkpoint=str(tmp_path / "checkpoint-3")
            )


def test_a_model_without_adapters_has_no_drift_to_hold(tmp_path, moments):
    trainer = make_trainer(tmp_path, make_base(), callbacks=[Hold("drift", 0.1, moments=moments)])
    with pytest.raises(InputError, match=r"expected adapted layers, found none .*get_peft_model"):
        trainer.train()


def test_layers_are_chosen_by_their_names(tmp_path):
    hold = Hold("edge", 0.1, exclude="*value")
    wrapping(tmp_path, [hold]).train()
    assert all(name.endswith("query") for name in some(hold.holder.strongest))


def test_the_drift_penalty_in_a_trainer(tmp_path, moments):
    drifts = []
    for weight in (0.0, 30.0):
        model = make_model()
        trainer = make_trainer(tmp_path, model, Penalised, max_steps=10)
        trainer.penalty = DriftPenalty(model, Moments.load(moments), weight)
        trainer.train()
        drifts.append(sum(trainer.penalty.values().values()))
    assert drifts[1] < 0.2 * drifts[0]


def test_a_clip_holds_through_a_training(tmp_path):
    model = make_model()
    clip = SpikeClip(model, level=0.5)
    make_trainer(tmp_path, model, callbacks=[Hold(clip)]).train()
    assert strongest(model, clip.thresholds) <= 0.5 * (1 + 1e-5)
    free = make_model()
    make_trainer(tmp_path, free).train()
    assert strongest(free, clip.thresholds) > 1


def test_orthonormal_factors_stay_so(tmp_path):
    model = make_model()
    holder = OrthonormalFactors(model)
    make_trainer(tmp_path, model, callbacks=[Hold(holder)]).train()
    for matrix in some(holder.matrices):
        gram = (matrix.B.mT @ matrix.B).detach()
        torch.testing.assert_close(gram, torch.eye(4), rtol=0, atol=1e-5)


def test_a_resumed_controller_goes_on(tmp_path):
    """The same ranks and factors as those of a run without a break."""
    results = []
    for broken in (False, True):
        folder = tmp_path / str(broken)
        options = {"save_strategy": "steps", "save_steps": 3}
        for resume in (None, folder / "checkpoint-3")[: 1 + broken]:
            model = make_model()
            control = RankController(model, start=1, every=2, level=0.3)
            trainer = make_trainer(folder, model, callbacks=[Hold(control)], **options)
            trainer.train(resume_from_checkpoint=resume and str(resume))
        results.append((control.state_dict(), model))
    (state, whole), (same, parts) = results
    assert state == same
    assert state["steps"] == 7  # once at the beginning, then after each step
    assert max(layer["rank"] for layer in state["layers"].values()) > 1
    for x, y in some(zip(whole.parameters(), parts.parameters(), strict=True)):
        torch.testing.assert_close(x, y)


class Penalised(PenaltyMixin, transformers.Trainer):
    """A trainer with the penalty."""


def test_the_penalty_keeps_spikes_down(tmp_path):
    strengths = []
    for weight in (0.0, 20.0):
        model = make_model()
        trainer = make_trainer(tmp_path, model, Penalised, max_steps=10)
        trainer.penalty = IntruderPenalty(model, weight=weight, k=4, per_call=None)
        trainer.train()
        strengths.append(sum(trainer.penalty.values().values()))
    assert strengths[1] < 0.3 * strengths[0]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_counts_once_a_step_however_batches_are_accumulated(tmp_path, accumulate):
    """A penalty that is a known constant, and the losses that the trainer logs."""
    logged = []
    for constant in (0.0, 5.0):
        model = make_model()
        trainer = make_trainer(
            tmp_path, model, Penalised, max_steps=2, gradient_accumulation_steps=accumulate
        )
        trainer.penalty = lambda constant=constant: torch.tensor(constant)
        trainer.train()
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    differences = [b - a for a, b in zip(*logged, strict=True)]
    assert differences == pytest.approx([5.0, 5.0], abs=1e-3)


def test_it_is_not_part_of_an_evaluation(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, model, Penalised)
    trainer.penalty = lambda: torch.tensor(100.0)
    assert trainer.evaluate(examples(8))["eval_loss"] < 10


KINDS = {
    "SpikeClip": lambda model: SpikeClip(model, level=0.5),
    "OrthonormalFactors": OrthonormalFactors,
    "RankController": lambda model: RankController(model, level=0.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_holder_of_another_model_is_refused(tmp_path, kind):
    holder = KINDS[kind](make_model())
    trainer = make_trainer(tmp_path, make_model(), callbacks=[Hold(holder)])
    with pytest.raises(InputError, match="an optimiser of what is held, got AdamW, which has no"):
        trainer.train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_replaced_between_is_noticed(tmp_path, kind):
    """As a reload of weights with assign=True does: the optimiser goes on with the old ones."""
    model = make_model()

    class Reload(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                state = {k: v.clone() for k, v in model.state_dict().items()}
                model.load_state_dict(state, assign=True)

    trainer = make_trainer(tmp_path, model, callbacks=[Reload(), Hold(KINDS[kind](model))])
    with pytest.raises(InputError, match="which has no trained factor of the 4 matrices"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_penalty_of_another_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), Penalised)
    trainer.penalty = IntruderPenalty(make_model())
    with pytest.raises(InputError, match="expected a penalty of the model that is trained, a Peft"):
        trainer.train()


class Averaging(torch.optim.SGD):
    """As a schedule-free optimiser: it has two modes."""

    def train(self):
        """The weights that are trained."""

    def eval(self):
        """The weights that are saved."""


def test_an_optimiser_that_saves_averages_is_refused(tmp_path):
    model = make_model()
    optimizer = Averaging([x for x in model.parameters() if x.requires_grad], lr=0.1)
    trainer = make_trainer(tmp_path, model, callbacks=[Hold(SpikeClip(model))])
    trainer.optimizer = optimizer
    with pytest.raises(InputError, match="got Averaging: it saves an average"):
        trainer.train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_holder_that_is_given_twice_is_refused(tmp_path, kind):
    model = make_model()
    holder = KINDS[kind](model)
    trainer = make_trainer(tmp_path, model, callbacks=[Hold(holder), Hold(holder)])
    with pytest.raises(InputError, match=f"expected each holder once, got one {kind} twice"):
        trainer.train()


REFUSED = {
    "a misspelt name": (
        ("trailing",),
        {},
        "expected 'leading', 'edge', 'drift', .* got 'trailing'",
    ),
    "nearly a name": (("leadin",), {}, "got 'leadin'; did you mean 'leading'.$"),
    "no holder": ((3,), {}, "a holder with a step.. or a function from the model to one, got 3"),
    "no level": (("edge", -1.0), {}, "expected limit to be positive and finite, got -1.0"),
    "no limit": (("drift",), {"moments": "m"}, "expected limit to be positive .* got None"),
    "no moments": (("drift", 0.1), {}, "expected moments= to be Moments or their file, got None"),
    "moments for spikes": (("edge",), {"moments": "m"}, "expected no moments= with 'edge', which"),
    "settings of a holder": (
        (SpikeClip, 0.5),
        {},
        "expected no limit= with <class .*, which makes",
    ),
    "globs of a holder": ((SpikeClip,), {"exclude": "x"}, "expected no exclude= with <class"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    given, options, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        Hold(*given, **options)


def test_a_function_that_makes_no_holder(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), callbacks=[Hold(lambda model: "clip")])
    with pytest.raises(InputError, match=r"a function from the model .* got one to str"):
        trainer.train()
