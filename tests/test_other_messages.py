"""Messages that the tests of their own capability do not meet on the way."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bulkedge
from bulkedge import CheckpointError, InputError, MissingExtraError
from bulkedge.checkpoint.write import copy_tree
from bulkedge.repairing.corrected import in_factors
from bulkedge.repairing.method import Correction
from bulkedge.report import plots, to_parquet
from helpers import save, weights

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers


from bulkedge.tune import RankController, SpikeClip, adapted_matrices, full_matrices  # noqa: E402
from bulkedge.tune.trainer import Hold, IntruderMonitor  # noqa: E402


def test_unknown_names_of_the_package():
    with pytest.raises(AttributeError, match="module 'bulkedge' has no attribute 'audits'"):
        bulkedge.audits  # noqa: B018


# --- reports ------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path):
    """One matrix that did not change: its row has no spectrum, no spikes, no directions."""
    base = save(tmp_path / "base.safetensors", {"w": weights(12, 10), "v": weights(12, 10)})
    tuned = save(
        tmp_path / "tuned.safetensors", {"w": weights(12, 10), "v": weights(12, 10, seed=1)}
    )
    return bulkedge.audit(base, tuned)


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (plots.scores, "w: no directions of the left side in this record"),
        (plots.scree, "w: no spectrum in this record"),
        (plots.density, "w: no spectrum in this record"),
        (plots.spikes, "w: no spikes of a low-rank update in this record"),
        (plots.similarity, "w: no similarities of the left side in this record"),
    ],
)
def test_a_matrix_that_has_nothing_to_draw(plot, message, record):
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match=message):
        plot(record, "w")


def test_parquet_without_its_package(record, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match="expected pyarrow for Parquet, found none"):
        to_parquet(record)


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", closed)
    with pytest.raises(
        CheckpointError, match=r"cannot be read \(Permission denied\); change its mode"
    ):
        copy_tree(tmp_path, Path("nowhere"))


def test_a_row_that_dora_switched_off_can_hold_no_correction():
    pair = SimpleNamespace(replaced=None, magnitude=torch.ones(3), per_column=False,
                           magnitude_over_norm=torch.tensor([1.0, 0.0, 2.0]))  # fmt: skip
    with pytest.raises(InputError, match="not zero, got a row that DoRA switched off"):
        in_factors(pair, Correction(torch.ones(3, 1), torch.ones(4, 1)))


# --- fine-tuning --------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)


def test_two_active_adapters_have_no_ranks_of_one():
    config = peft.LoraConfig(r=2, target_modules=["linear"])
    model = peft.get_peft_model(Layers(), config)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    assert adapted_matrices(model)[0].rank == 4
    with pytest.raises(InputError, match=r"linear: .* RankController needs, got several active"):
        RankController(model)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_a_grouped_convolution_is_no_one_matrix():
    model = peft.get_peft_model(Layers(), peft.LoraConfig(r=2, target_modules=["grouped"]))
    with pytest.raises(InputError, match="grouped: expected a convolution without groups"):
        adapted_matrices(model)


def trainer(folder, model, callbacks, **options):
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps",
        "save_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    data = [{"input_ids": torch.arange(i, i + 8), "labels": i % 3} for i in range(32)]
    arguments = transformers.TrainingArguments(str(folder), **(settings | options))
    return transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)


def bert(*, lora=True):
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    return peft.get_peft_model(model, settings) if lora else model


@pytest.fixture
def ran(tmp_path):
    """A run that held its update with one holder."""
    model = bert()
    trainer(tmp_path, model, [Hold(SpikeClip(model))]).train()
    return tmp_path


def test_a_resumed_run_with_another_holder(ran):
    again = trainer(ran, bert(), [Hold(RankController)])
    with pytest.raises(InputError, match="got a RankController in the place of a SpikeClip"):
        again.train(resume_from_checkpoint=str(ran / "checkpoint-2"))


def test_a_resumed_full_run_needs_the_base_it_began_with(tmp_path):
    def watch(model):
        return full_matrices(model, include="*query.weight")

    first = bert(lora=False)
    monitor = IntruderMonitor(watch=watch, every=1, top_k=3)
    trainer(tmp_path, first, [monitor], learning_rate=0.01).train()
    assert max(seen.strongest for seen in monitor.monitor.figures.values()) > 0
    tuned = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    resumed = IntruderMonitor(watch=watch, every=1, top_k=3)
    two = trainer(tmp_path, tuned, [resumed])
    with pytest.raises(InputError, match="expected what it was before training, got what it is in"):
        two.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
