"""Ways of training in which nothing could be held: refused by name when training begins."""

import json
import sys
import types

import pytest
import torch

from bulkedge import InputError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from bulkedge.tune.trainer import Hold, IntruderMonitor  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def model_of(cls=torch.nn.Sequential):
    torch.manual_seed(0)
    inner = cls(torch.nn.Linear(40, 50))
    return peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["0"]))


def begin(callback, model, optimizer, step=0):
    arguments = types.SimpleNamespace(process_index=0, output_dir=None)
    state = transformers.TrainerState(global_step=step)
    control = transformers.TrainerControl()
    callback.on_train_begin(arguments, state, control, model=model, optimizer=optimizer)


def deepspeed_class(name, module="deepspeed.runtime.zero.stage_1_and_2"):
    """A class where DeepSpeed has one of its own; Accelerate puts a wrapper around it."""
    return type(name, (), {"__module__": module})


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("DeepSpeedZeroOptimizer", "deepspeed.runtime.zero.stage_1_and_2"),
        ("DeepSpeedZeroOptimizer_Stage3", "deepspeed.runtime.zero.stage3"),
        ("BF16_Optimizer", "deepspeed.runtime.bf16_optimizer"),
    ],
)
def test_deepspeed_is_refused_by_name(name, module):
    """It steps float32 copies: what is written into the model's own parameters is overwritten."""
    wrapper = types.SimpleNamespace(optimizer=deepspeed_class(name, module)())
    with pytest.raises(InputError, match=rf"got DeepSpeed's {name}: it keeps float32 copies"):
        begin(Hold("leading"), model_of(), wrapper)


@pytest.mark.filterwarnings("ignore:IntruderMonitor was not called")
@pytest.mark.parametrize("make", [lambda: Hold("leading"), IntruderMonitor])
def test_zero_3_and_fsdp1_are_refused_by_name(make):
    model = model_of()
    next(iter(model.parameters())).ds_id = 0  # DeepSpeed numbers the parameters that it has cut
    with pytest.raises(InputError, match="got those of DeepSpeed's ZeRO-3; use FSDP2"):
        begin(make(), model, None)
    flat = type("FullyShardedDataParallel", (torch.nn.Sequential,), {})
    with pytest.raises(InputError, match="got the flat ones of FSDP1; set fsdp_version to 2"):
        begin(make(), flat(model_of()), None)


def test_weights_in_full_need_their_base_when_a_run_is_resumed():
    model = torch.nn.Sequential(torch.nn.Linear(40, 50))
    with pytest.raises(InputError, match=r"0.weight: expected the weight before training"):
        begin(Hold("edge"), model, None, step=3)
    hold = Hold("edge")
    begin(hold, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [matrix.name for matrix in hold.holder.matrices] == ["0.weight"]


@pytest.mark.parametrize("setting", ["thresholds", "full"])
@pytest.mark.parametrize("what", ["drift", lambda model: None])
def test_settings_of_spikes_are_of_no_use_to_others(what, setting):
    given = {setting: {"a": 1.0} if setting == "thresholds" else True}
    more = {"limit": 0.1, "moments": "file"} if what == "drift" else {}
    with pytest.raises(InputError, match=f"expected no {setting}= with"):
        Hold(what, **given, **more)


def test_a_run_that_is_resumed_does_not_measure_its_thresholds_again(monkeypatch):
    model = model_of()
    hold = Hold("leading", 0.5)
    begin(hold, model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    known = dict(hold.holder.thresholds)
    saved = json.loads(json.dumps(hold.state()))
    again, state = Hold("leading", 0.5), transformers.TrainerState(global_step=4)
    state.stateful_callbacks = {"Hold": saved}
    from bulkedge.tune import _thresholds

    monkeypatch.setattr(_thresholds, "base_spectrum", lambda *_: pytest.fail("measured again"))
    arguments = types.SimpleNamespace(process_index=0, output_dir=None)
    again.on_train_begin(arguments, state, transformers.TrainerControl(), model=model)
    assert again.holder.thresholds == known
    assert again.holder.strongest == hold.holder.strongest != {}


# -- axolotl and LLaMA-Factory: their documented interfaces ----------------------------------------


@pytest.fixture
def axolotl(monkeypatch):
    """The class of axolotl that a plugin derives from, with the hook that is used, as documented:
    ``add_callbacks_pre_trainer(cfg, model) -> list[TrainerCallback]``."""

    class BasePlugin:
        def get_input_args(self):
            return None

        def add_callbacks_pre_trainer(self, cfg, model):
            return []

    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    monkeypatch.delitem(sys.modules, "bulkedge.tune.axolotl", raising=False)
    yield BasePlugin
    sys.modules.pop("bulkedge.tune.axolotl", None)


def test_axolotl_takes_the_callbacks_from_its_configuration(axolotl):
    """``plugins: [bulkedge.tune.axolotl.BulkedgePlugin]``, and settings in ``bulkedge:``."""
    from bulkedge.tune.axolotl import BulkedgeArgs, BulkedgePlugin

    plugin = BulkedgePlugin()
    assert isinstance(plugin, axolotl)
    assert plugin.get_input_args() == "bulkedge.tune.axolotl.BulkedgeArgs"
    settings = {"hold": "edge", "limit": 0.5, "every": 20, "exclude": ["*gate*"]}
    BulkedgeArgs(bulkedge=settings)  # axolotl checks its configuration with this
    cfg = types.SimpleNamespace(bulkedge=settings)
    hold, monitor = plugin.add_callbacks_pre_trainer(cfg, model_of())
    assert (hold.what, hold.limit, hold.options["exclude"]) == ("edge", 0.5, ["*gate*"])
    assert (monitor.every, monitor.options["exclude"]) == (20, ["*gate*"])
    (alone,) = plugin.add_callbacks_pre_trainer(types.SimpleNamespace(bulkedge={"hold": None}), 0)
    assert isinstance(alone, IntruderMonitor)
    first, _ = plugin.add_callbacks_pre_trainer(types.SimpleNamespace(bulkedge=None), 0)
    assert first.what == "leading"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hodl": "edge"}, "bulkedge: expected settings of Hold or IntruderMonitor, got 'hodl'"),
        ({"hold": "egde"}, "did you mean 'edge'"),
        ({"every": 0}, "expected every ≥ 1"),
        ("edge", "expected settings by name in bulkedge:, got 'edge'"),
    ],
)
def test_what_axolotl_is_given_wrongly_is_refused(axolotl, settings, message):
    from bulkedge.tune.axolotl import BulkedgePlugin

    cfg = types.SimpleNamespace(bulkedge=settings)
    with pytest.raises(InputError) as caught:
        BulkedgePlugin().add_callbacks_pre_trainer(cfg, 0)
    assert message in str(caught.value)
