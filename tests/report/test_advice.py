"""What a record advises: commands that a shell takes and that mean the audit it came from."""

import shlex

import pytest
import torch

import bulkedge
from bulkedge.cli import audit as audit_cli
from bulkedge.cli import repair as repair_cli
from bulkedge.cli._output import recipe_of
from bulkedge.intruder import Verdict
from bulkedge.records.summary import DriftSummary
from bulkedge.report.advice import explanation, headline, steps
from bulkedge.report.certainty import certainty_lines, undecided_lines
from bulkedge.report.commands import audit_command, is_relative, repair_command
from cases import orthonormal
from helpers import EXAMPLE, MINILM, save, weights

LAYER = ["encoder.layer.5.*", "pooler.*"]


@pytest.fixture(scope="module")
def real():
    return bulkedge.audit(MINILM, EXAMPLE / "lora-r8", recipe={"include": LAYER})


def noise(seed):
    return weights(80, 60, seed=seed, dtype=torch.float64)


def structured(seed):
    """A base with directions of its own: no noise."""
    values = torch.linspace(40, 20, 12, dtype=torch.float64)
    return noise(seed) + orthonormal(80, 12, seed) * values @ orthonormal(60, 12, seed + 1).mT


def made(folder, change, count=4, base=structured):
    tensors = {f"layer.{i}.w.weight": base(i) for i in range(count)}
    tuned = {name: change(W, i) for i, (name, W) in enumerate(tensors.items())}
    return bulkedge.audit(
        save(folder / "b.safetensors", tensors), save(folder / "t.safetensors", tuned)
    )


def spiked(W, i):
    strength = 60 if i == 0 else 0.01
    return W + strength * orthonormal(80, 1, 50) @ orthonormal(60, 1, 51).mT


def texts(record):
    return " ".join(step.text for step in steps(record))


def settings_of(command, line):
    words = shlex.split(line)
    assert words[0] == "bulkedge"
    return command.make_context(words[1], words[2:]).params


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 3, "epsilon": 0.4, "side": "both", "seed": 7},
        {"include": ["encoder.layer.5.*"], "exclude": ["*.key", "*query*"]},
        {"method": "dense", "include": ["pooler.*"]},
    ],
)
def test_a_command_means_the_audit_that_it_came_from(real, settings):
    recipe = bulkedge.Recipe(**settings)
    record = real.model_copy(update={"recipe": recipe})
    parsed = settings_of(audit_cli, audit_command(record))
    assert recipe_of(parsed) == recipe
    assert (str(parsed["base"]), *map(str, parsed["tuned"])) == (
        str(MINILM),
        str(EXAMPLE / "lora-r8"),
    )
    parsed = settings_of(repair_cli, repair_command(record))
    parsed.pop("method")  # of a repair, another thing
    assert recipe_of(parsed) == recipe.model_copy(update={"method": "auto"})
    assert str(parsed["output"]) == "repaired"


def test_names_with_spaces_and_quotes_are_quoted(real):
    source = real.inputs.tuned.model_copy(update={"path": "my 'models'/$(rm -rf x); lora"})
    record = real.model_copy(update={"inputs": real.inputs.model_copy(update={"tuned": source})})
    assert is_relative(record)
    (tuned,) = settings_of(audit_cli, audit_command(record))["tuned"]
    assert str(tuned) == source.path


def test_a_base_that_is_noise_is_told_apart(real):
    affected = [m for m in real.matrices if m.new_directions]
    pooler = next(m for m in affected if m.name.startswith("pooler"))
    assert (
        f"{pooler.new_directions} of the new ones are in matrices whose base looks untrained"
        in " ".join(explanation(real))
    )
    told = steps(real)
    assert told[0].text.startswith("pooler.dense: the base looks like noise")
    assert told[0].command.endswith("--exclude pooler.dense")
    assert told[0].brief.startswith("leave out pooler.dense, whose base looks untrained")
    assert told[1].command == f"bulkedge moments {MINILM} keep.txt -o base.moments"
    assert "--exclude pooler.dense -o repaired" in told[2].command
    assert [step.command.split()[1] for step in told[1:4]] == ["moments", "repair", "report"]
    assert "SpikeClip(model).attach(optimizer)" in {step.command for step in told}


def test_a_finding_in_a_trained_matrix(tmp_path):
    record = made(tmp_path, spiked)
    assert headline(record) == "1 new direction in 1 of 4 matrices"
    assert "Every verdict is certain: two float64 SVDs decided it" in " ".join(explanation(record))
    told = steps(record)
    assert told[0].text.startswith("New directions do not show what a model has forgotten")
    assert told[0].command is None  # moments are of a model, and this base is a file
    assert [step.command.split()[1] for step in told[1:]] == ["repair", "report"]


def fixed(record, *numbers):
    """The record with some matrices that a repair cannot write."""
    rows = [
        m.model_copy(update={"read_only": "of a form; merge it"}) if i in numbers else m
        for i, m in enumerate(record.matrices)
    ]
    return record.model_copy(update={"matrices": rows})


def everywhere(W, i):
    return W + 60 * orthonormal(80, 1, 50) @ orthonormal(60, 1, 51).mT


def test_no_repair_is_advised_where_no_copy_can_be_written(tmp_path):
    record = made(tmp_path, everywhere)
    told = steps(fixed(record, 0, 1, 2, 3))
    assert not any(step.command for step in told)
    assert "--method protect" not in " ".join(step.text for step in told)
    (step,) = (step for step in told if step.brief)
    assert step.brief == "a repair writes no copy: layer.0.w.weight: of a form; merge it"
    some_ = steps(fixed(record, 1))
    (step,) = (s for s in some_ if s.command and "bulkedge repair" in s.command)
    assert "layer.1.w.weight: of a form; merge it: the repair refuses 1 of 4 matrices." in step.text
    assert step.brief.endswith("it refuses 1 of 4 matrices, which cannot be written")


def test_drift_is_not_lowered_where_no_copy_can_be_written(tmp_path):
    record = made(tmp_path, everywhere)
    source = record.inputs.base.model_copy(update={"path": "base.moments"})
    inputs = record.inputs.model_copy(update={"moments": source})
    drift = DriftSummary(measured=4, unknown=0, mean=0.5, of_sums=0.5, along_new=0.1, vectors=0)
    summary = record.summary.model_copy(update={"drift": drift})
    record = record.model_copy(update={"inputs": inputs, "summary": summary})
    assert any("--method protect" in (s.command or "") for s in steps(record))
    told = [s.text for s in steps(fixed(record, 0, 1, 2, 3)) if s.brief]
    assert len(told) == 1
    assert told[0].startswith("A repair cannot write a copy. layer.0.w.weight: of a form")


def test_nothing_found(tmp_path):
    record = made(tmp_path, lambda W, i: 1.01 * W)
    assert headline(record) == "No new direction in 4 matrices"
    (step,) = steps(record)
    assert step.text.startswith("Nothing to take out")


def test_scores_near_the_limit_are_told(tmp_path):
    record = made(tmp_path, spiked)
    worst = min(d.score for d in record.matrices[1].directions)
    near = record.model_copy(
        update={"recipe": record.recipe.model_copy(update={"epsilon": worst - 0.01})}
    )
    assert "less than 0.05 above the limit" in " ".join(explanation(near))
    assert "above the limit" not in " ".join(explanation(record))


def test_a_base_that_may_be_the_wrong_one(tmp_path):
    record = made(tmp_path, lambda W, i: structured(100 + i))
    assert "is this the model that the fine-tune began with?" in texts(record)
    (tmp_path / "noise").mkdir()
    record = made(tmp_path / "noise", spiked, base=noise)
    assert "is this the pretrained model?" in texts(record)
    assert not any(step.command for step in steps(record))


def test_what_could_not_be_judged_comes_first(tmp_path):
    def damaged(W, i):
        return torch.full_like(W, float("nan")) if i == 1 else spiked(W, i)

    record = made(tmp_path, damaged)
    assert headline(record) == "1 new direction in 1 of 3 matrices; 1 matrix could not be judged"
    first = steps(record)[0]
    assert "layer.1.w.weight" in first.text
    assert "save the model again" in first.text


def test_undecided_directions_are_decided_by_svds(tmp_path):
    record = made(tmp_path, spiked)
    verdicts = record.summary.verdicts | {Verdict.UNDECIDED: 2}
    summary = record.summary.model_copy(update={"verdicts": verdicts})
    (step, *_) = steps(record.model_copy(update={"summary": summary}))
    assert step.command.endswith("--method dense")


def test_equal_models(tmp_path):
    paths = [save(tmp_path / f"{x}.safetensors", {"w": weights(9, 8)}) for x in "ab"]
    assert headline(bulkedge.audit(*paths)).startswith("Nothing was changed")


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        (("certified", "certified"), "Every verdict is proved from products with the matrices"),
        (("dense", "dense"), "Every verdict is certain: two float64 SVDs decided it"),
        (("certified", "dense"), "Every verdict is certain: 1 is proved from products"),
    ],
)
def test_how_sure_the_verdicts_are(tmp_path, methods, says):
    record = made(tmp_path, spiked)
    rows = record.matrices[0].directions[:2]
    rows = [row.model_copy(update={"method": m}) for row, m in zip(rows, methods, strict=True)]
    matrix = record.matrices[0].model_copy(update={"directions": rows})
    record = record.model_copy(update={"matrices": [matrix]})
    assert says in explanation(record)[-1]
    open_ = [rows[0].model_copy(update={"verdict": Verdict.UNDECIDED}), rows[1]]
    matrix = matrix.model_copy(update={"directions": open_})
    assert explanation(record.model_copy(update={"matrices": [matrix]}))[-1].startswith(
        "1 verdict is undecided. Each of the others is"
    )


def test_a_terminal_says_what_is_open(tmp_path):
    record = made(tmp_path, spiked)
    assert certainty_lines(record)[0].startswith("certainty: every verdict is ")
    row = record.matrices[0].directions[0]
    ends = [(0.45, 0.55, 0.1, 0.9), (0.2, 0.3, 0.7, 0.72)] * 2
    keys = ("score_lower", "score_upper", "overlap_lower", "overlap_upper")
    rows = [
        row.model_copy(update={"verdict": Verdict.UNDECIDED, **dict(zip(keys, x, strict=True))})
        for x in ends
    ]
    matrix = record.matrices[0].model_copy(update={"directions": rows})
    open_ = record.model_copy(update={"matrices": [matrix]})
    (first,), (score, overlap, _, rest) = certainty_lines(open_), undecided_lines(open_)
    assert first == "certainty: 4 verdicts are undecided"
    assert score.endswith(
        "may be new or not: its score is between 0.45 and 0.55, and the limit is 0.5"
    )
    assert "direction 0: new, with a score of at most 0.3, but rotated or intruder is" in overlap
    assert "between 0.49 and 0.518 of its squared length" in overlap
    assert overlap.endswith("and the limit is 0.5")
    assert rest == "undecided: 1 more direction; the record has the intervals"
    empty = record.summary.model_copy(update={"verdicts": dict.fromkeys(Verdict, 0)})
    assert certainty_lines(record.model_copy(update={"summary": empty})) == []
