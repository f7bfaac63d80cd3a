"""Patterns written by strangers: PEFT's answer, or an error in bounded time."""

import json
import re
import time
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from bulkedge import AdapterError, Recipe, audit
from bulkedge.checkpoint import patterns
from bulkedge.checkpoint.patterns import Patterns
from bulkedge.comparison import make_plan
from helpers import save, save_adapter, weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

PATH = "model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", "proj", "self_attn.q_proj", r".*\.q_proj", "(q|k)_proj", "layers.1", PATH, "", "q_"],
)
def test_the_answer_of_peft(pattern):
    expected = re.match(rf"(.*\.)?({pattern})$", PATH) is not None  # peft.utils.other
    assert Patterns({pattern: 3}, "x").value(PATH, 8) == (3 if expected else 8)


WORDS = st.text(alphabet="ab.^\\-_1", max_size=6)


@given(found=st.lists(WORDS, max_size=6, unique=True), path=st.text("ab.-_1\n", max_size=8))
def test_plain_names_are_matched_as_expressions(found, path):
    """The first that matches, as Python's engine says, and whether another one disagrees."""
    kept = []
    for pattern in found:
        try:
            re.compile(f"(.*\\.)?({pattern})$")
        except re.error:
            continue
        kept.append(pattern)
    matching = [i for i, p in enumerate(kept) if re.match(rf"(.*\.)?({p})$", path)]
    table = Patterns({p: i for i, p in enumerate(kept)}, "x")
    assert table.value(path, -1) == (matching[0] if matching else -1)
    assert (table.conflict(path) is not None) == (len(matching) > 1)


def test_the_first_pattern_counts():
    assert Patterns({"k_proj": 1, "q_proj": 2, ".*": 3}, "x").value(PATH, 8) == 2


BAD = {
    "open": ("(", "missing \\)"),
    "deep": ("(" * 400 + "a" + ")" * 400, "recursion"),
    "long": ("a|" * 1000, "longer than 1000 characters"),
    "backtracking": ("(a|a|aa)+x", "timed out"),
    "recursive": ("(?R)", "timed out"),
    "huge_count": ("a{99999999999999999999}", "repeat count too big"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_patterns_are_errors_that_quote_them_shortly(case):
    pattern, message = BAD[case]
    found = Patterns({pattern: 2}, "adapter_config.json: rank_pattern")
    with pytest.raises(AdapterError, match=f"(?i)cannot be matched .*{message}") as caught:
        found.value("a" * 300, 8)
    assert str(caught.value).startswith("adapter_config.json: rank_pattern: pattern")
    assert len(str(caught.value)) < 300


def test_many_slow_matches_are_stopped_together(monkeypatch):
    """Each within its own time, a thousand modules would take half a minute."""
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 5.0)
    monkeypatch.setattr(patterns, "ALL_SECONDS", 0.5)
    found = Patterns({"(a|a|aa)+x": 2}, "x")
    clock = time.monotonic()
    with pytest.raises(AdapterError, match=r"regex timed out|all of them took too long"):  # noqa: PT012
        for i in range(1000):
            found.value("a" * 20 + str(i % 10), 8)
    assert time.monotonic() - clock < 5


# ---- very many patterns

MODULES = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(250) for n in "qkvo"]
PLAIN = {
    "paths": [f"model.layers.{i}.mlp.w{j}" for i in range(1000) for j in range(100)],
    "escaped": [rf"^model\.layers\.{i}\.mlp\.w{j}" for i in range(1000) for j in range(100)],
    "dots": ["." * (i % 60) + "x" + "." * (i // 60 % 60) + f"{i:x}" for i in range(100_000)],
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_hundred_thousand_names_for_a_thousand_modules(kind):
    names = [*PLAIN[kind], MODULES[7], "v_proj"]
    table = Patterns(dict.fromkeys(names, 2), "x")
    clock = time.monotonic()
    found = [table.value(module, 8) for module in MODULES]
    assert time.monotonic() - clock < patterns.ALL_SECONDS
    if kind != "dots":
        expected = [2 if m == MODULES[7] or m.endswith("v_proj") else 8 for m in MODULES]
        assert found == expected


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_a_hundred_thousand_expressions_end_in_time(field, tmp_path, monkeypatch):
    """One call tries them all: the time left is looked at within it."""
    monkeypatch.setattr(patterns, "ALL_SECONDS", 1.0)
    base = save(tmp_path / "base.safetensors", {"q.weight": weights(4, 4)})
    factors = {"q.lora_A.weight": weights(2, 4), "q.lora_B.weight": weights(4, 2)}
    given_ = {f"(x|y{i})[ab]*": 2 for i in range(100_000)}
    adapter = save_adapter(tmp_path / "a", factors, **{field: given_})
    clock = time.monotonic()
    with pytest.raises(AdapterError, match=f"{field}: pattern .* .all of them took too long"):
        make_plan(base, adapter, Recipe())
    assert time.monotonic() - clock < 8


# ---- two patterns of one module


def test_peft_takes_another_pattern_once_it_has_saved(tmp_path):
    """What the note says: PEFT sorts the patterns, so what it loads is not what it trained."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    save(tmp_path / "base.safetensors", {"0.weight": model[0].weight.detach()})
    given_ = {"[0]": 40, "0": 4}
    config = peft.LoraConfig(r=2, target_modules=["0"], alpha_pattern=given_, use_rslora=False)
    config.init_lora_weights = False
    tuned = peft.get_peft_model(model, config)
    trained = tuned.base_model.model[0].scaling["default"]
    tuned.save_pretrained(tmp_path / "a")
    again = peft.PeftModel.from_pretrained(
        torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False)), tmp_path / "a"
    )
    loaded = again.base_model.model[0].scaling["default"]
    assert (trained, loaded) == (20, 2)
    (matrix,) = audit(tmp_path / "base.safetensors", tmp_path / "a", recipe={"top_k": 2}).matrices
    assert matrix.scale == loaded
    assert "alpha_pattern: '0' says 4 and '[0]' says 40; the first in the file" in matrix.note


CASES = {
    "alpha": ({"alpha_pattern": {"q": 8, ".*": 2}}, "alpha_pattern: 'q' says 8 and '.*' says 2"),
    "rank": (
        {"rank_pattern": {"q": 2, "^l.experts.q": 3}},
        "rank_pattern: 'q' says 2 and '^l.experts.q' says 3",
    ),
    "same value": ({"alpha_pattern": {"q": 8, ".*": 8}}, None),
    "another module": ({"alpha_pattern": {"q": 8, "k": 2}}, None),
    "one that agrees between": (
        {"alpha_pattern": {"q": 8, ".*": 8, r"experts\.q": 2}},
        r"'q' says 8 and 'experts\\.q' says 2",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["layer", "experts", "dora", "diffusers"])
def test_two_patterns_with_different_values_are_noted(case, kind, tmp_path):
    fields, expected = CASES[case]
    A, B = weights(2, 4, seed=1), weights(4, 2, seed=2)
    base = {"l.experts.q.weight": weights(4, 4)}
    factors = {"l.experts.q.lora_A.weight": A, "l.experts.q.lora_B.weight": B}
    if kind == "experts":
        base = {"l.experts.q": weights(2, 4, 4)}
        factors = {
            "l.experts.lora_A.weight": weights(4, 4),
            "l.experts.lora_B.weight": weights(4, 4),
        }
        fields = fields | {"target_parameters": ["experts.q"]}
    if kind == "dora":
        factors["l.experts.q.lora_magnitude_vector"] = weights(4).abs()
        fields = fields | {"use_dora": True}
    if kind == "diffusers":
        told = {"unet.r": 2, "unet.lora_alpha": 4} | {f"unet.{k}": v for k, v in fields.items()}
        tuned = tmp_path / "lora.safetensors"
        metadata = {"lora_adapter_metadata": json.dumps(told)}
        save_file({f"unet.{k}": v for k, v in factors.items()}, tuned, metadata=metadata)
    else:
        tuned = save_adapter(tmp_path / "a", factors, **fields)
    plan = make_plan(save(tmp_path / "base.safetensors", base), tuned, Recipe())
    assert plan.skipped == ()
    notes = {comparison.note or "" for comparison in plan.comparisons}
    assert [expected is not None and expected in note for note in notes] == [expected is not None]
    assert all(("DoRA" in note) == (kind == "dora") for note in notes)


def test_patterns_that_took_all_their_time_are_not_tried_again(monkeypatch):
    monkeypatch.setattr(patterns, "ALL_SECONDS", 0.0)
    with pytest.raises(AdapterError, match="all of them took too long"):
        Patterns({"a+": 2}, "x").value("aa", 8)
