"""The documents say what the scripts measured and the program prints; what they show runs."""

import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

import bulkedge
import practice
from bulkedge._moments import collect_moments
from bulkedge.cli import audit, budget, cli, frontier, repair
from bulkedge.cli._gate import GATE_FIELDS, check_settings
from bulkedge.cli._settings import project_settings
from bulkedge.records import Recipe, make_recipe, read_recipe
from bulkedge.report import print_record
from bulkedge.tune import Hold, IntruderMonitor, SpikeClip
from commands import run
from helpers import EXAMPLE, MINILM, some

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*/*.md")),
]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# commands that are not run here, and why; `test_what_is_not_run_is_there` looks at each
NOT_RUN = {
    "make": "would start this very test",
    "pip": "changes the environment",
    ".venv/bin/pip": "changes the environment",
    ".venv/bin/python": "trains for minutes",
}


CONTINUED = ("fine-tuning.md",)  # each block goes on where the one before stopped


def blocks(language):
    return [
        pytest.param(page, code, id=f"{page.relative_to(ROOT)}:{i}")
        for page in PAGES
        for i, (found, code) in enumerate(BLOCK.findall(page.read_text()))
        if found == language
    ]


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:  # for what it imports from its own folder
        sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


ONE_AFTER_THE_OTHER = (
    "quickstart.md",
    "report.md",
)  # each command uses what the ones before have written


@pytest.fixture(scope="session")
def practice_files(tmp_path_factory):
    """A small BASE and TUNED, with moments of both."""
    folder = practice.fill(tmp_path_factory.mktemp("practice"))
    texts = practice.LINES
    collect_moments(folder / "BASE", texts).save(folder / "base.moments")
    tuned = collect_moments(folder / "BASE", texts, tuned=folder / "TUNED")
    tuned.save(folder / "task.moments")
    return folder


@pytest.fixture
def workspace(tmp_path, monkeypatch, practice_files):
    """A folder in which the paths of the pages lead somewhere, and what they write may lie."""
    for path in (ROOT / "build", ROOT / "examples", *practice_files.iterdir()):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return tmp_path


QUICK = "examples/minilm_wordnet/texts.py"  # a script that is run, for all that


def is_not_run(words):
    return words[0] in NOT_RUN and QUICK not in words


def write_few_texts(script):
    """What the script writes, cut so that a model reads it in a moment."""
    load_script(ROOT / script).main()
    for name in ("keep.txt", "task.txt"):
        path = Path(name)
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) > 500
        path.write_text("\n".join(lines[:40]), encoding="utf-8")


def run_commands(code, workspace):
    made = {f"-o {name}": [name] for name in ("base.moments", "task.moments")}
    for written, names in (made | {QUICK: ["keep.txt", "task.txt"]}).items():
        if written in code:  # the block makes them itself
            for name in names:
                (workspace / name).unlink()
    wanted = sum(not is_not_run(words) for words in practice.commands(code))
    assert practice.run_all(code, run, is_not_run, write_few_texts) == wanted


@pytest.mark.parametrize(
    ("page", "code"), [b for b in blocks("sh") if b.values[0].name not in ONE_AFTER_THE_OTHER]
)
def test_shell_blocks_run(page, code, workspace):
    run_commands(code, workspace)


def test_the_jobs_of_a_cluster_run(workspace):
    """Each job of the array, then the one that waits for all."""
    (array,), (merge,) = ([code] for _, code in (block.values for block in blocks("bash")))
    first, last = map(int, re.search(r"--array=(\d)-(\d)", array).groups())
    for task in range(first, last + 1):
        job = array.replace("$SLURM_ARRAY_TASK_ID", str(task)).replace("-j 4", "-j 1")
        run_commands(job, workspace)
    run_commands(merge, workspace)
    whole = bulkedge.Record.from_json(workspace / "whole/record.json")
    assert whole.summary.matrices == len(bulkedge.audit("BASE", "TUNED").matrices)


@pytest.mark.parametrize("program", NOT_RUN)
def test_what_is_not_run_is_there(program):
    """Targets of make, extras of the package, scripts with their options."""
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    project = (ROOT / "pyproject.toml").read_text()
    pages = [code for _, code in (block.values for block in blocks("sh"))]
    said = [words for code in pages for words in practice.commands(code) if words[0] == program]
    for _, *words in some(said):
        if program == "make":
            assert set(words) <= {*targets, "JOBS=1"}
        elif program.endswith("pip"):
            assert words[0] == "install"
            extras = re.findall(r"\[(\w+)\]", words[-1])
            assert words[-1].startswith(".")
            assert all(f"\n{name} = [" in project for name in extras)
        else:
            script = (ROOT / words[0]).read_text()
            assert all(f'"{word}"' in script for word in words if word.startswith("--")), words


# who looks at the blocks of a kind, on the pages named; "" is a picture in characters
LOOKED_AT = {
    "sh": ["*.md"],  # run, all but what is in NOT_RUN
    "bash": ["audit.md"],  # run, as jobs of a cluster
    "python": ["*.md"],  # run
    "py": ["fine-tuning.md"],  # run in what stands for other people's trainers
    "toml": ["*.md"],  # read as settings
    "yaml": ["*.md"],  # read as a recipe
    "yml": ["ci.md", "fine-tuning.md"],  # jobs, hooks and settings of other programs: run
    "text": ["README.md", "quickstart.md", "frontier.md"],  # compared with what is printed
    "": ["architecture.md"],  # the first is compared with the imports, the others are not run
    "{toctree}": ["index.md"],  # directives of the site, which is built
    "{contents}": ["reference.md"],
    "{eval-rst}": ["reference.md"],
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_looked_at(page):
    text = page.read_text()
    found = [language for language, _ in BLOCK.findall(text)]
    assert len(re.findall(r"^\s*(```|~~~)", text, re.M)) == 2 * len(found)
    without = BLOCK.sub("", text)  # what is indented alone is for formulas
    assert not re.search(r"^ {4,}(bulkedge|pip|python|make|import|from) ", without, re.M)
    new = [x for x in found if not any(page.match(name) for name in LOOKED_AT.get(x, ()))]
    assert new == []


def test_the_history_of_a_run_is_asked_by_name():
    """Entries with a loss lie between the figures of a monitor: no position is theirs."""
    shown = [*PAGES, *(p for x in ("src", "examples") for p in (ROOT / x).rglob("*.*"))]
    texts = {p: p.read_text() for p in shown if p.suffix in (".md", ".py", ".ipynb")}
    assert any("log_history" in text for text in texts.values())
    assert [p for p, text in texts.items() if re.search(r"log_history\s*\[", text)] == []


INLINE = re.compile(r"`(bulkedge [^`\n]+)`")


def test_every_command_within_a_sentence_can_be_typed():
    """The options of each are known to its command."""
    found = {c for page in PAGES for c in INLINE.findall(page.read_text())}
    for line in some(found):
        ((_, name, *words),) = practice.commands(line)
        command = cli.commands.get(name)
        if command is None:
            assert name in ("--version", "-V", "COMMAND", "…"), line
            continue
        known = {option for p in command.params for option in p.opts} | {"--help", "-h"}
        assert {w.partition("=")[0] for w in words if w.startswith("-") and w != "-"} <= known, line


@pytest.mark.parametrize(("page", "code"), blocks("toml"))
def test_settings_of_a_project_are_valid(page, code, tmp_path):
    (tmp_path / "pyproject.toml").write_text(code)
    settings, _ = project_settings(tmp_path)
    gates = {name: settings.pop(name) for name in GATE_FIELDS if name in settings}
    assert make_recipe(settings) != Recipe()
    check_settings(gates, None, (), ())


def test_the_other_output_that_pages_show_is_real():
    shown_ = {page.name: code for page, code in (block.values for block in blocks("text"))
              if page.name in ("quickstart.md", "frontier.md")}  # fmt: skip
    assert shown_["quickstart.md"] in (ROOT / "README.md").read_text()
    assert len(json.loads(shown_["frontier.md"])) > 1


@pytest.mark.parametrize("name", ONE_AFTER_THE_OTHER)
def test_commands_of_a_page_run_one_after_the_other(name, workspace):
    pages = [block.values for block in blocks("sh")]
    run_commands("".join(code for page, code in pages if page.name == name), workspace)


@pytest.mark.parametrize(
    ("page", "code"), [b for b in blocks("python") if b.values[0].name not in CONTINUED]
)
def test_python_blocks_run(page, code, monkeypatch):
    """Each with names of its own; a process for each would import torch as often."""
    monkeypatch.chdir(ROOT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, f"{page.name}, a block", "exec"), {"__name__": "block"})  # noqa: S102


@pytest.mark.parametrize("name", CONTINUED)
def test_pages_told_in_one_run_as_one(name, tmp_path):
    pages = [block.values for block in blocks("python")]
    code = "\n".join(code for page, code in pages if page.name == name)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)


def of_other_trainers(language):
    return [
        code for page, code in (b.values for b in blocks(language)) if page.stem == "fine-tuning"
    ]


def test_the_configuration_of_axolotl_holds_and_watches():
    (code,) = of_other_trainers("yml")
    settings = yaml.safe_load(code)
    (path,) = settings["plugins"]
    module, _, name = path.rpartition(".")
    plugin = getattr(importlib.import_module(module), name)()
    hold, monitor = plugin.add_callbacks_pre_trainer(SimpleNamespace(**settings), None)
    assert isinstance(hold, Hold)
    assert isinstance(monitor, IntruderMonitor)
    assert monitor.every == settings["bulkedge"]["every"]


def test_the_script_for_llama_factory_passes_its_callbacks(tmp_path, monkeypatch):
    """In place of its own entry, which ``make test-integrations`` runs."""
    given = []
    entry = SimpleNamespace(run_exp=lambda args, callbacks: given.append((args, callbacks)))
    for name in ("llamafactory", "llamafactory.train", "llamafactory.train.tuner"):
        monkeypatch.setitem(sys.modules, name, entry)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.yaml").write_text("stage: sft\n")
    (code,) = (c for c in of_other_trainers("py") if "llamafactory" in c)
    exec(compile(code, "train.py", "exec"), {})  # noqa: S102
    ((settings, (hold, monitor)),) = given
    assert settings == {"stage": "sft"}
    assert (type(hold), type(monitor)) == (Hold, IntruderMonitor)


def test_the_lines_for_accelerate_hold_a_prepared_optimizer():
    accelerate, peft = pytest.importorskip("accelerate"), pytest.importorskip("peft")
    torch.manual_seed(0)
    layers = nn.Sequential(OrderedDict(hidden=nn.Linear(64, 96)))
    model = peft.get_peft_model(layers, peft.LoraConfig(r=2, target_modules=["hidden"]))
    names = {
        "accelerator": accelerate.Accelerator(cpu=True),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=1e-3),
        "SpikeClip": SpikeClip,
    }
    (code,) = (c for c in of_other_trainers("py") if "accelerator" in c)
    exec(compile(code, "train.py", "exec"), names)  # noqa: S102
    prepared, optimizer = names["model"], names["optimizer"]
    layer = prepared.base_model.model.hidden

    def strength():
        return float(torch.linalg.matrix_norm(layer.get_delta_weight("default").detach(), 2))

    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_" in name:
                factor.normal_()
    before = strength()
    prepared(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    assert strength() < 0.5 * before


@pytest.mark.parametrize(("page", "code"), blocks("yaml"))
def test_recipes_are_valid(page, code, tmp_path):
    (tmp_path / "r.yaml").write_text(code)
    make_recipe(read_recipe(tmp_path / "r.yaml"))


def in_ci(tmp_path, **more):
    """A folder with a base and an adapter, and the environment of a job in it."""
    (tmp_path / "base").symlink_to(MINILM)
    (tmp_path / "adapter").symlink_to(EXAMPLE / "lora-r1")
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
        **more,
    }


SHELLS = {"bash": ["bash", "-e", "-c"], "python": ["python", "-c"]}


def run_steps(steps, folder, environment, code=1):
    """Run a job's steps but the installation; only the audit may end with findings.

    Returns:
        What they wrote to stderr.
    """
    said = ""
    for step in some(s for s in steps if "run" in s and "pip install" not in s["run"]):
        script = [*SHELLS[step.get("shell", "bash")], step["run"]]
        ended = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True)
        audits = step.get("id") == "audit" or "bulkedge audit" in step["run"]
        assert ended.returncode == (code if audits else 0), ended.stderr
        said += ended.stderr
    return said


def test_the_job_for_github_runs(tmp_path):
    """Its own steps, installation apart, on an adapter with findings."""
    (code,) = (c for language, c in BLOCK.findall((ROOT / "docs/ci.md").read_text())
               if language == "yml" and c.startswith("name:"))  # fmt: skip
    run_steps(yaml.safe_load(code)["jobs"]["audit"]["steps"], tmp_path, in_ci(tmp_path))
    assert "intruder" in (tmp_path / "summary").read_text()
    kept = ("report.html", "junit.xml", "bulkedge.sarif", "out/record.json")
    assert all((tmp_path / name).stat().st_size for name in kept)


SHORT = "--include '*layer.5.output*'"  # quotes as in a shell, and a glob that none expands


@pytest.fixture
def action(tmp_path):
    """The steps of the action, and what runs them with some inputs."""
    content = yaml.safe_load((ROOT / "action.yml").read_text())
    steps = content["runs"]["steps"]
    environment = in_ci(tmp_path)
    (tmp_path / "summary").touch()

    def run(code=1, **given):
        values = {name: spec.get("default", "") for name, spec in content["inputs"].items()}
        values |= {"base": "base", "tuned": "adapter", "options": SHORT} | given
        names = {name for step in steps for name in step.get("env", {})}
        assert names == {name.upper().replace("-", "_") for name in values}
        inputs = {name: values[name.lower().replace("_", "-")] for name in names}
        run.said = run_steps(steps, tmp_path, environment | inputs, code)
        return tmp_path / values["output"]

    return run


def test_the_action_runs(action, tmp_path):
    out = action()
    found = {path.name for path in out.iterdir()}
    assert {"record.json", "summary.md", "report.html", "junit.xml", "bulkedge.sarif"} <= found
    assert (tmp_path / "summary").read_text() == (out / "summary.md").read_text()
    assert "**Fails** with exit code 1, --fail-on rotated" in (out / "summary.md").read_text()
    recipe = json.loads((out / "record.json").read_text())["recipe"]
    assert recipe["include"] == ["*layer.5.output*"]


@pytest.mark.parametrize(
    "tuned",
    [
        pytest.param("adapter", id="one", marks=pytest.mark.slow),  # nearly all is in the other
        pytest.param("adapter\nother", id="several"),
    ],
)
def test_the_action_runs_again_and_publishes_nothing_old(tuned, action, tmp_path):
    """Neither where the audit fails before it writes, nor where it never began."""
    (tmp_path / "other").symlink_to(EXAMPLE / "lora-r8")
    more = f"{SHORT} --report bulkedge-out/rows.html"
    out = action(tuned=tuned, options=more)
    once = {path.relative_to(out) for path in out.rglob("*")}
    assert {"record.json", "rows.html"} <= {path.name for path in once}
    (out / ".record.json.x1y2").touch()  # of a run that was stopped while it wrote
    action(tuned=tuned, options=more)
    assert {path.relative_to(out) for path in out.rglob("*")} == once
    unbalanced = {"options": f'{more} --include "unbalanced'}
    for wrong in ({"base": "gone"}, unbalanced, {"tuned": "--help"}):
        (tmp_path / "summary").write_text("")
        action(tuned=tuned, options=more)
        action(code=2, **{"tuned": tuned, "options": more} | wrong)
        assert not [*out.rglob("*")]
        assert "ended before it wrote a report" in (tmp_path / "summary").read_text()
    (_, audit, report) = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"]
    assert report["if"] == f"always() && steps.{audit['id']}.outcome != 'skipped'"
    action(output="never-written", options='--include "unbalanced', code=2)
    assert not (tmp_path / "never-written").exists()


def test_the_action_removes_nothing_of_anyone_else(action, tmp_path):
    """Another file in the output, or in a folder there: the audit refuses what is in use."""
    for other in ("notes.txt", "baseline/record.json", "baseline/weights.safetensors"):
        file = tmp_path / "bulkedge-out" / other
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(other)
    before = sorted((tmp_path / "bulkedge-out").rglob("*"))
    assert sorted(action(code=2).rglob("*")) == before


def test_the_action_resumes(action):
    out = action()
    (out / "record.json").unlink()
    action(options=f"{SHORT} --resume")
    assert json.loads((out / "record.json").read_text())["run"]["resumed"] > 0


@pytest.mark.parametrize("wrong", [{"base": "--json"}, {"tuned": "adapter\n -q"}, {"output": "-"}])
def test_the_action_takes_no_options_for_paths(wrong, action):
    action(code=2, **wrong)
    assert re.search(r"^-\S*.*: is no path but an option; put \./ in front$", action.said, re.M)


def test_the_action_takes_several_fine_tunes_and_the_project_s_gate(action, tmp_path):
    (tmp_path / "other").symlink_to(EXAMPLE / "lora-r8")
    (tmp_path / "bulkedge.yaml").write_text("fail_on: never\n")
    out = action(code=0, tuned="adapter\n  other\n\n")
    assert {path.name for path in out.iterdir()} >= {"adapter", "other", "comparison.csv"}
    text = (tmp_path / "summary").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)[:2] == ["adapter", "other"]
    assert "Fails" not in text
    action(code=1, output="strict", **{"fail-on": "rotated"})  # an input wins over the file


def test_the_hook_is_the_one_of_the_page_and_runs(tmp_path):
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    blocks_ = [yaml.safe_load(c) for language, c in BLOCK.findall((ROOT / "docs/ci.md").read_text())
               if language == "yml" and c.startswith("repos:")]  # fmt: skip
    (local,) = blocks_[0]["repos"][0]["hooks"]
    shared = ("id", "entry", "files", "pass_filenames")
    assert [hook[key] for key in shared] == [local[key] for key in shared]
    command = [*hook["entry"].split(), *local["args"], "--include", "*layer.5*"]
    ended = subprocess.run(command, cwd=tmp_path, env=in_ci(tmp_path), capture_output=True)
    assert ended.returncode == 1, ended.stderr


def test_the_readme_shows_what_the_demo_prints(monkeypatch):
    """A part of it, line by line, in its order."""
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text()
    (block,) = (code for language, code in BLOCK.findall(readme) if language == "text")
    record = bulkedge.audit(*(str(p.relative_to(ROOT)) for p in (MINILM, EXAMPLE / "lora-r1")))
    stream = io.StringIO()
    print_record(record, Console(file=stream, width=160))
    printed = [line.rstrip() for line in stream.getvalue().splitlines()]
    places = [printed.index(line) for line in some(block.splitlines()) if line]
    assert places == sorted(places)
    assert len(places) > 5


def test_the_first_table_is_the_measured_one(capsys):
    load_script(EXAMPLE / "table.py").show(json.loads((EXAMPLE / "table.json").read_text()))
    assert capsys.readouterr().out in (EXAMPLE / "README.md").read_text()


README_MOST = 900  # words, code included


def test_the_readme_takes_ten_minutes():
    assert len(shown(ROOT / "README.md").split()) <= README_MOST


def test_the_readme_has_the_figures_of_the_results():
    """Each a mark that a script fills, and none that is typed by hand."""
    render = load_script(ROOT / "benchmarks/render.py")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    fields = {field.partition(":")[0] for field, _ in render.MARK.findall(page)}
    wanted = {
        *(f"counts[{name}]" for name in ("full", "lora-r1", "lora-r8")),
        *(f"repair[lora-r1][{x}]" for x in ("before", "after", "accuracy_before")),
        *("protect[lora_r1_gain]", "protect[lora_r8_gain]", "bad[bad]"),
        *("hard[certificates]", "hard[wrong]", "speed[seconds]", "speed[two_svds]"),
        *("memory[large][peak_MB]", "memory[large][checkpoint_MB]", "triplet[gaussian]"),
        *("finetune[lora-r8][accuracy]", "finetune[lora-r8+clip][accuracy]"),
    }
    assert wanted <= fields
    typed = re.findall(r"\d[\d.,]* (?:%|MB|GB|points|times)", render.MARK.sub("", page))
    assert typed == []


def shown(path):
    """A page as a reader sees it: without the marks around its figures."""
    return re.sub(r"<!--.*?-->", "", path.read_text(encoding="utf-8"))


def test_figures_and_tables_are_those_of_the_results():
    render = load_script(ROOT / "benchmarks/render.py")
    for name, values in some(render.FILLED.items()):
        page = (ROOT / name).read_text(encoding="utf-8")
        assert page == render.fill(page, values())
        assert len(render.MARK.findall(page)) == page.count("<!-- end -->") > 0
        # a line that begins with a comment is no part of a paragraph
        assert not re.search(r"^<!-- [^>]* -->.", page, re.MULTILINE), name


@pytest.mark.parametrize(
    ("page", "filled"),
    [
        ("a <!-- x:.1f -->9<!-- end --> b", "a <!-- x:.1f -->0.5<!-- end --> b"),
        ("<!-- y[z w] -->\nold\n<!-- end -->\n", "<!-- y[z w] -->\nnew\n<!-- end -->\n"),
        ("<!-- a comment --> x", "<!-- a comment --> x"),
    ],
)
def test_a_mark_is_filled(page, filled):
    render = load_script(ROOT / "benchmarks/render.py")
    assert render.fill(page, {"x": 0.5, "y": {"z w": "new"}}) == filled


def test_a_mark_without_a_figure_is_an_error():
    render = load_script(ROOT / "benchmarks/render.py")
    for mark in ("unknown", "x[unknown]", "x:.1f"):
        with pytest.raises(ValueError, match=r"no figure for the mark"):
            render.fill(f"<!-- {mark} --><!-- end -->", {"x": {"text": ""}})


def test_the_architecture_quotes_the_stored_precision():
    stored = json.loads((ROOT / "benchmarks/results/precision.json").read_text())["measured"]
    page = (ROOT / "docs/architecture.md").read_text()
    for key in ("relative_gap_median", "relative_gap_1_percent", "score_change_largest"):
        assert f"{stored[key]:.1e}".replace("e-0", "e-") in page


def test_the_certificate_quotes_its_figure():
    stored = json.loads((ROOT / "docs/figures/certificate.json").read_text())
    page = " ".join((ROOT / "docs/certificate.md").read_text().split())
    bound, scores = stored["bound"], stored["scores"]
    assert (
        f"After 4 steps they still reach {bound['4']:.2f}, after 8 steps {bound['8']:.2f}" in page
    )
    assert f"the true scores, {scores[0]:.2f} and {scores[1]:.2f}" in page


@pytest.mark.parametrize(
    ("page", "command", "record"),
    [
        ("audit.md", audit, bulkedge.Record),
        ("repair.md", repair, bulkedge.RepairRecord),
        ("before-you-train.md", budget, bulkedge.BudgetRecord),
        ("frontier.md", frontier, bulkedge.FrontierRecord),
    ],
    ids=["audit", "repair", "budget", "frontier"],
)
def test_every_option_and_record_field_is_documented(page, command, record):
    page = (ROOT / "docs" / page).read_text()
    if command is not audit:  # an audit's options and records are told once
        page += (ROOT / "docs/audit.md").read_text()
    for option in some(command.params):
        if option.param_type_name == "option":
            assert any(f"`{name}`" in page for name in option.opts), option.name

    def fields(model):
        for name, field in model.model_fields.items():
            yield name
            for inner in getattr(field.annotation, "__args__", (field.annotation,)):
                if hasattr(inner, "model_fields"):
                    yield from fields(inner)

    for name in some(fields(record)):
        assert f"`{name}`" in page or f"`--{name}`" in page, name


def test_every_source_file_is_in_the_picture_of_the_house():
    page = (ROOT / "docs/architecture.md").read_text()
    source = ROOT / "src/bulkedge"
    for path in some(source.rglob("*.py")):
        if path.stem not in ("__init__", "__main__"):
            assert f"`{path.stem}" in page or path.name in page, path


def test_links_lead_somewhere():
    link = re.compile(r"\]\((?!http)([^)#]+)")
    targets = [(page, target) for page in PAGES for target in link.findall(page.read_text())]
    assert len(targets) > 50
    assert not [(page, target) for page, target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("adapter", ["lora-r1", "lora-r8"])
def test_the_example_quotes_the_accuracy_of_its_adapters(adapter):
    training = json.loads((EXAMPLE / adapter / "training.json").read_text())
    row = next(
        line
        for line in (EXAMPLE / "README.md").read_text().splitlines()
        if line.startswith(f"| `{adapter}`")
    )
    assert row.endswith(f"| {100 * training['accuracy']:.2f} % |")
    rank, seed = training["rank"], training["seed"]
    assert f"--rank {rank} --seed {seed}" in row


def test_what_the_page_says_of_protecting_is_what_was_measured():
    render = load_script(ROOT / "benchmarks/render.py")
    tables, found = render.render_protect, render.protect_results()
    nouns = [name for name in found.adapters if name.startswith("nouns")]
    assert set(tables.SHIPPED.values()) < set(nouns)
    assert len(found.adapters) >= 8
    for adapter, strength in itertools.product(nouns, (1.0, 3.0)):
        cell = found.one(adapter, "protect", strength)
        for ability in some(tables.ABILITIES):
            gain = found.gain(adapter, cell, ability)
            kept, task = found.curve(adapter, "scaled", ability)[-1]
            beyond = cell[ability] > kept and cell["task"] > task
            assert beyond if gain is None else gain > 0, (adapter, strength, ability)
    for adapter in some(tables.SHIPPED.values()):
        assert found.gain_at_half(adapter) < 3  # the goal that the page says is missed
    (replay,) = (c for c in found.others("nouns, r = 8, seed 0") if "replay" in c["method"])
    assert found.gain("nouns, r = 8, seed 0", replay, "structure", "protect") > 0
    at = {
        texts: found.gain("nouns, r = 8, seed 0", cell)
        for texts in (
            None,
            *["50", "200", "3000"],
            "shuffled words",
            "sentences with nouns",
            "Python's docstrings",
        )
        for cell in found.of("nouns, r = 8, seed 0", "protect", texts=texts)
        if cell["setting"] == 1
    }
    assert at["50"] < at["200"] < at[None]
    assert abs(at["3000"] - at[None]) < 1
    assert 0.25 * at[None] < at["shuffled words"] < 0.75 * at[None]
    assert max(abs(at["sentences with nouns"]), abs(at["Python's docstrings"])) < 0.5
    files = [found.one(adapter, "files", 1.0) for adapter in tables.SHIPPED.values()]
    one, other = (cell["intruders_after"] - cell["intruders_before"] for cell in files)
    assert one * other < 0  # of one adapter more, of the other fewer
    assert all(cell["error"] < 1e-5 for cell in files)
    causal = tables.causal_figures(render.cells("protect_causal"))["protect"]
    assert causal["better"] == causal["count"] >= 6
    sides = render.render_sides.sides_figures(found)
    assert sides["two-sided r8"]["most"] > 1
    assert sides["two-sided r1"]["most"] < 0  # why one side is the default


AUTOMODULE = re.compile(r"^\.\. automodule:: ([\w.]+)$", re.MULTILINE)


def modules_of_the_reference():
    names = AUTOMODULE.findall((ROOT / "docs/reference.md").read_text(encoding="utf-8"))
    return {name: importlib.import_module(name) for name in names}


def test_every_public_module_is_in_the_reference():
    found = modules_of_the_reference()
    assert {"bulkedge", *(f"bulkedge.{name}" for name in bulkedge._MODULES)} <= set(found)
    names = [(m, name) for m in found.values() for name in getattr(m, "__all__", ())]
    assert len(names) > 100
    assert [(m.__name__, name) for m, name in names if not hasattr(m, name)] == []


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    ended = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    for page in some((ROOT / "docs").glob("*.md")):
        assert (tmp_path / f"{page.stem}.html").is_file()
    reference = (tmp_path / "reference.html").read_text(encoding="utf-8")
    public: dict[Any, set[str]] = {}  # one that two modules export is told in one of them
    for name, module in modules_of_the_reference().items():
        for key in getattr(module, "__all__", ()):
            found = getattr(module, key)
            if inspect.isclass(found) or inspect.isfunction(found):
                public.setdefault(found, set()).add(f"{name}.{key}")
    assert len(public) > 100
    absent = [n for n in public.values() if not any(f'id="{name}"' in reference for name in n)]
    assert absent == []
    assert reference.count('"headerlink"') > len(public)
