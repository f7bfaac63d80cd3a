"""Protecting in rounds: the task's inputs are measured again on what a round has made."""

import json
import warnings

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

import bulkedge
from bulkedge import InputError
from bulkedge.cli import cli
from bulkedge.moments import Moments
from bulkedge.repairing import Protect
from bulkedge.repairing.solve import RIDGE
from helpers import save, save_adapter, some

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tokenizers
    import transformers

RECIPE = {"top_k": 1}
LAYERS = {"0": (12, 10), "2": (8, 12), "4": (6, 8)}
PREFIX = "base_model.model."


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))


def updates_of(folder):
    """``2·B·A`` of each layer of an adapter, as the file has it."""
    tensors = load_file(folder / "adapter_model.safetensors")
    factors = {name: [tensors[f"{PREFIX}{name}.lora_{x}.weight"] for x in "BA"] for name in LAYERS}
    return {name: 2 * B @ A for name, (B, A) in factors.items()}


def measured(x, folder=None):
    """Moments of the inputs, with the updates of a folder on the weights."""
    model = network()
    moments = Moments(model)
    with torch.no_grad():
        for name, update in ({} if folder is None else updates_of(folder)).items():
            model.get_submodule(name).weight += update
        with moments:
            model(x)
    return moments


class Case:
    def __init__(self, folder):
        self.path, self.keep, self.task = (
            folder / "base.safetensors",
            draw(90, 10),
            draw(90, 10, seed=1),
        )
        self.task[:, 5:] *= 0.2
        save(self.path, dict(network().state_dict()))
        tensors = {}
        for seed, (name, (m, n)) in enumerate(LAYERS.items()):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = draw(2, n, seed=10 + seed)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = draw(m, 2, seed=20 + seed) / 2
        self.tuned = save_adapter(folder / "tuned", tensors)
        self.base = measured(self.keep)

    def run(self, out, **settings):
        first = measured(self.task, self.tuned)
        chosen = {"recollect": self.recollect, "balance": "layer", "strength": 1.0} | settings
        return bulkedge.repair(
            self.path, self.tuned, out, method=Protect(self.base, first, **chosen), recipe=RECIPE
        )

    def recollect(self, folder):
        return measured(self.task, folder)


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


def inputs(x, updates):
    """The inputs of each layer, straight from the weights."""
    found, state = {}, network().state_dict()
    for name in LAYERS:
        found[name] = x
        weight = state[f"{name}.weight"].double() + updates[name]
        x = (x @ weight.mT + state[f"{name}.bias"].double()).relu()
    return found


def moment(x):
    C = x.mT @ x / len(x)
    return C * len(C) / C.trace() + RIDGE * torch.eye(len(C), dtype=C.dtype)


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_each_round_solves_for_the_update_as_trained_on_the_inputs_of_the_last(
    rounds, case, tmp_path
):
    record = case.run(tmp_path / "out", rounds=rounds)
    trained = {name: update.double() for name, update in updates_of(case.tuned).items()}
    none = {name: torch.zeros_like(update) for name, update in trained.items()}
    kept, now = inputs(case.keep.double(), none), trained
    for _ in range(rounds):
        seen = inputs(case.task.double(), now)
        now = {
            name: trained[name] @ C_t @ torch.linalg.inv(C_t + moment(kept[name]))
            for name in LAYERS
            for C_t in [moment(seen[name])]
        }
    for name, update in some(updates_of(tmp_path / "out").items()):
        torch.testing.assert_close(update.double(), now[name], rtol=1e-4, atol=1e-5)
    assert record.method["rounds"] == rounds
    assert {row.rounds for row in some(record.matrices)} == {rounds}


def test_rounds_change_what_lies_above_the_first_layer_alone(case, tmp_path):
    case.run(tmp_path / "1")
    case.run(tmp_path / "3", rounds=3)
    once, again = updates_of(tmp_path / "1"), updates_of(tmp_path / "3")
    assert torch.equal(once["0"], again["0"])
    assert not torch.allclose(once["2"], again["2"], rtol=1e-2)


def test_inputs_that_stay_give_the_same_update_whatever_the_rounds(case, tmp_path):
    first = measured(case.task, case.tuned)
    case.run(tmp_path / "1")
    case.run(tmp_path / "5", rounds=5, recollect=lambda _: first)
    file = "adapter_model.safetensors"
    assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "5" / file).read_bytes()


def test_a_drift_is_that_of_the_last_round(case, tmp_path):
    record = case.run(tmp_path / "out", rounds=3, strength=None, target_drift=0.1)
    drifts = [row.drift_after for row in record.matrices]
    assert sum(drifts) / len(drifts) == pytest.approx(0.1, rel=1e-2)


def test_copies_are_whole_and_leave_nothing_behind(case, tmp_path):
    seen, before = [], {path.name for path in tmp_path.iterdir()}

    def look(folder):
        assert (folder / "adapter_config.json").read_bytes() == (
            case.tuned / "adapter_config.json"
        ).read_bytes()
        seen.append((folder, updates_of(folder)))
        return case.recollect(folder)

    case.run(tmp_path / "out", rounds=2, recollect=look)
    case.run(tmp_path / "once")
    assert {path.name for path in tmp_path.iterdir()} == before | {"out", "once"}
    case.run(None, rounds=2, recollect=look)  # nothing is written, and its copy removed, too
    once = updates_of(tmp_path / "once")
    for folder, updates in some(seen):
        assert not folder.exists()
        for name in LAYERS:
            assert torch.equal(updates[name], once[name])
    assert len(seen) == 2


def test_a_round_that_fails_leaves_nothing_behind(case, tmp_path):
    before = {path.name for path in tmp_path.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(bulkedge.OutputError, match=r"the copy of a round cannot be .* No space"):
        case.run(tmp_path / "out", rounds=2, recollect=full)
    with pytest.raises(InputError, match="expected recollect to return Moments, got None"):
        case.run(tmp_path / "out", rounds=2, recollect=lambda _: None)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_no_strength_measures_nothing(case, tmp_path):
    case.run(tmp_path / "out", rounds=2, strength=0.0, recollect=lambda _: pytest.fail("measured"))
    file = "adapter_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (case.tuned / file).read_bytes()


def test_rounds_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="expected rounds ≥ 1, got 0"):
        Protect(Moments(), rounds=0)
    with pytest.raises(InputError, match="expected recollect for 2 rounds, got None"):
        Protect(Moments(), rounds=2)


WORDS = [f"w{i}" for i in range(30)]


@pytest.fixture
def causal(tmp_path):
    """A small causal model with its tokenizer, a fine-tune, and two files of texts."""
    folder = tmp_path / "model"
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
    names = [f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("up", "down")]
    tensors = {}
    for seed, name in enumerate(names):
        m, n = (24, 16) if "up" in name else (16, 24)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = draw(2, n, seed=seed) / 4
        tensors[f"{PREFIX}{name}.lora_B.weight"] = draw(m, 2, seed=9 + seed) / 4
    keep, task = ([" ".join(WORDS[i : i + 6]) for i in range(a, a + 20)] for a in (0, 8))
    (tmp_path / "task.txt").write_text("\n".join(task))
    bulkedge.collect_moments(folder, keep).save(tmp_path / "base.moments")
    return folder, save_adapter(tmp_path / "tuned", tensors), task


def test_the_command_reads_the_texts_of_the_task_itself(causal, tmp_path):
    base, tuned, task = causal
    options = ["--method", "protect", "--moments", tmp_path / "base.moments", "-k", "1", "-q",
               "--task-texts", tmp_path / "task.txt", "--rounds", "2"]  # fmt: skip
    command = [str(x) for x in ("repair", base, tuned, "-o", tmp_path / "out", *options)]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out/repair.json").read_text())["method"] == {
        "name": "protect", "strength": 1.0, "target_drift": None, "balance": "output",
        "task_moments": True, "ridge": 0.03, "sides": "one", "rounds": 2,
    }  # fmt: skip
    kept = Moments.load(tmp_path / "base.moments")
    for i, from_ in enumerate((tuned, tmp_path / "0")):
        moments = bulkedge.collect_moments(base, task, tuned=from_)
        bulkedge.repair(
            base, tuned, tmp_path / str(i), method=Protect(kept, moments), recipe=RECIPE
        )
    file = "adapter_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "1" / file).read_bytes()
    assert (tmp_path / "0" / file).read_bytes() != (tmp_path / "1" / file).read_bytes()


def test_the_command_says_what_rounds_need(tmp_path):
    def told(*options):
        command = ["repair", "base", "tuned", "-o", str(tmp_path / "out"), *options]
        return CliRunner().invoke(cli, command).exception

    protect = ("--method", "protect", "--moments", "base.moments")
    assert "--rounds of protect need --task-texts FILE" in str(told(*protect, "--rounds", "2"))
    wrong = str(told("--method", "clip", "--task-texts", "task.txt"))
    assert "--task-texts is no setting of clip" in wrong
