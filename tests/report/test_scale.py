"""How much weaker an update has to be: what the views say, and whether it is so."""

import io
import json
import re

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import bulkedge
from bulkedge import InputError, report
from bulkedge.cli import cli
from bulkedge.records.rows import CriticalScale, ScalePoint
from bulkedge.report import commands
from bulkedge.report.columns import CHOICES
from bulkedge.report.scale import MEASURE, weaker
from cases import orthonormal
from helpers import save, save_adapter, some

K, EPSILON = 4, 0.5
STRENGTHS = {"strong": 70.0, "stronger": 90.0, "weak": 10.0}


def noise(seed):
    return torch.randn(120, 90, generator=torch.Generator().manual_seed(seed)).double()


def trained(seed):
    """Noise under four outliers, as trained weights look."""
    u, v = orthonormal(120, K, seed), orthonormal(90, K, seed + 1)
    return noise(seed + 2) + (u * torch.linspace(60, 40, K).double()) @ v.mT


@pytest.fixture(scope="module")
def tensors():
    base = {name: trained(10 * i) for i, name in enumerate(STRENGTHS)}
    spike = orthonormal(120, 1, 91) @ orthonormal(90, 1, 92).mT
    update = {name: strength * spike for name, strength in STRENGTHS.items()}
    untrained = noise(77)
    return base | {"noise": untrained}, update | {"noise": 400 * spike}


@pytest.fixture(scope="module")
def paths(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    base, update = ({f"{name}.weight": W for name, W in t.items()} for t in tensors)
    tuned = {name: W + update[name] for name, W in base.items()}
    return save(folder / "b.safetensors", base), save(folder / "t.safetensors", tuned)


@pytest.fixture(scope="module")
def record(paths):
    return bulkedge.audit(*paths, recipe={"top_k": K, "epsilon": EPSILON})


def scores(base, update, scale):
    """The scores of the leading directions at a scale, by two float64 SVDs."""
    U = torch.linalg.svd(base.double(), full_matrices=False).U
    tuned = torch.linalg.svd((base + scale * update).double(), full_matrices=False).U
    return (U.mT @ tuned[:, :K]).abs().amax(0)


def printed(record, **options):
    stream = io.StringIO()
    report.print_record(record, Console(file=stream, width=200, color_system=None), **options)
    return stream.getvalue()


def measuring(record):
    """The command that measures, without the matrix that the advice leaves out."""
    return commands.audit_command(record, MEASURE, "--exclude", "noise")


def test_at_the_scale_that_is_told_nothing_is_new_and_well_above_it_is(record, tensors):
    base, update = tensors
    found = weaker(record)
    assert (found.matrix, found.known, found.above, found.untrained) == ("stronger", 2, 0, 1)
    for name in some(("strong", "stronger", "weak")):
        assert (scores(base[name], update[name], found.scale) >= EPSILON).all(), name
    assert (scores(base["stronger"], update["stronger"], 1.2 * found.scale) < EPSILON).any()


def test_terminal_markdown_and_page_tell_it_first(record):
    scale = f"{weaker(record).scale:.3f}"[:4]  # rounded down
    told = [
        f"{scale} of its strength may leave no new direction, a guess by its norm alone",
        "the limit is that of stronger, the lowest of 2 matrices with new directions; 1 matrix is "
        "left out, because its base looks untrained",
    ]
    step, command = "measure how much weaker it must be:", measuring(record)
    lines = printed(record).splitlines()
    at = lines.index(f"weaker: {told[0]}")
    expected = [*(f"weaker: {clause}" for clause in (*told, step)), f"  {command}"]
    assert lines[at : at + 4] == expected
    for line in some(expected):
        assert line not in printed(record, brief=True)
    markdown = report.to_markdown(record).split("\n\n")
    assert [*(line.replace("<", "&lt;") for line in expected[:3]), f"`{command}`"] == markdown[
        (at := markdown.index(expected[0])) : at + 4
    ]
    (shown,) = data_of(record)["records"]
    sentences = [f"{clause[0].upper()}{clause[1:]}." for clause in told]
    assert " ".join(sentences) in shown["explanation"]  # a paragraph of its own
    assert shown["copy"] == [[f"M{step[1:]}", command]]
    assert shown["weaker"][1:] == [f"≈ {scale}", "of its strength: a guess by its norm"]


def data_of(record, **options):
    page = report.render(record, "html", **options)
    return json.loads(re.search(r'id="data">(.*?)</script>', page)[1])


def altered(record, expected):
    """The same with other scales expected of the matrices that have new directions."""
    rows = [
        row.model_copy(update={"critical_scale": row.critical_scale.model_copy(
            update={"expected": expected[row.name]})})
        for row in record.matrices if row.name in expected
    ]  # fmt: skip
    return record.model_copy(update={"matrices": rows})


def test_where_the_expectation_is_wrong_it_says_so(record):
    one = altered(record, {"strong.weight": 1.25, "stronger.weight": 0.0996})
    wrong = (
        "the estimate is too high for 1 of 2 matrices with new directions, which may have to be "
        "weaker still"
    )
    measure = ["weaker: measure how much weaker it must be:"]
    measure.append(f"  {commands.audit_command(record, MEASURE)}")
    told = report.scale.scale_lines(one)
    assert told[0].startswith("weaker: 0.099 of its strength may leave no new direction, a guess")
    assert told[1].startswith("weaker: the limit is that of stronger, the lowest of 2")
    assert told[2:] == [f"weaker: {wrong}", *measure]
    assert report.scale.scale_sentences(one)[2] == f"T{wrong[1:]}."
    unknown = altered(record, {"strong.weight": 1.25})
    (line, *rest) = report.scale.scale_lines(unknown)
    assert line.startswith("weaker: by how much is NOT known: the estimate is too high")
    assert "for 1 of 1 matrix with" in line
    assert rest == measure
    (sentence,) = report.scale.scale_sentences(unknown)
    assert sentence.startswith("By how much is NOT known: the e")


def test_a_matrix_whose_new_direction_comes_and_goes_counts(record):
    """One has none now, as is expected, and is expected to have one at a lower strength."""
    weak = next(row for row in record.matrices if row.name == "weak.weight")
    assert not weak.new_directions

    def with_window(expected, at_one):
        points = [ScalePoint(scale=1.0, new=at_one, score=0.9)]
        scale = weak.critical_scale.model_copy(update={"expected": expected, "aligned": True})
        curve = weak.scale_curve.model_copy(update={"expected": points})
        changed = weak.model_copy(update={"critical_scale": scale, "scale_curve": curve})
        others = [row for row in record.matrices if row is not weak]
        return record.model_copy(update={"matrices": [*others, changed]})

    found = weaker(with_window(0.05, at_one=0))
    assert (found.matrix, found.scale, found.known, found.affected) == ("weak", 0.05, 3, 2)
    sentence = report.scale.scale_sentences(with_window(0.05, at_one=0))[1]
    assert "3 matrices with new directions, now or at a lower strength; 1 matrix is" in sentence
    wrong_already = weaker(with_window(0.05, at_one=1))
    assert wrong_already == weaker(record) == weaker(with_window(1.2, at_one=0))


def test_without_new_directions_nothing_has_to_be_weaker(record):
    clean = altered(record, {"weak.weight": 0.5})
    assert weaker(clean) is None
    assert report.scale.scale_lines(clean) == report.scale.scale_sentences(clean) == []


def test_each_matrix_has_its_scale_and_the_edge_is_a_column_of_choice(record):
    page = data_of(record)
    headings = [column["heading"] for column in page["columns"]]
    assert "ΔW/θ_k" in headings
    assert "critical scale" in headings
    assert "ΔW/θ_c" not in headings
    for row, matrix in some(zip(page["records"][0]["matrices"], record.matrices, strict=True)):
        norm = matrix.spectral_norm_update
        assert row["cells"]["over_top_k_threshold"][1] == f"{norm / matrix.top_k_threshold:.2f}"
        expected = matrix.critical_scale.expected
        assert row["cells"]["critical_scale"][1] == f"{expected:.2f}"
        assert row["cells"]["over_threshold"][1] == f"{norm / matrix.threshold:.2f}"
        assert row["over"] == pytest.approx(norm / matrix.top_k_threshold, rel=1e-4)
    chosen = ["over_threshold", "critical_scale"]
    assert "ΔW/θ_c" in [column["heading"] for column in data_of(record, columns=chosen)["columns"]]
    assert "| ΔW/θ_k | ΔW/θ_c |" in report.render(record, "markdown", columns=chosen)
    head = printed(record, columns=chosen).split("\n")[0].split()
    assert head == ["matrix", "ΔW/W₀", "ΔW/θ_k", "ΔW/θ_c", "scale", "rotated", "intruder", "worst"]
    head = report.render(record, "csv").splitlines()[0]
    assert '"over_top_k_threshold","over_threshold","critical_expected","critical_low"' in head


def test_columns_on_the_command_line(paths, record, tmp_path):
    (tmp_path / "record.json").write_text(record.to_json())
    runner = CliRunner()
    one, two = (tmp_path / f"{name}.md" for name in "ab")
    told = runner.invoke(
        cli, ["report", str(tmp_path), "-o", str(one), "--columns", "over_threshold, ratio"]
    )
    assert told.exit_code == 0, told.output
    assert "| matrix | ΔW/W₀ | ΔW/θ_k | ΔW/θ_c |" in one.read_text()
    audited = ["audit", *map(str, paths), "-k", "4", "--columns", "over_threshold"]
    ended = runner.invoke(cli, [*audited, "--report", str(two)])
    assert ended.exit_code == 1, ended.output
    assert "ΔW/θ_c" in ended.stdout.splitlines()[0]
    assert "ΔW/θ_c" in two.read_text()
    wrong = runner.invoke(cli, [*audited[:-1], "theta"])
    assert wrong.exit_code == 2
    assert "expected names of shape, ratio, over_threshold, critical_scale" in wrong.output


def test_a_column_that_there_is_not_is_named(record):
    assert "over_threshold" in CHOICES
    assert "threshold" not in CHOICES
    with pytest.raises(InputError, match=r"expected columns of shape, ratio.*got 'θ'"):
        report.render(record, "markdown", columns=["θ"])


def measured(record, ends):
    """The same with brackets that were measured, by two scales below each high end."""
    rows = []
    for row, (low, high) in zip(record.matrices, ends, strict=True):
        scales = {low / 2 or 0.005, low or 0.008, high or 2 * low}
        judged = [ScalePoint(scale=s, new=0, score=0.9) for s in sorted(scales)]
        scale = CriticalScale(expected=0.5, low=low, high=high)
        curve = row.scale_curve.model_copy(update={"judged": judged})
        rows.append(row.model_copy(update={"critical_scale": scale, "scale_curve": curve}))
    recipe = record.recipe.model_copy(update={"critical_scale": True})
    return record.model_copy(update={"matrices": rows, "recipe": recipe})


def test_what_was_measured_is_told_of_all_matrices(record):
    names = [row.name for row in record.matrices]
    assert names == ["noise.weight", "strong.weight", "stronger.weight", "weak.weight"]
    found = measured(record, [(0.01, 0.011), (0.5, 0.55), (0.4, 0.44), (0.257, None)])
    clauses = [
        "merge it at ≤ 0.25 of its strength to have no new direction (measured: none at any scale "
        "tried up to there)",
        "the limit is that of weak, the lowest of 3 matrices: 2 scales tried up to there; 1 matrix "
        "is left out, because its base looks untrained",
    ]
    copy = commands.command(
        record,
        "repair",
        ["--method", "rescale", "--uniform", "0.25", "--exclude", "noise", "-o", "weaker"],
    )
    assert report.scale.scale_lines(found) == [
        *(f"weaker: {clause}" for clause in clauses),
        "weaker: this writes the weaker copy, and audits it:",
        f"  {copy}",
    ]
    assert report.scale.scale_sentences(found) == [f"{c[0].upper()}{c[1:]}." for c in clauses]
    (shown,) = data_of(found)["records"]
    assert shown["copy"] == [["This writes the weaker copy, and audits it:", copy]]
    assert shown["weaker"][1] == "≤ 0.25"
    lines = printed(found).splitlines()
    assert lines[0].split()[3] == "scale"
    assert "0.4–0.44" in next(line for line in lines if line.startswith("stronger"))
    assert "| > 0.25 |" not in report.to_markdown(found)  # of what has no new direction
    assert shown["matrices"][3]["cells"]["critical_scale"] == [0.257, "> 0.257"]
    assert "--critical-scale" in commands.audit_command(found)
    lost = measured(record, [(0.01, 0.011), (0.5, 0.55), (0.0, 0.01), (0.25, None)])
    assert report.scale.scale_lines(lost) == [
        "weaker: by how much is NOT known: no scale was found at which nothing is new in stronger"
    ]


def test_a_copy_that_cannot_be_written_is_not_advised(record):
    found = measured(record, [(0.01, 0.011), (0.5, 0.55), (0.4, 0.44), (0.25, None)])
    rows = [row.model_copy(update={"read_only": "packed"}) for row in found.matrices]
    fixed = found.model_copy(update={"matrices": rows})
    assert len(report.scale.scale_lines(fixed)) == 2
    assert report.scale.scale_steps(fixed) == []
    tuned = found.inputs.tuned.model_copy(update={"kind": "lora"})  # no PEFT settings among files
    inputs = found.inputs.model_copy(update={"tuned": tuned})
    assert report.scale.scale_steps(found.model_copy(update={"inputs": inputs})) == []


def test_a_command_stays_in_one_piece_in_a_narrow_terminal(record):
    stream = io.StringIO()
    console = Console(file=stream, width=60, color_system=None, force_terminal=True)
    report.print_record(record, console)
    assert f"  {measuring(record)}" in stream.getvalue().splitlines()


def test_measures_that_do_not_saturate(tmp_path):
    base = trained(3)
    B = orthonormal(120, 3, 4) * torch.tensor([90.0, 60.0, 5.0]).double()
    A = orthonormal(90, 3, 5).mT.contiguous()
    paths = (
        save(tmp_path / "b.safetensors", {"l.weight": base}),
        save_adapter(tmp_path / "a", {"l.lora_B.weight": B, "l.lora_A.weight": A}, r=3,
                     lora_alpha=3),
    )  # fmt: skip
    audit = bulkedge.audit(*paths, recipe={"top_k": K})
    (row,) = audit.matrices
    U = torch.linalg.svd(base, full_matrices=False).U
    tuned = torch.linalg.svd(base + B @ A, full_matrices=False)
    new = (U.mT @ tuned.U[:, :K]).abs().amax(0) < EPSILON
    energy = tuned.S[:K].square()
    assert 0 < int(new.sum()) == row.new_directions < K
    assert row.energy_new == pytest.approx(float(energy[new].sum() / energy.sum()), rel=1e-6)
    assert (row.spikes, row.in_use, row.beyond_top_k_threshold) == (3, 2, 2)  # 25 of 11,725 is left
    gamma = torch.linalg.svdvals(B @ A)[:3]
    share = gamma / gamma.sum()
    assert row.effective_rank == pytest.approx(float((-share * share.log()).sum().exp()), rel=1e-6)
    assert row.stable_rank == pytest.approx(float((gamma / gamma[0]).square().sum()), rel=1e-6)
    chosen = ["energy_new", "in_use", "beyond_top_k_threshold", "effective_rank", "stable_rank"]
    table = report.render(audit, "markdown", columns=chosen).partition("| matrix ")[2]
    head, _, cells = table.splitlines()[:3]
    assert "| energy of new | rank in use | effective rank | stable rank | spikes > θ_k |" in head
    ranks = f"{row.effective_rank:.1f} | {row.stable_rank:.1f}"
    assert f"| {row.energy_new:.2f} | 2 | {ranks} | 2 |" in cells
