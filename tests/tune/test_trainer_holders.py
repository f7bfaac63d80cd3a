"""Holders and the penalty in a real Trainer: called at each step, saved, resumed, scaled right."""

import pytest
import torch

from bulkedge import InputError
from bulkedge.tune import IntruderPenalty, OrthonormalFactors, RankController, SpikeClip

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT of transformers

from bulkedge.tune.trainer import AfterStep, PenaltyMixin  # noqa: E402
from helpers import some  # noqa: E402


def make_model(rank=4):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=4 * rank, target_modules=["query", "value"]
    )
    return peft.get_peft_model(model, lora)


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


def test_a_clip_holds_through_a_training(tmp_path):
    model = make_model()
    clip = SpikeClip(model, level=0.5)
    make_trainer(tmp_path, model, callbacks=[AfterStep(clip)]).train()
    assert strongest(model, clip.thresholds) <= 0.5 * (1 + 1e-5)
    free = make_model()
    make_trainer(tmp_path, free).train()
    assert strongest(free, clip.thresholds) > 1


def test_orthonormal_factors_stay_so(tmp_path):
    model = make_model()
    holder = OrthonormalFactors(model)
    make_trainer(tmp_path, model, callbacks=[AfterStep(holder)]).train()
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
            trainer = make_trainer(folder, model, callbacks=[AfterStep(control)], **options)
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
        trainer.intruder_penalty = IntruderPenalty(model, weight=weight, k=4, per_call=None)
        trainer.train()
        strengths.append(sum(trainer.intruder_penalty.values().values()))
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
        trainer.intruder_penalty = lambda constant=constant: torch.tensor(constant)
        trainer.train()
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    differences = [b - a for a, b in zip(*logged, strict=True)]
    assert differences == pytest.approx([5.0, 5.0], abs=1e-3)


def test_it_is_not_part_of_an_evaluation(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, model, Penalised)
    trainer.intruder_penalty = lambda: torch.tensor(100.0)
    assert trainer.evaluate(examples(8))["eval_loss"] < 10


KINDS = {
    "SpikeClip": lambda model: SpikeClip(model, level=0.5),
    "OrthonormalFactors": OrthonormalFactors,
    "RankController": lambda model: RankController(model, level=0.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_holder_of_another_model_is_refused(tmp_path, kind):
    holder = KINDS[kind](make_model())
    trainer = make_trainer(tmp_path, make_model(), callbacks=[AfterStep(holder)])
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

    trainer = make_trainer(tmp_path, model, callbacks=[Reload(), AfterStep(KINDS[kind](model))])
    with pytest.raises(InputError, match="which has no trained factor of the 4 matrices"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_penalty_of_another_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), Penalised)
    trainer.intruder_penalty = IntruderPenalty(make_model())
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
    trainer = make_trainer(tmp_path, model, callbacks=[AfterStep(SpikeClip(model))])
    trainer.optimizer = optimizer
    with pytest.raises(InputError, match="got Averaging: it saves an average"):
        trainer.train()


def test_what_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"expected holders with a step\(\), got str"):
        AfterStep("clip")
    with pytest.raises(InputError, match="expected holders, got none"):
        make_trainer(tmp_path, make_model(), callbacks=[AfterStep()]).train()
