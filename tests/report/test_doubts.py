"""What casts doubt on a verdict is told by every view, the quiet one included."""

import io
import json
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

import bulkedge
from bulkedge import report
from bulkedge.auditing import Shard
from bulkedge.cli import cli
from bulkedge.report.advice import headline
from bulkedge.report.doubts import doubts, multiples, odd_sizes, oversized, settings_of
from cases import orthonormal
from helpers import save, save_adapter, some, weights

CLEAN, FINDINGS = 0, 1


def trained(m, n, seed):
    """A base that no law of noise describes."""
    values = torch.linspace(3, 0.2, min(m, n), dtype=torch.float64)
    U, V = orthonormal(m, min(m, n), seed), orthonormal(n, min(m, n), seed + 1)
    return (U * values @ V.mT).float()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    layers = {f"layers.{i}.up.weight": trained(40, 30, 7 * i) for i in range(4)}
    return save(tmp_path_factory.mktemp("base") / "base.safetensors", layers)


def tuned_of(base, place, **changed):
    """A weak fine-tune with other numbers in some layers."""
    layers = {n: W + 1e-3 * weights(*W.shape, seed=5) for n, W in load_file(base).items()}
    return save(place, layers | {f"layers.{i[1:]}.up.weight": W for i, W in changed.items()})


def quiet(record):
    told = io.StringIO()
    report.print_record(record, Console(file=told, width=160), brief=True)
    return told.getvalue()


def suite(record):
    return ElementTree.fromstring(report.to_junit(record).encode())  # noqa: S314 — our own


def results(record):
    return json.loads(report.render(record, "sarif"))["runs"][0]["results"]


def everywhere(record, text):
    """Assert that each view has a doubt, at the level of a warning."""
    assert f"doubt: {text}" in quiet(record).splitlines()
    messages = [x.get("message") for x in suite(record).findall("testcase/skipped")]
    assert f"doubt: {text}" in messages
    assert suite(record).get("skipped") == str(len(messages))
    levels = {r["message"]["text"]: r["level"] for r in results(record) if r["ruleId"] == "doubt"}
    assert levels[text] == "warning"
    for kind in ("markdown", "html"):
        shown = report.render(record, kind).replace("&lt;", "<").replace("\\_", "_")
        assert text.partition("‖")[0].strip() in shown


def test_an_honest_fine_tune_has_no_doubt(base, tmp_path):
    record = bulkedge.audit(base, tuned_of(base, tmp_path / "t.safetensors"))
    assert doubts(record) == {}
    assert settings_of(record) is None
    assert quiet(record) == report.verdict_line(record) + "\n"
    assert {row["ruleId"] for row in results(record)} <= {"rotated", "intruder"}


def test_another_base_than_the_adapter_names(base, tmp_path):
    factors = {
        "base_model.model.layers.0.up.lora_A.weight": 0.01 * weights(2, 30),
        "base_model.model.layers.0.up.lora_B.weight": 0.01 * weights(40, 2),
    }
    adapter = save_adapter(tmp_path / "a", factors, base_model_name_or_path="org/llama-7b")
    base = save(tmp_path / "gemma-2b/model.safetensors", load_file(base)).parent
    record = bulkedge.audit(base, adapter)
    everywhere(record, doubts(record)["adapter"])
    result = CliRunner().invoke(cli, ["audit", str(base), str(adapter), "-q"])
    assert "doubt: The adapter names org/llama-7b as its base" in result.stdout


def test_a_part_says_that_it_is_one(base, tmp_path):
    tuned = tuned_of(base, tmp_path / "t.safetensors")
    record = bulkedge.audit(base, tuned, shard=Shard(1, 2))
    everywhere(record, doubts(record)["part"])
    assert report.verdict_line(record).startswith("part 1 of 2: ")
    assert headline(record).startswith("Part 1 of 2: ")
    assert suite(record).get("name") == "bulkedge audit, part 1 of 2"
    assert "Nothing to take out" not in report.to_markdown(record)


@pytest.mark.parametrize(
    ("factor", "doubted"), [(-1, True), (50, True), (1e30, True), (2.1, True), (1.5, False)]
)
def test_a_wrong_scale_of_one_matrix(factor, doubted, base, tmp_path):
    W0 = load_file(base)["layers.2.up.weight"]
    tuned = tuned_of(base, tmp_path / "t.safetensors", _2=factor * W0)
    record = bulkedge.audit(base, tuned)
    row = next(m for m in record.matrices if m.name == "layers.2.up.weight")
    assert row.relative_update == pytest.approx(abs(factor - 1), rel=1e-4)
    assert record.summary.new_directions == 0  # scores do not see a scale
    assert (oversized(record) == [row]) is doubted
    if doubted:
        everywhere(record, doubts(record)["size"])
        told = io.StringIO()
        report.print_record(record, Console(file=told, width=160))
        assert "ΔW/W₀" in told.getvalue()
        assert "layers.2.up" in told.getvalue().splitlines()[1]


def test_the_size_of_an_update_is_that_of_full_matrices(base, tmp_path):
    tuned = tuned_of(base, tmp_path / "t.safetensors")
    factors = {
        "base_model.model.layers.1.up.lora_A.weight": weights(2, 30),
        "base_model.model.layers.1.up.lora_B.weight": weights(40, 2, seed=1),
    }
    adapter = save_adapter(tmp_path / "a", factors)
    W0, W = load_file(base), load_file(tuned)
    dense = {m.name: m.relative_update for m in bulkedge.audit(base, tuned).matrices}
    assert dense == pytest.approx({n: float((W[n] - W0[n]).norm() / W0[n].norm()) for n in W0})
    (row,) = bulkedge.audit(base, adapter).matrices
    update = 2 * weights(40, 2, seed=1) @ weights(2, 30)
    assert row.relative_update == pytest.approx(float(update.norm() / W0[row.name].norm()))


def test_a_base_of_zeros_has_no_relative_update(tmp_path):
    base = save(tmp_path / "b.safetensors", {"w.weight": torch.zeros(20, 16)})
    tuned = save(tmp_path / "t.safetensors", {"w.weight": weights(20, 16)})
    (row,) = bulkedge.audit(base, tuned).matrices
    assert row.relative_update is None


def test_a_base_of_noise_may_grow_tenfold(tmp_path):
    base, W = tmp_path / "b.safetensors", {f"{i}.weight": weights(60, 50, seed=i) for i in (1, 2)}
    save_file(W, base)
    for factor, doubted in ((3, False), (12, True)):
        tuned = save(tmp_path / f"{factor}.safetensors", W | {"1.weight": factor * W["1.weight"]})
        assert bool(oversized(bulkedge.audit(base, tuned))) is doubted


def test_settings_other_than_the_defaults(base, tmp_path):
    tuned = tuned_of(base, tmp_path / "t.safetensors")
    recipe = {"epsilon": 0.001, "exclude": ("layers.0.*",), "seed": 3}
    record = bulkedge.audit(base, tuned, recipe=recipe)
    told = "epsilon=0.001, exclude=layers.0.*"
    assert settings_of(record) == told
    assert f"settings: {told}" in quiet(record).splitlines()
    assert suite(record).find("properties/property").get("value") == told
    (row,) = [r for r in results(record) if r["ruleId"] == "settings"]
    assert (row["level"], row["message"]["text"]) == ("note", told)
    assert f"settings: {told}" in report.to_markdown(record).replace("\\", "")
    assert f"Settings: {told}." in report.to_html([record])


def test_a_settings_file_is_named_quietly(base, tmp_path, monkeypatch):
    spike = 9 * orthonormal(40, 1, 1) @ orthonormal(30, 1, 2).mT
    found = (load_file(base)["layers.1.up.weight"] + spike).float()
    tuned = tuned_of(base, tmp_path / "t.safetensors", _1=found)
    command = ["audit", str(base), str(tuned), "-q"]
    assert CliRunner().invoke(cli, command).exit_code == FINDINGS
    (tmp_path / "bulkedge.yaml").write_text("epsilon: 0.001\n")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == CLEAN
    assert f"settings of {tmp_path / 'bulkedge.yaml'}: epsilon" in result.stderr
    assert "settings: epsilon=0.001" in result.stdout


# ---- one matrix among many


def many(count=8, change=None, strength=1e-2):
    """A base of many layers, and a fine-tune of all of them with another first one."""
    layers = {f"layers.{i}.up.weight": trained(40, 30, 7 * i) for i in range(count)}
    tuned = {}
    for i, (name, W) in enumerate(layers.items()):
        tuned[name] = W + strength * W.norm() / W.numel() ** 0.5 * weights(40, 30, seed=i)
    if change is not None:
        tuned["layers.0.up.weight"] = change(tuned["layers.0.up.weight"])
    return layers, tuned


def half(W):
    return torch.cat([W[:20], torch.zeros_like(W[20:])])


DAMAGE = {
    "dead": (lambda W: 1e-3 * W, {"scaled"}),
    "halved": (lambda W: 0.5 * W, {"scaled"}),
    "1.9 times": (lambda W: 1.9 * W, {"scaled"}),
    "0.8 times": (lambda W: 0.8 * W, {"scaled"}),
    "half of it gone": (half, {"apart"}),
    "half of it doubled": (lambda W: W + half(W), {"apart"}),
    "columns that changed places": (lambda W: W.flip(1), {"size"}),
    "sound": (lambda W: W, set()),
    "1.05 times": (lambda W: 1.05 * W, set()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("side", ["left", "both"])
def test_damage_in_one_matrix_is_doubted(damage, side, tmp_path):
    change, expected = DAMAGE[damage]
    layers, tuned = many(change=change)
    base, tuned = save(tmp_path / "b.safetensors", layers), save(tmp_path / "t.safetensors", tuned)
    record = bulkedge.audit(base, tuned, recipe={"top_k": 4, "side": side})
    assert set(doubts(record)) == expected
    assert [m.name for m in odd_sizes(record)] == ["layers.0.up.weight"] * len(expected)
    if expected:
        (about,) = expected
        assert "layers.0.up.weight" in doubts(record)[about]
        everywhere(record, doubts(record)[about])
        told = io.StringIO()
        report.print_record(record, Console(file=told, width=160))
        assert "layers.0.up" in told.getvalue().splitlines()[1]  # a row of the table
    assert report.Gate(None, fail_on_doubt=True).exit_code(record) == bool(expected)


@pytest.mark.parametrize("method", ["certified", "dense"])
def test_a_multiple_is_one_by_any_method_and_in_any_base(method, tmp_path):
    layers = {"a.weight": trained(500, 400, 3), "b.weight": weights(500, 400)}
    base = save(tmp_path / "b.safetensors", layers)
    for factor in (0.3, 1.4):
        scaled = {name: factor * W for name, W in layers.items()}
        tuned = save(tmp_path / f"{factor}.safetensors", scaled)
        record = bulkedge.audit(base, tuned, recipe={"method": method, "top_k": 3})
        factors = {matrix.name: found for matrix, found in multiples(record)}
        assert factors == pytest.approx(dict.fromkeys(layers, factor), rel=1e-3)
        assert "and 1 other likewise" in doubts(record)["scaled"]


def test_strong_directions_are_no_multiple_and_stand_not_apart(shipped):
    for name in some(shipped):
        assert set(doubts(shipped[name])) == set()
        assert odd_sizes(shipped[name]) == oversized(shipped[name])


def test_few_matrices_are_not_compared(tmp_path):
    layers, tuned = many(count=5, change=half)
    base, tuned = save(tmp_path / "b.safetensors", layers), save(tmp_path / "t.safetensors", tuned)
    assert doubts(bulkedge.audit(base, tuned)) == {}
