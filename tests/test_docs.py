"""The documents say what the scripts measured and the program prints; what they show runs."""

import importlib.util
import inspect
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

import bulkedge
from bulkedge.cli import audit, budget, frontier, repair
from bulkedge.records import make_recipe, read_recipe
from commands import run
from helpers import EXAMPLE, MINILM, some

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*/*.md")),
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# `make` would start this very test, training takes minutes; both have their own checks
NOT_RUN = (
    "make ",
    ".venv/bin/",
    "pip install",
    "bulkedge audit BASE",
    "bulkedge budget BASE",
    "bulkedge repair BASE",
    "bulkedge moments BASE",
    "bulkedge frontier BASE",
)


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


@pytest.mark.parametrize(("page", "code"), blocks("sh"))
def test_shell_blocks_run(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in some(code.replace("\\\n", " ").splitlines()):
        command = line.partition("#")[0].strip()
        if not command or command.startswith(NOT_RUN):
            continue
        program, *arguments = shlex.split(command.replace("-o out", f"-o {tmp_path / 'out'}"))
        assert program == "bulkedge", f"{command}: only the command itself is run here"
        ended = run(*arguments)
        assert ended.returncode in (0, 1), (command, ended.stderr)


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


@pytest.mark.parametrize(("page", "code"), blocks("yaml"))
def test_recipes_are_valid(page, code, tmp_path):
    (tmp_path / "r.yaml").write_text(code)
    make_recipe(read_recipe(tmp_path / "r.yaml"))


def test_the_job_for_github_runs(tmp_path):
    """Its own steps, installation apart, on an adapter with findings: the gate closes last."""
    (code,) = (c for language, c in BLOCK.findall((ROOT / "docs/ci.md").read_text())
               if language == "yml")  # fmt: skip
    (tmp_path / "base").symlink_to(MINILM)
    (tmp_path / "adapter").symlink_to(EXAMPLE / "lora-r1")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }
    steps = [step for step in yaml.safe_load(code)["jobs"]["audit"]["steps"] if "run" in step]
    for step in some(steps):
        if step["run"].startswith("pip install"):
            continue
        command = ["bash", "-e", "-c", step["run"]]
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == ("--fail-on" in step["run"]), ended.stderr
    assert "intruder" in (tmp_path / "summary").read_text()
    kept = (tmp_path / name for name in ("report.html", "junit.xml", "out/record.json"))
    assert all(path.stat().st_size for path in kept)


def test_the_readme_shows_what_the_demo_prints(monkeypatch):
    paths = [str(path.relative_to(ROOT)) for path in (MINILM, EXAMPLE / "lora-r1")]
    monkeypatch.chdir(ROOT)
    ended = run("audit", *paths)
    assert ended.returncode == 1, ended.stderr  # it has intruders
    shown = " ".join((ROOT / "README.md").read_text().split())
    # a line for each matrix with intruders, a head, two lines of the sum
    lines = [" ".join(line.split()) for line in ended.stdout.splitlines() if line.strip()]
    assert lines[0].startswith("matrix ")
    assert len(lines) > 5
    for line in some(lines):  # the last is folded in the README as in a terminal of 80 columns
        assert line in shown


def test_the_first_table_is_the_measured_one(capsys):
    load_script(EXAMPLE / "table.py").show(json.loads((EXAMPLE / "table.json").read_text()))
    printed = capsys.readouterr().out
    for page in (ROOT / "README.md", EXAMPLE / "README.md"):
        assert printed in page.read_text()


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


def test_the_readme_quotes_the_stored_memory_figures():
    stored = json.loads((ROOT / "benchmarks/results/audit_memory.json").read_text())["measured"]
    readme = shown(ROOT / "README.md")
    assert f"{stored['large']['peak_MB']:,} MB" in readme
    assert f"{stored['large']['checkpoint_MB']:,} MB" in readme
    assert f"has {stored['largest_matrix_MB']} MB" in readme


def test_the_readme_quotes_the_stored_speed():
    results = ROOT / "benchmarks/results"
    speed = json.loads((results / "certified_speed.json").read_text())["measured"]["rows"]
    model = json.loads((results / "certified_model_1.json").read_text())["measured"]
    (row,) = (r for r in speed if r["shape"] == [4096, 4096] and r["kind"] == "trained")
    readme = " ".join(shown(ROOT / "README.md").split())
    assert f"takes {row['seconds']:.1f} s where two SVDs take {row['two_svds']:.0f} s" in readme
    assert f"shape of 7B, {model['gigabytes']:.0f} GB in bfloat16" in readme
    assert f"none elsewhere, in {model['seconds']:.0f} s on two cores" in readme
    assert model["planted_found"] == model["planted_matrices"]
    assert model["found_elsewhere"] == 0


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


def test_the_readme_quotes_the_stored_speeds():
    results = ROOT / "benchmarks/results"
    rows = json.loads((results / "triplet.json").read_text())["measured"]["rows"]
    bad = json.loads((results / "bad_gradients.json").read_text())["measured"]
    training = json.loads((results / "training_step.json").read_text())["measured"]["rows"]
    readme = " ".join(shown(ROOT / "README.md").split())
    for spectrum in ("gaussian", "decaying", "spiked"):
        (row,) = (r for r in rows if (r["n"], r["spectrum"]) == (2048, spectrum))
        assert f"{row['svd_ratio']:.0f} times" in readme, spectrum
    assert f"{bad['bad']} of {bad['seeds']:,}" in readme
    assert f"{bad['error_largest']:.1e}" in readme
    assert f"{bad['default_lstsq_bad']} of {bad['default_lstsq_seeds']}" in readme
    (row,) = (r for r in training if r["width"] == 1024)
    assert f"{row['cap_over_torch']:.2f} times" in readme
    assert f"{row['torch_norm_largest']:.3f}" in readme
    assert f"{row['cap_norm_largest'] - 1:.0e}" in readme


def test_the_readme_quotes_the_stored_predictions():
    results = ROOT / "benchmarks/results"
    stored = json.loads((results / "predicted.json").read_text())["measured"]
    alarms = json.loads((results / "alarms.json").read_text())["measured"]["rows"]
    readme = " ".join(shown(ROOT / "README.md").split())
    others = stored["matrices"] - stored["with_intruders"]
    assert f"of the {stored['with_intruders']} matrices with intruders" in readme
    assert f"{stored['with_intruders_above']} have a spike above their θ_c" in readme
    assert f"of the {others} others {stored['without_intruders_above']}." in readme
    assert f"R² = {stored['encoder']['location_r2']:.2f}, and" in readme
    assert f"R² = {stored['random_vectors']['location_r2']:.2f} once" in readme
    rates = [100 * row["fitted"]["0.05"] for row in alarms]
    assert f"{min(rates):.1f} to {max(rates):.1f} % of pure noise" in readme


def test_the_readme_quotes_the_stored_repairs():
    stored = json.loads((ROOT / "benchmarks/results/repair.json").read_text())["measured"]["rows"]
    rows = {(row["adapter"], row["method"]): row for row in stored}
    readme = " ".join(shown(ROOT / "README.md").split())
    for rank in (1, 8):
        before, after = (rows[f"lora-r{rank}", method] for method in ("as trained", "clip"))
        assert (
            f"{before['after']['encoder']} directions in the encoder before, "
            f"{after['after']['encoder']} after, accuracy {100 * before['accuracy']:.1f} % and "
            f"{100 * after['accuracy']:.1f} %"
        ) in readme, rank


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


def test_the_readme_quotes_the_fine_tunes():
    results = ROOT / "benchmarks/results"
    stored = json.loads((results / "finetune.json").read_text())["measured"]["rows"]
    readme = " ".join(shown(ROOT / "README.md").split())
    for method in ("lora-r8", "lora-r8+clip", "lora-r16+controller", "orthonormal-r8"):
        runs = sorted((r for r in stored if r["method"] == method), key=lambda r: r["seed"])
        counts = ", ".join(str(r["intruder"] + r["rotated"]) for r in runs)
        accuracy = 100 * sum(r["accuracy"] for r in runs) / len(runs)
        assert re.search(
            rf"{counts} (new directions into the encoder )?at {accuracy:.1f} %", readme
        )
