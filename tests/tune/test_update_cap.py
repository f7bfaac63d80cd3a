"""Weights that are trained in full and held: what is computed, what is saved, what is loaded."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from bulkedge import InputError
from bulkedge.tune import Monitor, full_matrices, hold_update
from helpers import some

transformers = pytest.importorskip("transformers")
WIDE = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def test_a_dense_update_is_held_and_its_gradient_goes_through():
    linear = nn.Linear(30, 40, dtype=WIDE)
    W0 = linear.weight.detach().clone()
    hold_update(linear, level=0.5, threshold=1.0)
    torch.testing.assert_close(linear.weight, W0)
    original = linear.parametrizations.weight.original
    with torch.no_grad():
        original.add_(draw(40, 30))
    held = linear.weight - W0
    free = original - W0
    factor = 0.5 / torch.linalg.matrix_norm(free, 2)
    torch.testing.assert_close(held, factor * free, rtol=1e-3, atol=1e-5)
    (expected,) = torch.autograd.grad((factor * free).square()[0].sum(), original)
    (found,) = torch.autograd.grad((linear.weight - W0).square()[0].sum(), original)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", ["Embedding", "Convolution"])
def test_what_hold_update_refuses(kind):
    module = nn.Conv1d(3, 4, 2) if kind == "Convolution" else nn.Embedding(5, 6)
    message = r"expected a matrix '(weight' in Conv1d|bias' in Embedding)"
    with pytest.raises(InputError, match=message):
        hold_update(module, "weight" if kind == "Convolution" else "bias")


def moved(linear, by=1.0):
    """A held layer whose trained weight is far outside."""
    with torch.no_grad():
        original = linear.parametrizations.weight.original
        original.add_(by * draw(*original.shape, seed=3).to(original))
    return linear


def held_norm(weight, base):
    return float(torch.linalg.matrix_norm(weight.detach().double() - base.double(), 2))


# -- what happens to the model --------------------------------------------------------------------

EVENTS = {
    "nothing": lambda model: model,
    "double": lambda model: model.double(),
    "half_and_back": lambda model: model.half().float(),
    "device": lambda model: model.to("cpu"),
    "copied": copy.deepcopy,
    "assigned": lambda model: (
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
        model,
    )[1],
}


@pytest.mark.parametrize("event", EVENTS)
def test_it_still_holds(event):
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 5))
    hold_update(model[0], level=0.5, threshold=1.0)
    base = model[0].parametrizations.weight[0].base
    model = moved(EVENTS[event](model)[0])
    base = model.parametrizations.weight[0].base
    assert held_norm(model.weight, base) == pytest.approx(0.5, rel=2e-3)
    assert held_norm(model.parametrizations.weight.original, base) > 5


def test_another_shape_is_refused():
    linear = hold_update(nn.Linear(30, 40), threshold=1.0)
    linear.parametrizations.weight.original = nn.Parameter(torch.zeros(40, 29))
    with pytest.raises(
        InputError, match=r"hold_update: expected a whole weight of shape \(40, 30\)"
    ):
        linear(torch.zeros(1, 30))


def test_what_has_diverged_is_said():
    linear = moved(hold_update(nn.Linear(30, 40), threshold=1.0), by=torch.nan)
    with pytest.raises(
        InputError, match=r"hold_update: a weight of shape \(40, 30\): expected finite"
    ):
        linear(torch.zeros(1, 30))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_exceeds_by_rounding_alone(dtype):
    """By what the docstring says: half a unit of each entry."""
    linear = hold_update(nn.Linear(30, 40).to(dtype), level=0.5, threshold=0.05)
    base = linear.parametrizations.weight[0].base
    moved(linear)
    rounding = torch.finfo(dtype).eps / 2 * float(linear.weight.detach().double().norm())
    assert held_norm(linear.weight, base) <= 0.025 * (1 + 1e-3) + rounding


def test_a_weight_without_numbers_is_refused():
    with pytest.raises(InputError, match="weight: expected parameters in memory, got one on the"):
        hold_update(nn.Linear(30, 40, device="meta"), threshold=1.0)


# -- what is saved and loaded ---------------------------------------------------------------------


def test_a_state_has_plain_names_and_the_held_weight():
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 5))
    plain = {name: tensor.shape for name, tensor in model.state_dict().items()}
    hold_update(model[0], level=0.5, threshold=1.0)
    moved(model[0])
    state = model.state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == plain
    torch.testing.assert_close(state["0.weight"], model[0].weight.detach())
    fresh = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 5))
    fresh.load_state_dict(state)
    x = draw(3, 30).float()
    torch.testing.assert_close(fresh(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_is_taken_up_and_the_base_stays(assign):
    linear = nn.Linear(30, 40)
    base = linear.weight.detach().clone()
    hold_update(linear, level=0.5, threshold=1.0)
    saved = moved(linear).state_dict()
    again = nn.Linear(30, 40)
    again.load_state_dict({"weight": base, "bias": linear.bias.detach()})
    hold_update(again, level=0.5, threshold=1.0)
    assert again.load_state_dict(saved, assign=assign) == ([], [])
    torch.testing.assert_close(again.weight, linear.weight, rtol=0, atol=1e-5)
    assert torch.equal(again.parametrizations.weight[0].base, base)
    assert held_norm(moved(again).weight, base) == pytest.approx(0.5, rel=2e-3)


def test_states_of_before_are_still_read():
    """With the names of torch's own parametrizations."""
    linear = hold_update(nn.Linear(30, 40), level=0.5, threshold=1.0)
    own = {
        f"parametrizations.weight.{k}": v
        for k, v in linear.parametrizations.weight.state_dict().items()
    }
    own["parametrizations.weight.original"] = own["parametrizations.weight.original"] + 0.01
    linear.load_state_dict(own | {"bias": linear.bias.detach()})
    assert torch.equal(
        linear.parametrizations.weight.original.detach(), own["parametrizations.weight.original"]
    )


def test_once_removed_nothing_of_it_is_left():
    linear = moved(hold_update(nn.Linear(30, 40), level=0.5, threshold=1.0))
    held = linear.weight.detach().clone()
    parametrize.remove_parametrizations(linear, "weight")
    assert set(linear.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(linear.state_dict()["weight"], held)
    linear.load_state_dict({"weight": 2 * held, "bias": linear.bias.detach()})
    assert torch.equal(linear.weight, 2 * held)


def test_other_parametrizations_on_top_keep_their_names():
    linear = hold_update(nn.Linear(30, 40), level=0.5, threshold=1.0)
    parametrize.register_parametrization(linear, "weight", nn.Identity())
    assert "parametrizations.weight.original" in linear.state_dict()


def bert(**options):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 16, "num_labels": 3,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return transformers.BertConfig(**(settings | options))


def classifier():
    return transformers.BertForSequenceClassification(bert())


def hold_linear(model):
    held = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and min(module.weight.shape) >= 32:
            held[f"{name}.weight"] = module.weight.detach().clone()
            hold_update(module, level=0.5, threshold=0.2)
    return held


def train(folder, model, **options):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 60, (64, 8), generator=generator)
    data = [{"input_ids": row, "labels": int(row[0]) % 3} for row in tokens]
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.02,
        "report_to": "none", "save_strategy": "steps", "save_steps": 3, "disable_tqdm": True,
        "use_cpu": True, "logging_steps": 1, "lr_scheduler_type": "constant", "optim": "sgd",
    }  # fmt: skip
    resume = options.pop("resume", None)
    arguments = transformers.TrainingArguments(str(folder), **(settings | options))
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpoints_of_a_trainer_load_with_stock_transformers(tmp_path, caplog):
    model = classifier()
    bases = hold_linear(model)
    train(tmp_path, model, learning_rate=0.5)
    names = set(load_file(tmp_path / "checkpoint-6" / "model.safetensors"))
    assert names == set(classifier().state_dict()) - {"bert.embeddings.position_ids"}
    loaded, told = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "checkpoint-6", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    strongest = 0.0
    for name, base in some(bases.items()):
        norm = held_norm(loaded.get_parameter(name), base)
        assert norm <= 0.1 * (1 + 1e-3)
        strongest = max(strongest, norm)
    assert strongest > 0.09  # the training went as far as it may
    x = torch.arange(8)[None]
    torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_resumed_run_goes_on_from_what_was_saved(tmp_path):
    whole = classifier()
    hold_linear(whole)
    train(tmp_path, whole)
    again = classifier()
    bases = hold_linear(again)
    trainer = train(tmp_path, again, resume=tmp_path / "checkpoint-3")
    assert trainer.state.global_step == 6
    for (name, x), (_, y) in some(
        zip(whole.state_dict().items(), again.state_dict().items(), strict=True)
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-3, msg=name)
    for name, base in some(bases.items()):
        module = again.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(module.parametrizations.weight[0].base, base)


def tied():
    return transformers.BertForMaskedLM(bert(tie_word_embeddings=True))


@pytest.mark.parametrize("both", [True, False])
def test_a_tied_head(both, tmp_path):
    """What is loaded is held, in the head and in the table that it shares."""
    model = tied()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    base = head.weight.detach().clone()
    for module in (head, table) if both else (head,):
        hold_update(module, level=0.5, threshold=1.0)
    moved(head)
    if both:
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(table.weight, head.weight, rtol=0, atol=1e-3)
    else:
        with pytest.warns(UserWarning, match="shares its parameter .* not held itself"):
            model.save_pretrained(tmp_path)
    loaded, told = transformers.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    weight = loaded.get_output_embeddings().weight
    assert weight is loaded.get_input_embeddings().weight
    assert held_norm(weight, base) == pytest.approx(0.5, rel=3e-3)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [name for name in stored if "parametrizations" in name]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "BertForMaskedLM"
    ]


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_fully_sharded_it_holds_in_the_forward_pass_and_in_what_is_saved(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 5))
        base = model[0].weight.detach().clone()
        hold_update(model[0], level=0.5, threshold=1.0)
        moved(model[0])
        x = draw(3, 30).float()
        expected = model(x)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
        model.reshard()
        state = model.state_dict()
        assert set(state) == {"0.weight", "0.bias", "1.weight", "1.bias"}
        assert held_norm(state["0.weight"].full_tensor(), base) == pytest.approx(0.5, rel=2e-3)
        with pytest.raises(InputError, match=r"hold_update: expected a whole weight .* a part"):
            model[0].weight  # noqa: B018
    finally:
        dist.destroy_process_group()


def test_a_monitor_watches_what_is_held():
    """Not the trained weight, which is far outside."""
    model = nn.Sequential(nn.Linear(30, 40))
    hold_update(model[0], level=0.5, threshold=1.0)
    watched = full_matrices(model)
    assert [matrix.name for matrix in watched] == ["0.weight"]
    monitor = Monitor(watched, every=1, thresholds={"0.weight": 1.0})
    moved(model[0])
    monitor.step()
    assert monitor.figures["0.weight"].strongest == pytest.approx(0.5, rel=2e-3)


def test_a_parameter_that_is_held_already_is_refused():
    layer = nn.Linear(40, 50)
    hold_update(layer, threshold=1.0)
    with pytest.raises(InputError, match=r"does not hold yet, got 'weight' of ParametrizedLinear"):
        hold_update(layer, threshold=1.0)
    parametrize.remove_parametrizations(layer, "weight")
    hold_update(layer, threshold=1.0)
