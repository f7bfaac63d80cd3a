"""Every gate, in every output: what fails a build is said, and by how much, wherever one looks."""

import json
import re
from itertools import product
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

import bulkedge
from bulkedge import InputError, RecipeError
from bulkedge.cli import cli
from bulkedge.intruder import Verdict
from bulkedge.moments import Moments
from bulkedge.report import Gate, failure_lines, render
from cases import orthonormal
from helpers import save, save_adapter, some, weights

FOUND, UNKNOWN = 1, 2
KINDS = {"markdown": "md", "junit": "xml", "sarif": "sarif", "html": "html"}


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, its moments, and fine-tunes of which each fails one gate, or none."""
    folder = tmp_path_factory.mktemp("gates")
    model = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 44))
    values = torch.linspace(3, 0.5, 40, dtype=torch.float64)
    for i, (m, n) in ((0, (40, 48)), (2, (44, 40))):
        W = orthonormal(m, 40, i) * values @ orthonormal(n, 40, i + 1).mT
        model[i].weight.data = W.float()
    state = dict(model.state_dict()) | {"norm.weight": torch.ones(44)}
    save(folder / "base.safetensors", state)
    with Moments(model) as moments, torch.no_grad():
        model(weights(300, 48))
    moments.save(folder / "base.moments")
    W = state["0.weight"]
    nan = W.clone()
    nan[0, 0] = float("nan")
    spike = 9 * orthonormal(40, 1, 7) @ orthonormal(48, 1, 8).mT
    for name, changed in {
        "clean": {"0.weight": W + 1e-4 * weights(40, 48)},
        "new": {"0.weight": (W + spike).float()},
        "moved": {"0.weight": 1.2 * W, "2.weight": 1.01 * state["2.weight"]},
        "large": {"0.weight": -W},
        "nan": {"0.weight": nan},
        "biased": {"0.weight": 1.01 * W, "2.bias": state["2.bias"] + 1},
        "normed": {"0.weight": 1.01 * W, "norm.weight": 2 * state["norm.weight"]},
        "same": {},
    }.items():
        save(folder / f"{name}.safetensors", state | changed)
    return folder


# fine-tune, options, exit code, the rule in SARIF, what is said, and whether JUnit has an error
GATES = {
    "a new direction": ("new", ["--fail-on", "rotated"], FOUND, "intruder",
                        r"0\.weight.* lowest score .* below epsilon 0\.5"),
    "an intruder": ("new", ["--fail-on", "intruder"], FOUND, "intruder",
                    r"0\.weight.* lowest score .* below epsilon 0\.5"),
    "drift": ("moved", ["--max-drift", "0.01"], FOUND, "max-drift",
              r"mean drift 0\.02.* is 0\.01.* above 0\.01; 1 matrix exceeds it: 0\.weight \(0\.04"),
    "a doubt": ("large", ["--fail-on-doubt"], FOUND, "doubt",
                r"In 0\.weight the update is larger than the base"),
    "a multiple": ("moved", ["--fail-on-doubt"], FOUND, "doubt",
                   r"0\.weight is the base.{1,6}s matrix times 1\.2"),
    "NaN": ("nan", [], UNKNOWN, "not-judged", r"0\.weight.*1 NaN"),
    "a changed bias": ("biased", ["--max-drift", "0.01"], FOUND, "max-drift",
                       r"mean drift, with the most that changed biases can add, .* above 0\.01; "
                       r"1 matrix exceeds it: 2\.weight"),
    "a changed norm": ("normed", ["--max-drift", "9"], UNKNOWN, "max-drift",
                       r"drift is NOT all: 1 changed norm or vector is no part of it: "
                       r"norm\.weight; to accept that they have changed: --exclude .norm\.weight."),
    "no fine-tune": ("same", [], UNKNOWN, "not-judged", r"no direction was judged"),
}  # fmt: skip
SHORT = {"a doubt": r"--fail-on-doubt: 1 doubt: In 0\.weight the update is larger .* = 2\):",
         "NaN": r"NOT judged: 0\.weight",
         "a new direction": r"new directions in 1 matrix .* 0\.weight \(0\.\d+ < 0\.5\)",
         "no fine-tune": "NOT judged: the whole audit"}  # fmt: skip
SHORT["an intruder"] = SHORT["a new direction"]
"""What a line of the terminal has, where the verdict beside it says the rest."""


def gated(name, files, *more):
    tuned, options, *_ = GATES[name]
    given = ["--moments", files / "base.moments"] if "--max-drift" in options else []
    fail_on = [] if "--fail-on" in options else ["--fail-on", "never"]
    return [files / f"{tuned}.safetensors"], [*options, *fail_on, *given, *more]


def test_the_hint_at_a_changed_norm_keeps_what_is_left_out_already(files):
    """Options replace the globs of the settings, so the hint has those, too."""
    tuned, options = gated("a changed norm", files, "--exclude", "2.*")
    found = run("audit", files / "base.safetensors", *tuned, *options)
    assert found.exit_code == UNKNOWN
    line = next(line for line in found.output.splitlines() if line.startswith("drift is NOT all"))
    assert re.search(r"--exclude '2\.\*' --exclude 'norm\.weight' \(NaN", line)


def said(kind, text):
    """The messages of failures, or of errors, in a report; with the rule in SARIF."""
    if kind == "junit":
        root = ElementTree.fromstring(text.encode())  # noqa: S314 — our own
        counted = [int(root.get(plural, "0")) for plural in ("failures", "errors")]
        found = [root.findall(f".//testcase/{one}") for one in ("failure", "error")]
        if root.tag == "testsuite":
            assert counted == list(map(len, found))
        names = {x: case.get("name") for case in root.iter("testcase") for x in case}
        return [[f"{names[x]}: {x.get('message')}" for x in part] for part in found]
    if kind == "sarif":
        (one,) = json.loads(text)["runs"]
        errors = [r for r in one["results"] if r["level"] == "error"]
        return [(r["ruleId"], r["message"]["text"]) for r in errors]
    plain = text.replace("\\", "").replace("&lt;", "<").replace("u003c", "<")
    return re.findall(r"Fails(?:\*\*)? with (exit code .*?)(?:\n|\.\"|\.</p>)", plain)


@pytest.mark.parametrize("name", GATES)
def test_what_fails_a_build_is_in_every_output(name, files, tmp_path):
    tuned, options = gated(name, files)
    _, _, code, rule, message = GATES[name]
    reports = [x for e in KINDS.values() for x in ("--report", tmp_path / f"r.{e}")]
    done = run("audit", files / "base.safetensors", *tuned, *options, *reports, "-q",
               "-o", tmp_path / "out")  # fmt: skip
    assert done.exit_code == code, done.output
    (line,) = (x for x in done.stderr.splitlines() if x.startswith("exit code"))
    assert line.startswith(f"exit code {code}")
    assert re.search(SHORT.get(name, message), line)
    given = GATES[name][1]
    assert not given or " ".join(given) in line
    for kind, ending in KINDS.items():
        found = said(kind, (tmp_path / f"r.{ending}").read_text())
        if kind == "junit":
            assert [len(part) > 0 for part in found] == [code == FOUND, code == UNKNOWN]
            assert re.search(message, " ".join(found[code - 1]))
        elif kind == "sarif":
            ((what, told),) = found
            assert what == rule
            assert re.search(message, told)
        else:
            assert any(re.search(SHORT.get(name, message), x) for x in found), (kind, found)
        # a report of the record afterwards says the same
        again = run("report", tmp_path / "out", "-o", "-", "--format", kind, *_of_gate(options))
        assert again.exit_code == 0
        assert said(kind, again.stdout) == found


def _of_gate(options):
    """The options without --moments, of which a record has the file."""
    at = options.index("--moments") if "--moments" in options else len(options)
    return [*options[:at], *options[at + 2 :]]


@pytest.mark.parametrize("kind", KINDS)
def test_what_passes_is_no_failure_anywhere(kind, files, tmp_path):
    for tuned, options in (("clean", ["--fail-on-doubt", "--max-drift", "0.5", "--moments",
                                      files / "base.moments"]),
                           ("new", ["--fail-on", "never"]),
                           ("large", ["--no-fail-on-doubt"])):  # fmt: skip
        file = tmp_path / f"{tuned}.{KINDS[kind]}"
        done = run("audit", files / "base.safetensors", files / f"{tuned}.safetensors", *options,
                   "--report", file, "-q")  # fmt: skip
        assert (done.exit_code, "exit code" in done.stderr) == (0, False), done.output
        found = said(kind, file.read_text())
        assert found == ([[], []] if kind == "junit" else [])
        if kind == "sarif":  # what passes is still told
            levels = [r["level"] for r in json.loads(file.read_text())["runs"][0]["results"]]
            assert levels == ([] if tuned == "clean" else ["warning"])
        if kind == "junit":
            suite = ElementTree.fromstring(file.read_bytes())  # noqa: S314 — our own
            assert len(suite.findall("testcase/skipped")) == (tuned == "large")
            gates = [c.get("name") for c in suite if c.get("classname") == "bulkedge.gate"]
            assert gates == (["mean drift"] if tuned == "clean" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_several_fine_tunes_in_one_call(kind, files, tmp_path):
    names = ["clean", "new", "nan"]
    tuned = [files / f"{name}.safetensors" for name in names]
    file = tmp_path / f"all.{KINDS[kind]}"
    done = run("audit", files / "base.safetensors", *tuned, "-q", "-o", tmp_path / "out",
               "--report", file)  # fmt: skip
    assert done.exit_code == UNKNOWN
    told = [x.partition(": exit code ")[::2] for x in done.stderr.splitlines() if "exit" in x]
    assert [(name, text[0]) for name, text in told] == [("new", "1"), ("nan", "2")]
    text = file.read_text()
    places = [tmp_path / "out" / name for name in names]
    again = run("report", *places, "-o", "-", "--format", kind,
                *(x for name in names for x in ("--label", name)))  # fmt: skip
    assert again.exit_code == 0, again.output
    found = said(kind, text)
    assert said(kind, again.stdout) == found
    if kind == "junit":
        suites = ElementTree.fromstring(text.encode()).findall("testsuite")  # noqa: S314 — our own
        assert [s.get("name") for s in suites] == [f"bulkedge audit, {name}" for name in names]
        assert [(s.get("failures"), s.get("errors")) for s in suites] == [
            ("0", "0"), ("1", "0"), ("0", "1")
        ]  # fmt: skip
    elif kind == "sarif":
        (one,) = json.loads(text)["runs"]
        assert [told.partition(":")[0] for _, told in found] == ["new", "nan"]
        prints = [r["partialFingerprints"]["matrix/v1"] for r in one["results"]]
        assert len(set(prints)) == len(prints)
        uris = [r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
                for r in one["results"]]  # fmt: skip
        assert [uri.rpartition("/")[2] for uri in uris] == ["new.safetensors", "nan.safetensors"]
    elif kind == "markdown":
        rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
        assert rows == names
        assert re.findall(r"^#### `(\w+)`", text, re.MULTILINE) == ["new", "nan"]
        assert "1 of 3 fine-tunes have new leading directions" in text
        assert len(found) == 2
    else:
        assert len(found) == 4  # with and without a script


def test_the_parts_of_a_table_of_several(files, tmp_path):
    base = files / "base.safetensors"
    two = [files / "new.safetensors", files / "moved.safetensors"]
    out = tmp_path / "out"
    for file, message in (("x.csv", "csv is of one fine-tune"),
                          ("x.parquet", "parquet is of one fine-tune")):  # fmt: skip
        refused = run("audit", base, *two, "-o", out, "--report", tmp_path / file)
        assert (refused.exit_code, message in refused.output) == (UNKNOWN, True)
    for inside in ("comparison.html", "new/record.json", "new/journal.jsonl"):
        name = tmp_path / "out" / inside
        if name.suffix != ".html":
            name = name.with_suffix(".md")
            name.parent.mkdir(parents=True, exist_ok=True)
            name.symlink_to(tmp_path / "out" / inside)
        told = run("audit", base, *two, "-o", out, "--report", name, "--force")
        assert "would be written twice" in str(told.exception), inside


def test_a_repair_says_what_is_left_and_what_it_refused(files, tmp_path):
    W0 = weights(48, 16)
    base = save(tmp_path / "b.safetensors", {"mha.in_proj_weight": W0})
    tensors = {
        "mha.lora_A.weight": orthonormal(16, 2, 2).mT.float(),
        "mha.lora_B.weight": 60 * orthonormal(48, 2, 1).float(),
    }
    adapter = save_adapter(tmp_path / "tuned", tensors, r=2, lora_alpha=2)
    files_ = [x for e in ("md", "xml", "sarif") for x in ("--report", tmp_path / f"r.{e}")]
    done = run("repair", base, adapter, "--dry-run", "-q", "--fail-on", "never", *files_)
    assert done.exit_code == UNKNOWN
    assert "exit code 2: NOT repaired: mha.in_proj_weight" in done.stderr
    assert "NOT repaired: mha.in_proj_weight" in (tmp_path / "r.md").read_text()
    assert tuple(w for w, _ in said("sarif", (tmp_path / "r.sarif").read_text())) == (
        "not-repaired",
    )
    failures, errors = said("junit", (tmp_path / "r.xml").read_text())
    assert (len(failures), len(errors)) == (0, 1)


def test_a_part_fails_no_build_and_says_what_decides(files, tmp_path):
    base, tuned = files / "base.safetensors", files / "new.safetensors"
    gates = ["--fail-on", "rotated", "--fail-on-doubt"]
    inputs = [base, tuned, "--shard", "1/2", *gates, "-q", "-o", tmp_path / "part"]
    reports = [x for e in KINDS.values() for x in ("--report", tmp_path / f"r.{e}")]
    done = run("audit", *inputs, *reports)
    assert done.exit_code == 0
    line = (
        "Part 1 of 2 ends with exit code 0, and `bulkedge merge` decides on the whole. Of this "
        "part alone: exit code 1, --fail-on rotated: new directions in 1 matrix"
    )
    for kind, ending in KINDS.items():
        again = run("report", tmp_path / "part", "-o", "-", "--format", kind, *gates).stdout
        for text in (again, (tmp_path / f"r.{ending}").read_text()):
            if kind == "sarif":
                assert "doubt" not in {rule for rule, _ in said(kind, text)}
                assert "This is part 1 of 2" in text
            elif kind == "junit":
                assert not [x for part in said(kind, text) for x in part if x.startswith("part")]
                assert 'message="doubt: This is part 1 of 2' in text
            else:
                assert line in text.replace("**", "").replace("\\", "")
                assert said(kind, text) == []
    both = run("report", tmp_path / "part", tmp_path / "part", "-o", "-", "--format", "markdown")
    assert both.stdout.count("ends with exit code 0") == 2  # one for each


def test_merged_parts_have_the_gates_of_the_whole(files, tmp_path):
    base, tuned = files / "base.safetensors", files / "moved.safetensors"
    for i in (1, 2):
        part = run("audit", base, tuned, "--moments", files / "base.moments", "--shard", f"{i}/2",
                   "-o", tmp_path / f"{i}", "-q")  # fmt: skip
        assert (part.exit_code, part.stderr) == (0, "")
    done = run("merge", tmp_path / "1", tmp_path / "2", "--max-drift", "0.01", "-q",
               "--report", tmp_path / "r.xml", "--report", tmp_path / "r.md")  # fmt: skip
    assert done.exit_code == FOUND
    assert "exit code 1, --max-drift 0.01: the mean drift" in done.stderr
    assert len(said("junit", (tmp_path / "r.xml").read_text())[0]) == 1
    assert "Fails" in (tmp_path / "r.md").read_text()


def test_the_exit_code_is_that_of_the_failures(files):
    """What a summary calls complete has no failure of exit code 2, and the other way round."""
    base = files / "base.safetensors"
    for path in some(sorted(files.glob("*.safetensors"))):
        record = bulkedge.audit(base, path)
        for gate in (Gate(), Gate(None), Gate(Verdict.INTRUDER, fail_on_doubt=True)):
            codes = [failure.code for failure in gate.failures(record)]
            assert gate.exit_code(record) == max(codes, default=0)
            assert (UNKNOWN in codes) is not record.summary.complete
            lines = failure_lines(gate.failures(record))
            assert bool(lines) == bool(codes)
            assert all("\n" not in line for line in lines)
        assert Gate(None, 1.0).exit_code(record) == UNKNOWN  # of no moments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fail_on": Verdict.ALIGNED}, "fail_on: expected a verdict of rotated, intruder, or None"),
        ({"max_drift": -1.0}, r"max_drift: expected a number of at least 0, got -1\.0"),
        ({"max_drift": float("nan")}, "max_drift: expected a number of at least 0, got nan"),
    ],
)
def test_a_gate_that_is_none(settings, message):
    with pytest.raises(InputError, match=message):
        Gate(**settings)


def test_rendering_takes_a_gate(files):
    record = bulkedge.audit(files / "base.safetensors", files / "new.safetensors")
    for kind, fail_on in product(("junit", "sarif", "markdown"), (None, Verdict.INTRUDER)):
        found = said(kind, render(record, kind, gate=Gate(fail_on)))
        assert bool(found[0] if kind == "junit" else found) == (fail_on is not None)
    with pytest.raises(InputError, match="no two are alike"):
        render([record, record], "junit", ["a", "a"])


# ---- the gate among the settings of a project


POLICY = {
    "bulkedge.yaml": "fail_on: {}\nmax_drift: 0.01\nfail_on_doubt: true\n",
    "pyproject.toml": "[tool.bulkedge]\nfail_on = '{}'\nmax_drift = 0.01\nfail_on_doubt = true\n",
}


@pytest.mark.parametrize("file", POLICY)
def test_a_project_sets_its_gates(file, files, tmp_path, monkeypatch):
    (tmp_path / file).write_text(POLICY[file].format("never"))
    monkeypatch.chdir(tmp_path)
    base, given = files / "base.safetensors", ["--moments", files / "base.moments", "-q"]
    told = f"settings of {tmp_path / file}: fail_on, max_drift, fail_on_doubt\n"

    def audit(name, *options):
        return run("audit", base, files / f"{name}.safetensors", *given, *options)

    assert (audit("clean").exit_code, audit("clean").stderr) == (0, told)
    new = audit("new")
    assert "--fail-on" not in new.stderr.replace("--fail-on-doubt", "")
    for name, option, off in (("moved", "--max-drift 0.01", ["--max-drift", "9"]),
                              ("large", "--fail-on-doubt", ["--no-fail-on-doubt"])):  # fmt: skip
        assert option in audit(name).stderr
        over = audit(name, *off)
        assert option not in over.stderr
        assert f"options override {off[0].replace('--no-', '').strip('-').replace('-', '_')}" in (
            over.stderr
        )
    assert "--fail-on intruder" in audit("new", "--fail-on", "intruder").stderr
    # without moments the limit cannot be held: the audit is shown, and does not pass
    bare = run("audit", base, files / "clean.safetensors", "-q")
    assert bare.exit_code == UNKNOWN
    assert "0 of 10 leading directions" in bare.stdout
    assert "--max-drift 0.01: no drift was measured: give the inputs" in bare.stderr
    # of several, merged parts, reports and repairs, too
    many = run("audit", base, files / "clean.safetensors", files / "large.safetensors", *given,
               "-o", tmp_path / "many")  # fmt: skip
    assert "large: exit code 1, --fail-on-doubt" in many.stderr
    assert many.stderr.count("settings of") == 1
    report = run("report", tmp_path / "many/large", "-o", "-", "--format", "junit")
    assert len(said("junit", report.stdout)[0]) == 2  # of drift, and of the doubt
    assert f"settings of {tmp_path / file}" in report.stderr
    fixed = run("repair", base, files / "new.safetensors", "--dry-run", "-q",
                "--method", "scale")  # fmt: skip
    assert fixed.exit_code == 0, fixed.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fail_on: sometimes", "fail_on: expected one of rotated, intruder, never, got"),
        ("max_drift: true", "max_drift: expected a number of at least 0, got True"),
        ("max_drift: -1", "max_drift: expected a number of at least 0, got -1"),
        ("max_drift: .nan", "max_drift: expected a number of at least 0, got nan"),
        ("fail_on_doubt: 1", "fail_on_doubt: expected true or false, got 1"),
        ("fail-on: never", "unknown field 'fail-on'; did you mean fail_on?"),
        ("jobs: 4", "'jobs' is an option of the command and no setting: give --jobs on the"),
        ("fail_off: never", "unknown field 'fail_off'; did you mean fail_on?"),
        ("fall: never", "unknown field 'fall'"),
    ],
)  # fmt: skip
def test_settings_of_a_gate_that_cannot_be_used(text, message, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bulkedge.yaml").write_text(text + "\n")
    (tmp_path / "own.yaml").write_text(text + "\n")
    base = files / "base.safetensors"
    for options in ([], ["--recipe", "own.yaml"]):
        done = run("audit", base, files / "clean.safetensors", *options)
        assert isinstance(done.exception, RecipeError), done.output
        assert message in str(done.exception)


def test_the_tensors_of_the_fixture_differ(files):
    states = {path.stem: load_file(path) for path in some(files.glob("*.safetensors"))}
    base = states.pop("base")
    same = [n for n, s in states.items() if all(torch.equal(s[k], base[k]) for k in base)]
    assert same == ["same"]
