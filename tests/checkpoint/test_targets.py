"""Which modules an adapter's configuration names: by PEFT's rules, and against its tensors."""

from types import SimpleNamespace

import pytest

import bulkedge
from bulkedge.checkpoint.targets import Targets
from bulkedge.report.doubts import doubts
from helpers import EXAMPLE, MINILM, save, save_adapter, some, weights

LAYERS = [f"model.layers.{i}.{m}" for i in range(3) for m in ("attn.q", "attn.k", "mlp.up")]
OTHERS = ["lm_head", "model.embed", "model.experts.0.layers.1.up", "h.1.attn.q", "score.dense"]
SETTINGS = [
    {"target_modules": ["q", "up"]},
    {"target_modules": ["attn.q", "lm_head"]},
    {"target_modules": ["model.layers.1.attn.k", "q"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q"], "layers_to_transform": 1},
    {"target_modules": ["q"], "layers_to_transform": []},
    {"target_modules": ["q", "up"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q", "up"], "layers_to_transform": [1], "layers_pattern": ["h", "blocks"]},
    {"target_modules": r".*\.layers\.[01]\.attn\.(q|k)"},
    {"target_modules": "attn.q"},
    {"target_modules": ["q", "k"], "exclude_modules": ["layers.1.attn.q"]},
    {"target_modules": ["q", "k"], "exclude_modules": r".*layers\.2.*"},
    {"target_modules": ["dense", "q"], "modules_to_save": ["score"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_names_are_those_of_peft(settings):
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    fields = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    config = SimpleNamespace(**dict.fromkeys(fields), target_parameters=None)
    vars(config).update(settings)
    expected = {m: bool(tuners.check_target_module_exists(config, m)) for m in LAYERS + OTHERS}
    found = {m: Targets(settings).names(m) for m in LAYERS + OTHERS}
    assert found == expected
    assert len(set(found.values())) == 2 or settings["target_modules"] == "attn.q"


@pytest.fixture
def base(tmp_path):
    tensors = {f"{name.removeprefix('model.')}.weight": weights(30, 20) for name in LAYERS}
    tensors |= {"norm.weight": weights(20), "experts.0.up.weight": weights(30, 20)}
    return save(tmp_path / "base.safetensors", tensors)


def adapter(folder, modules=LAYERS, **config):
    factors = {
        f"base_model.model.{m}.lora_{x}.weight": 0.01 * weights(*shape)
        for m in modules
        for x, shape in (("A", (2, 20)), ("B", (30, 2)))
    }
    return save_adapter(folder / "adapter", factors, **config)


def said(base, tuned):
    return doubts(bulkedge.audit(base, tuned, recipe={"top_k": 2})).get("modules", "")


ALL = ["q", "k", "up"]


@pytest.mark.parametrize(
    "config",
    [
        {}, {"target_modules": ALL}, {"target_modules": "all-linear"}, {"target_modules": None},
        {"target_modules": r"model\.layers\..*\.(q|k|up)"},
        {"target_modules": [*ALL, "not_of_this_model"]},
        {"target_modules": ALL, "layers_to_transform": [0, 1, 2]},
        {"target_modules": ALL, "rank_pattern": {"layers.0.attn.q": 2}, "alpha_pattern": {"k": 4}},
        {"target_modules": 3},
    ],
    ids=str,
)  # fmt: skip
def test_an_adapter_that_agrees_with_its_configuration(config, base, tmp_path):
    assert said(base, adapter(tmp_path, **config)) == ""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["q", "k"]}, "The adapter updates model.layers.0.mlp.up, model.l"),
        ({"target_modules": r".*\.layers\.[01]\..*"}, "The adapter updates model.layers.2.attn.k"),
        ({"target_modules": ALL, "layers_to_transform": [0, 2]},
         "The adapter updates model.layers.1.attn.k"),
        ({"target_modules": ALL, "exclude_modules": ["0.attn.q"]},
         "The adapter updates model.layers.0.attn.q, which"),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.2\.attn\.k"},
         "The adapter updates model.layers.2.attn.k, which"),
        ({"target_modules": ALL, "rank_pattern": {"atn.q": 4}}, "rank_pattern of"),
        ({"target_modules": ALL, "alpha_pattern": {"^layers.0.attn.q": 4}},
         "names ^layers.0.attn.q, which matches no module"),
        ({"target_modules": "(q"}, "cannot be matched ("),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_configuration_does_not_name(config, message, base, tmp_path):
    assert message in said(base, adapter(tmp_path, **config))


@pytest.mark.parametrize("targets", [ALL, r".*\.(q|k|up)"])
def test_what_the_file_does_not_hold(targets, base, tmp_path):
    some_ = [name for name in LAYERS if name != "model.layers.1.attn.k"]
    told = said(base, adapter(tmp_path, some_, target_modules=targets))
    assert "names model.layers.1.attn.k of the base, of which the adapter holds no update" in told
    record = bulkedge.audit(base, tmp_path / "adapter", recipe={"top_k": 2})
    assert record.inputs.tuned.disagreements == [told]
    assert bulkedge.Record.from_json(record.to_json()) == record


def test_a_pattern_that_takes_for_ever_is_stopped(base, tmp_path):
    long = "model.layers.0." + "a" * 60
    told = Targets({"target_modules": r"model.layers.0.(a|a|aa)+x"})
    (line,) = told.disagreements([long], [], [long])
    assert "target_modules of the adapter_config.json cannot be matched" in line


def test_the_adapters_of_the_example_agree():
    for name in some(["lora-r1", "lora-r8"]):
        record = bulkedge.audit(MINILM, EXAMPLE / name, recipe={"include": ["*layer.5*"]})
        assert doubts(record) == {}
