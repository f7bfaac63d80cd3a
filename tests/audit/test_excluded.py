"""To leave a tensor out accepts that it has changed, not that it is damaged."""

import pytest
import torch
from click.testing import CliRunner

import bulkedge
from bulkedge.cli import cli
from bulkedge.report import Gate, render
from bulkedge.report.doubts import doubts
from helpers import save, save_adapter, some, weights

CLEAN, FOUND = 0, 1
NAN, INF = float("nan"), float("inf")
Q, BIAS, NORM = "layers.0.q.weight", "layers.0.q.bias", "layers.0.norm.weight"
STACK, KERNEL = "layers.0.experts.down_proj", "conv.weight"
BASE = {
    Q: weights(12, 10),
    BIAS: weights(12, seed=1),
    NORM: torch.ones(10),
    "layers.1.q.weight": weights(12, 10, seed=2),
    STACK: weights(3, 10, 12, seed=3),
    KERNEL: weights(6, 2, 3, 3, seed=4),
}
LEFT_OUT = [Q, BIAS, NORM, STACK, KERNEL]
GLOBS = ["*.bias", "*norm*", "layers.0.q", "*experts*", "conv"]


def spoilt(tensor, *values):
    tensor = tensor.clone()
    tensor.view(-1)[-len(values) :] = torch.tensor(values)
    return tensor


def audited(tmp_path, changed, base=BASE, prefix="", **recipe):
    tuned = {name: W.to(torch.bfloat16) for name, W in (BASE | changed).items()}
    tuned["layers.1.q.weight"] = 1.01 * BASE["layers.1.q.weight"]
    return bulkedge.audit(
        save(tmp_path / "base.safetensors", base),
        save(tmp_path / "tuned.safetensors", {prefix + n: W for n, W in tuned.items()}),
        recipe={"top_k": 2} | (recipe or {"exclude": GLOBS}),
    )


def named(record, key):
    """The doubt of a kind, once every view was seen to have it."""
    told = doubts(record)[key]
    assert Gate(fail_on=None, fail_on_doubt=True).exit_code(record) == FOUND
    assert Gate(fail_on=None).exit_code(record) == CLEAN
    assert bulkedge.Record.from_json(record.to_json()) == record
    for kind in some(("junit", "sarif", "markdown", "html")):
        assert told in render(record, kind).replace("\\_", "_")
    return told


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", LEFT_OUT)
@pytest.mark.parametrize(
    ("values", "count"), [((NAN,), "1 NaN and 0 Inf"), ((INF, -INF, NAN), "1 NaN and 2 Inf")]
)
def test_numbers_that_are_lost_are_a_doubt(values, count, name, prefix, tmp_path):
    record = audited(tmp_path, {name: spoilt(BASE[name], *values)}, prefix=prefix)
    assert named(record, "damaged").startswith(f"{prefix}{name} is left out, but holds {count} ")
    assert [row.name for row in record.skipped if row.not_finite] == [prefix + name]
    assert set(doubts(record)) == {"damaged"}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_zeros_alone_are_a_doubt(name, tmp_path):
    record = audited(tmp_path, {name: torch.zeros_like(BASE[name])})
    assert named(record, "vectors").startswith(f"{name} of the fine-tune is all zeros")
    assert set(doubts(record)) == {"vectors"}


def test_what_is_not_included_is_looked_at_too(tmp_path):
    record = audited(tmp_path, {BIAS: spoilt(BASE[BIAS], NAN)}, include=["layers.1.*"])
    assert named(record, "damaged").startswith(BIAS)
    record = audited(tmp_path, {STACK: 0 * BASE[STACK]}, include=["layers.1.*"])
    assert named(record, "vectors").startswith(STACK)


def test_what_the_base_has_alike_is_none(tmp_path):
    base = {name: spoilt(W, -INF) for name, W in BASE.items()}
    base |= {NORM: torch.zeros(10), "layers.1.q.weight": BASE["layers.1.q.weight"]}
    changed = {name: base[name] for name in LEFT_OUT}
    record = audited(tmp_path, changed, base=base)
    assert doubts(record) == {}
    assert doubts(audited(tmp_path, {})) == {}
    worse = changed | {BIAS: spoilt(base[BIAS], NAN, -INF)}
    assert "1 NaN and 0 Inf" in named(audited(tmp_path, worse, base=base), "damaged")


def test_a_new_head_of_another_size_has_no_base_to_excuse_it(tmp_path):
    base = BASE | {"score.bias": weights(3), "score.weight": weights(3, 10)}
    head = {"score.bias": spoilt(weights(2), NAN), "score.weight": weights(2, 10)}
    record = audited(tmp_path, head, base=base, exclude=["score.*"])
    assert named(record, "damaged").startswith("score.bias is left out, but holds 1 NaN")


@pytest.mark.parametrize("part", ["lora_B", "norm", "lora_bias"])
def test_parts_of_an_adapter_that_are_left_out(part, tmp_path):
    stem = "base_model.model.layers."
    tensors = {f"{stem}{i}.q.lora_{x}.weight": 0.01 * W for i in (0, 1)
               for x, W in {"A": weights(2, 10), "B": weights(12, 2)}.items()}  # fmt: skip
    tensors |= {f"{stem}0.norm.weight": torch.ones(10), f"{stem}0.q.lora_B.bias": torch.zeros(12)}
    name = {"lora_B": "0.q.lora_B.weight", "norm": "0.norm.weight", "lora_bias": "0.q.lora_B.bias"}
    name = stem + name[part]
    base = save(tmp_path / "base.safetensors", BASE)
    for changed, expected in ((tensors[name], set()), (spoilt(tensors[name], NAN), {"damaged"})):
        adapter = save_adapter(
            tmp_path / str(len(expected)), tensors | {name: changed}, lora_bias=True,
            modules_to_save=["norm"],
        )  # fmt: skip
        recipe = {"exclude": ["layers.0.*", "*layers.0.q.lora_B.bias"]}
        record = bulkedge.audit(base, adapter, recipe=recipe)
        assert set(doubts(record)) == expected
    assert named(record, "damaged").startswith(f"{name} is left out")


def test_the_quiet_command_names_it(tmp_path):
    audited(tmp_path, {BIAS: spoilt(BASE[BIAS], NAN)})
    files = [str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")]
    globs = [word for glob in GLOBS for word in ("--exclude", glob)]
    ended = CliRunner().invoke(cli, ["audit", *files, "-q", *globs, "--fail-on", "never"])
    assert ended.exit_code == CLEAN
    assert f"doubt: {BIAS} is left out, but holds 1 NaN and 0 Inf" in ended.stdout
    command = ["audit", *files, "-q", *globs, "--fail-on", "never", "--fail-on-doubt"]
    ended = CliRunner().invoke(cli, command)
    assert ended.exit_code == FOUND
    assert f"{BIAS} is left out, but holds 1 NaN and 0 Inf" in ended.stderr
