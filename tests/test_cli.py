"""The command as a user types it."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from bulkedge import Recipe, Record
from bulkedge.cli import audit, cli
from bulkedge.cli._gate import GATE_FIELDS
from cases import gaussian, orthonormal
from commands import run
from helpers import save, save_adapter, some, weights

CLEAN, FINDINGS, FAILURE = 0, 1, 2


def process(*arguments, **environment):
    """What only a process of its own shows: streams, signals, its exit code."""
    return subprocess.run(
        [sys.executable, "-m", "bulkedge", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base, a harmless fine-tune, and one with an intruder in one of its two layers."""
    folder = tmp_path_factory.mktemp("inputs")
    base = {"a.weight": gaussian(120, 90), "b.weight": gaussian(90, 110)}
    spike = 40 * orthonormal(120, 1, 1) @ orthonormal(90, 1, 2).mT
    return {
        "base": save(folder / "base.safetensors", base),
        "clean": save(folder / "clean.safetensors", {n: W + 1e-4 for n, W in base.items()}),
        "found": save(folder / "f.safetensors", base | {"a.weight": base["a.weight"] + spike}),
    }


def test_exit_codes_are_a_linters(inputs):
    base, found = inputs["base"], inputs["found"]
    clean = run("audit", base, inputs["clean"])
    assert (clean.returncode, clean.stderr) == (CLEAN, "")
    assert clean.stdout.startswith("0 of 20 leading directions are new (score < 0.5)")
    assert run("audit", base, found).returncode == FINDINGS
    assert run("audit", base, found, "--fail-on", "intruder").returncode == FINDINGS
    assert run("audit", base, found, "--fail-on", "never").returncode == CLEAN
    assert run("audit", base, found, "--exclude", "a.*").returncode == FAILURE  # nothing changed


def test_a_base_against_itself_is_no_clean_audit(inputs):
    result = run("audit", inputs["base"], inputs["base"])
    assert result.returncode == FAILURE
    assert "all 2 matrices equal the base: there is no fine-tune here" in result.stdout


def test_a_matrix_that_cannot_be_audited_outranks_findings(inputs, tmp_path):
    broken = {"a.weight": weights(120, 90), "b.weight": torch.full((90, 110), torch.nan)}
    result = run("audit", inputs["base"], save(tmp_path / "t.safetensors", broken))
    assert result.returncode == FAILURE
    assert "not audited: b.weight: tuned holds 9900 NaN and 0 Inf" in result.stdout
    assert "1 matrix could NOT be audited" in result.stdout


def half_adapter(folder, *, known="a", stranger="zzz"):
    tensors = {
        f"base_model.model.{module}.lora_{factor}.weight": weights(*shape) * 1e-6
        for module in (known, stranger)
        for factor, shape in {"A": (2, 90), "B": (120, 2)}.items()
    }
    return save_adapter(folder, tensors)


def test_an_update_that_goes_unjudged_is_no_clean_audit(inputs, tmp_path):
    adapter = half_adapter(tmp_path / "a")
    result = run("audit", inputs["base"], adapter, "-q")
    assert result.returncode == FAILURE
    assert "2 tensors NOT judged (--exclude accepts that)" in result.stdout
    accepted = run("audit", inputs["base"], adapter, "-q", "--exclude", "zzz.*")
    assert accepted.returncode == CLEAN
    assert "NOT" not in accepted.stdout


def test_an_all_zero_model_and_an_undecided_one_are_no_clean_audits(inputs, tmp_path):
    shapes = {"a.weight": (120, 90), "b.weight": (90, 110)}
    zero = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert run("audit", inputs["base"], save(tmp_path / "z.safetensors", zero)).returncode == 2
    flat = {name: orthonormal(*shape) for name, shape in shapes.items() if name == "a.weight"}
    result = run("audit", inputs["base"], save(tmp_path / "f.safetensors", flat), "-q")
    assert result.returncode == FAILURE
    assert "10 directions UNDECIDED" in result.stdout


def test_table_and_verdict(inputs):
    ended = run("audit", inputs["base"], inputs["found"])
    assert ended.returncode == FINDINGS
    lines = ended.stdout.splitlines()
    assert lines[0].split() == ["matrix", "ΔW/W₀", "ΔW/θ_k", "rotated", "intruder", "worst"]
    assert lines[1].split()[0] == "a"
    assert lines[1].split()[3:5] == ["0", "1"]
    (row, _) = json.loads(run("audit", inputs["base"], inputs["found"], "--json").stdout)[
        "matrices"
    ]
    norm = row["spectral_norm_update"]
    ratios = norm / row["spectral_norm_base"], norm / row["top_k_threshold"]
    assert lines[1].split()[1:3] == [f"{ratio:.2f}" for ratio in ratios]
    assert lines[2] == ""
    assert lines[3] == (
        "1 of 10 leading directions is new (score < 0.5), in 1 of 1 matrix: 0 rotated, 1 intruder; "
        "1 matrix unchanged"
    )
    assert lines[4].startswith("certainty: every verdict is ")
    assert re.match(r"weaker: 0\.\d+ of its strength may leave no new direction, a guess", lines[5])
    assert lines[-3] == (
        "files: 2 tensors of two or more dimensions in the base and 2 in the fine-tune: "
        "2 compared, 2 equal, 0 lost, 0 excluded, 0 without a counterpart to compare with"
    )
    assert lines[-2] == "next: leave out a, whose base looks untrained: all is new there"
    assert lines[-1] == f"  bulkedge audit {inputs['base']} {inputs['found']} --exclude a"


def test_json_quiet_and_output(inputs, tmp_path):
    out = tmp_path / "deep" / "out"
    result = run("audit", inputs["base"], inputs["found"], "--json", "-o", out)
    assert result.returncode == FINDINGS
    assert f"record written to {out / 'record.json'}" in result.stderr
    assert result.stdout == (out / "record.json").read_text()
    assert Record.from_json(out / "record.json").summary.new_directions == 1
    assert {path.name for path in out.iterdir()} == {"record.json", "journal.jsonl"}

    again = run("audit", inputs["base"], inputs["found"], "-q", "-o", out)
    assert again.returncode == FAILURE
    assert "exists; give another folder, or --force" in again.stderr
    forced = run("audit", inputs["base"], inputs["found"], "-q", "-o", out, "--force")
    assert forced.returncode == FINDINGS
    (line,) = forced.stderr.splitlines()
    assert line.startswith("exit code 1, --fail-on rotated: new directions in 1 matrix")
    assert len(forced.stdout.splitlines()) == 1


def test_dry_run_computes_and_writes_nothing(inputs, tmp_path):
    result = run("audit", inputs["base"], inputs["found"], "--dry-run", "-o", tmp_path / "out")
    assert result.returncode == CLEAN
    assert "a.weight 120×90 F64" in result.stdout
    data = json.loads(run("audit", inputs["base"], inputs["found"], "--dry-run", "--json").stdout)
    assert (data["matrices"], data["skipped"], data["lost"]) == (2, 0, 0)
    assert not (tmp_path / "out").exists()


def test_recipe_file_and_options_that_override_it(inputs, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump({"top_k": 4, "side": "both", "include": ["a.*"]}))
    arguments = ("audit", inputs["base"], inputs["found"], "--json", "--recipe", config)
    recipe = json.loads(run(*arguments).stdout)["recipe"]
    assert (recipe["top_k"], recipe["side"], recipe["include"]) == (4, "both", ["a.*"])
    recipe = json.loads(run(*arguments, "-k", 2, "--side", "right").stdout)["recipe"]
    assert (recipe["top_k"], recipe["side"], recipe["include"]) == (2, "right", ["a.*"])
    config.write_text("top_n: 4")
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (FAILURE, "")
    told = f"bulkedge: {config}: unknown field 'top_n'; did you mean top_k? (the fields are"
    assert told in result.stderr
    fields = result.stderr.partition("(the fields are ")[2].partition(")")[0].split(", ")
    assert fields == [*Recipe.model_fields, *GATE_FIELDS]  # all that such a file may have


def test_the_help_tells_the_defaults_of_the_recipe():
    options = {option.name: option for option in audit.params}
    assert set(Recipe.model_fields) - set(options) <= {"split"}  # a mapping: in a file alone
    for name, field in some(Recipe.model_fields.items()):
        if name not in options:
            continue
        option = options[name]
        if field.default != ():
            assert option.help.endswith(f"[default: {field.default}]")


def test_several_jobs(inputs):
    alone, pair = (run("audit", inputs["base"], inputs["found"], "-j", n) for n in (1, 2))
    assert alone.returncode == pair.returncode == FINDINGS
    assert "1 intruder" in alone.stdout
    assert alone.stdout == pair.stdout


BAD = {
    "missing": (["nowhere", "f"], "nowhere: no such file or folder"),
    "shape": (["base", "other"], "tensor 'a.weight' has shape (3, 3), expected (120, 90)"),
    "epsilon": (
        ["base", "f", "--epsilon", "7"],
        "bulkedge: --epsilon: at most 1, got 7.0",
    ),
    "device": (["base", "f", "--device", "tpu"], "--device: use cpu, cuda or cuda:0, got"),
    "cuda": (["base", "f", "--device", "cuda:99"], "device 'cuda:99': torch"),
    "option": (["base", "f", "--frobnicate"], "No such option"),
    "side": (["base", "f", "--side", "up"], "'up' is not one of"),
    "nothing": (["base", "f", "--include", "zzz"], "'zzz' matches no tensor of either side"),
    "output_file": (["base", "f", "-o", "taken"], "is a file; give a folder"),
    "record_folder": (["base", "f", "--force", "-o", "made"], "record.json in it is a folder"),
    "output_inside": (["folder", "f", "-o", "folder/out"], "lies inside the input"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, inputs, tmp_path):
    arguments, message = BAD[case]
    save(tmp_path / "folder/model.safetensors", {"a.weight": weights(120, 90)})
    (tmp_path / "taken").touch()
    (tmp_path / "made/record.json").mkdir(parents=True)
    places = {
        "base": inputs["base"],
        "f": inputs["found"],
        "other": save(tmp_path / "o.safetensors", {"a.weight": weights(3, 3)}),
    }
    places |= {
        name: tmp_path / name for name in ("nowhere", "taken", "made", "folder", "folder/out")
    }
    out = [] if "-o" in arguments else ["-o", tmp_path / "out"]
    result = run("audit", *(places.get(a, a) for a in arguments), *out)
    assert (result.returncode, result.stdout) == (FAILURE, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "folder/out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output(inputs, tmp_path):
    tmp_path.chmod(0o500)
    result = run("audit", inputs["base"], inputs["found"], "-o", tmp_path / "out")
    assert result.returncode == FAILURE
    assert "is not writable" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "x" * 300], "File name too long"),
        (["--dry-run", "--device", "cuda:99"], "device 'cuda:99'"),
        (["--device", "cuda:" + "9" * 5000], "--device: use cpu, cuda or cuda:0, got"),
    ],
    ids=["long output", "dry run without the device", "device of many digits"],
)
def test_whatever_goes_wrong_is_one_line_and_exit_code_2(arguments, message, inputs):
    result = run("audit", inputs["base"], inputs["found"], *arguments)
    assert result.returncode == FAILURE
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("option", ["-q", "--json"])
def test_a_full_disk_behind_a_pipe_is_no_finding(option, inputs):
    command = [sys.executable, "-m", "bulkedge", "audit", inputs["base"], inputs["found"], option]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode not in (CLEAN, FINDINGS)


def test_an_empty_output_folder_is_as_good_as_none(inputs, tmp_path):
    result = run("audit", inputs["base"], inputs["clean"], "-o", tmp_path)
    assert result.returncode == CLEAN
    assert (tmp_path / "record.json").is_file()


def test_a_bug_is_one_line_with_a_way_to_see_more(monkeypatch, capsys):
    def fail(*_, **__):
        raise ZeroDivisionError("oh")

    from bulkedge import cli

    monkeypatch.setattr(cli, "cli", fail)
    monkeypatch.delenv("BULKEDGE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "ZeroDivisionError: oh; set BULKEDGE_TRACEBACK=1" in capsys.readouterr().err
    monkeypatch.setenv("BULKEDGE_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_terminal_without_unicode_gets_escapes(inputs):
    result = process("audit", inputs["base"], inputs["found"], PYTHONIOENCODING="ascii")
    assert result.returncode == FINDINGS
    assert r"\u0394W" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_a_path_that_is_no_text(inputs, tmp_path):
    odd = os.fsencode(tmp_path) + b"/base\xff.safetensors"
    with open(odd, "wb") as file:
        file.write(inputs["base"].read_bytes())
    command = [sys.executable, "-m", "bulkedge", "audit", odd, inputs["found"], "--json"]
    result = subprocess.run(command, capture_output=True)
    assert result.returncode == FINDINGS, result.stderr
    assert json.loads(result.stdout)["inputs"]["base"]["path"].endswith(r"base\xff.safetensors")


def test_a_record_that_cannot_be_written(inputs, tmp_path, monkeypatch):
    from bulkedge import OutputError
    from bulkedge.cli._output import write

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match=r"cannot be written .No space left"):
        write(tmp_path / "out/record.json", "{}")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_noticed_first(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    monkeypatch.setattr("bulkedge.auditing.run_plan", None)
    arguments = ["audit", inputs["base"], inputs["found"], "-o", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["bulkedge", *map(str, arguments)])
    from bulkedge.cli import main

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "10 bytes free, record and journal need about" in capsys.readouterr().err


def test_an_output_link_is_replaced_not_followed(inputs, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/record.json").symlink_to(victim)
    ended = run("audit", inputs["base"], inputs["found"], "-o", tmp_path / "out", "--force")
    assert ended.returncode == FINDINGS, ended.stderr
    assert victim.read_text() == "precious"
    assert not (tmp_path / "out/record.json").is_symlink()


def bare(record):
    """What must be equal in equal audits."""
    return json.loads(record.read_text()) | {"run": None}


def hear_interrupts():
    """In a child: a shell starts what is in its background with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_rows(journal, count, process):
    """Until so many matrices are on disk."""
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "it ended before its time"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("jobs", "sent", "codes", "word"),
    [
        # CPython dies of the signal itself where it arrived within an exec(), as imports do: a
        # shell shows 130 for either
        ("1", signal.SIGINT, (130, -signal.SIGINT), "interrupted"),  # as a terminal does
        ("2", signal.SIGINT, (130, -signal.SIGINT), "interrupted"),
        ("2", signal.SIGTERM, (143,), "terminated"),  # as a CI runner does
    ],
)
def test_interruption_keeps_what_is_finished(jobs, sent, codes, word, tmp_path):
    big = {f"l{i}.weight": weights(300, 300, seed=i) for i in range(30)}
    base = save(tmp_path / "b.safetensors", big)
    tuned = save(tmp_path / "t.safetensors", {name: W + 1 for name, W in big.items()})
    out = tmp_path / "out"
    arguments = ["audit", base, tuned, "-o", out, "-j", jobs, "--fail-on", "never"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bulkedge", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )
    wait_for_rows(out / "journal.jsonl", 2, process)
    os.killpg(process.pid, sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode in codes
    kept = f"finished matrices are kept in {out / 'journal.jsonl'}; --resume continues from there"
    assert error.split("\n") == [kept, "", word, ""]
    assert not (out / "record.json").exists()
    refused = run(*arguments)
    assert refused.returncode == FAILURE
    assert "--resume to resume from its journal" in refused.stderr
    resumed = run(*arguments, "--resume", "-j", 1)
    assert resumed.returncode == CLEAN, resumed.stderr
    taken = Record.from_json(out / "record.json").run.resumed
    assert 2 <= taken < 30
    assert f"journal.jsonl: {taken} of 30 matrices taken from it" in resumed.stderr
    assert run(*arguments[:3], "-q", "-o", tmp_path / "whole").returncode in (CLEAN, FINDINGS)
    assert bare(out / "record.json") == bare(tmp_path / "whole/record.json")


@pytest.mark.parametrize("command", ["budget", "several"])
def test_interrupted_work_names_its_journals(command, tmp_path):
    big = {f"l{i}.weight": weights(300, 300, seed=i) for i in range(30)}
    base, out = save(tmp_path / "b.safetensors", big), tmp_path / "out"
    for name in ("t", "u"):
        save(tmp_path / f"{name}.safetensors", {n: W + 1 for n, W in big.items()})
    arguments = ["budget", base, "-o", out]
    first, where = out / "journal.jsonl", str(out / "journal.jsonl")
    if command == "several":
        tuned = [tmp_path / "t.safetensors", tmp_path / "u.safetensors"]
        arguments = ["audit", base, *tuned, "-o", out, "--fail-on", "never"]
        first, where = out / "t" / "journal.jsonl", f"2 journals in {out}"
    process = subprocess.Popen(
        [sys.executable, "-m", "bulkedge", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )
    wait_for_rows(first, 2, process)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert f"finished matrices are kept in {where}; --resume continues from there" in error
    resumed = run(*arguments, "--resume")
    assert resumed.returncode == CLEAN, resumed.stderr
    assert "matrices taken from it" in resumed.stderr


def test_resume_of_a_finished_audit_computes_nothing(inputs, tmp_path):
    arguments = ("audit", inputs["base"], inputs["found"], "-o", tmp_path / "new", "--resume")
    first = run(*arguments)
    assert first.returncode == FINDINGS, first.stderr
    second = run(*arguments)
    assert second.stdout == first.stdout
    assert "2 of 2 matrices taken from it" in second.stderr
    assert Record.from_json(tmp_path / "new/record.json").run.resumed == 2


def test_a_dead_worker_leaves_the_journal_and_says_so(inputs, tmp_path, monkeypatch, capsys):
    from bulkedge import BulkedgeError
    from bulkedge.auditing import LocalEngine
    from bulkedge.cli import cli

    def die(*_):
        yield from ()
        raise BulkedgeError("a worker process died")

    monkeypatch.setattr(LocalEngine, "rows", die)
    out = tmp_path / "out"
    with pytest.raises(BulkedgeError, match=r"a worker process died"):
        cli(
            ["audit", str(inputs["base"]), str(inputs["found"]), "-o", str(out)],
            standalone_mode=False,
        )
    assert f"kept in {out / 'journal.jsonl'}; --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "--resume needs the folder of the journal (--output DIR)"),
        (
            ["--shard", "1/2", "-o", "out", "--moments", "m", "--max-drift", "1"],
            "--max-drift judges the whole audit: give it to `bulkedge merge`",
        ),
        (["--shard", "1/2"], "--shard needs the folder of the journal (--output DIR)"),
        (["--resume", "--force", "-o", "out"], "--resume continues what --force would replace"),
        (["--shard", "1", "-o", "out"], "expected I/N such as 2/8, got '1'"),
        (["--shard", "0/2", "-o", "out"], "expected a shard I/N with 1 ≤ I ≤ N, got 0/2"),
        (["--engine", "ray", "-j", "2"], "--jobs is for this machine"),
        (["--engine", "ray"], "Ray address 'auto': expected RAY_AUTH_MODE=token"),
        (["--resume", "-o", "used"], "exists without a journal.jsonl to resume"),
    ],
)
def test_options_that_do_not_go_together(options, message, inputs, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/thesis.tex").touch()
    places = {"out": tmp_path / "out", "used": tmp_path / "used"}
    command = ("audit", inputs["base"], inputs["found"], *(places.get(o, o) for o in options))
    result = run(*command, RAY_AUTH_MODE="disabled")
    assert (result.returncode, result.stdout) == (FAILURE, "")
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


# ---- names that strangers chose

HOSTILE = ["x[/bold].weight", "y\x1b[31m\r\nfake.weight", "=cmd|'/c calc'.weight", "‮rtl.weight"]


def test_hostile_names_stay_inert(tmp_path):
    base = {name: gaussian(120, 90) for name in HOSTILE}
    spike = 40 * orthonormal(120, 1, 1) @ orthonormal(90, 1, 2).mT
    tuned = {name: W + spike for name, W in base.items()} | {"\x1b]0;x\x07.bias": weights(3)}
    paths = save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)
    for command in (("audit", *paths), ("inspect", paths[1]), ("audit", *paths, "--dry-run")):
        result = run(*command)
        assert result.returncode in (CLEAN, FINDINGS)
        assert not set(result.stdout + result.stderr) & set("\x1b\r\x07\u202e")
    assert "x[/bold] " in run("audit", *paths).stdout
    data = json.loads(run("audit", *paths, "--json").stdout)
    assert {matrix["name"] for matrix in data["matrices"]} == set(HOSTILE)


def test_errors_quote_hostile_names(tmp_path):
    base = save(tmp_path / "b.safetensors", {"a\x1b[31m.weight": weights(4, 4)})
    tuned = save(tmp_path / "t.safetensors", {"a\x1b[31m.weight": weights(5, 5)})
    result = run("audit", base, tuned)
    assert result.returncode == FAILURE
    assert "\x1b" not in result.stderr
    assert r"'a\x1b[31m.weight'" in result.stderr


# ---- the other commands


def test_inspect(inputs, tmp_path):
    lines = run("inspect", inputs["base"]).stdout.splitlines()
    assert lines == [
        "a.weight  F64  120×90", "b.weight  F64  90×110", "full model: 2 tensors in one file",
    ]  # fmt: skip
    adapter = save_adapter(
        tmp_path / "a",
        {
            "base_model.model.a.lora_A.weight": weights(2, 90),
            "base_model.model.a.lora_B.weight": weights(120, 2),
            "base_model.model.a.lora_B.bias": weights(120),
            "base_model.model.head.weight": weights(3, 90),
        },
    )
    assert run("inspect", adapter).stdout.splitlines() == [
        "a.weight  F32  120×90  lora r=2 scale=2",
        "head.weight  F32  3×90",
        "base_model.model.a.lora_B.bias  (1-D tensor: not a matrix)",
        "LoRA adapter by PEFT: 1 layer updated by factors of rank 2, 1 tensor replaced",
    ]
    rows = json.loads(run("inspect", adapter, "--json").stdout)
    assert rows[0] == {
        "name": "a.weight", "shape": [120, 90], "dtype": "F32", "rank": 2, "scale": 2.0,
    }  # fmt: skip
    missing = process("inspect", tmp_path / "nowhere")
    assert (missing.returncode, missing.stdout) == (FAILURE, "")


def test_inspect_tells_which_layers_cannot_be_used_and_sums_up(tmp_path):
    tensors = {
        f"base_model.model.{module}.lora_{factor}.weight": weights(*shape)
        for module, rank in (("a", 1), ("b", 2), ("c", 3))
        for factor, shape in {"A": (rank, 90), "B": (120, rank)}.items()
    }
    del tensors["base_model.model.b.lora_A.weight"]
    settings = {"rank_pattern": {"c": 3}, "base_model_name_or_path": "my/base\x1b"}
    adapter = save_adapter(tmp_path / "a", tensors, **settings)
    ended = run("inspect", adapter)
    assert ended.returncode == CLEAN, ended.stderr
    *layers, summary = ended.stdout.splitlines()
    assert layers[0] == "c.weight  F32  120×90  lora r=3 scale=1.33333"
    told = dict(some(line.split("  NOT usable: ") for line in layers[1:]))
    assert set(told) == {"a.weight", "b.weight"}  # one line a layer
    assert "rank 1" in told["a.weight"]
    assert "lora_B" in told["b.weight"]
    assert summary == (
        "LoRA adapter by PEFT: 1 layer updated by factors of rank 3, 2 layers NOT usable; "
        r"trained on my/base\x1b"
    )
    rows = json.loads(run("inspect", adapter, "--json").stdout)
    assert [row["name"] for row in rows if "not_usable" in row] == ["a.weight", "b.weight"]


def test_summaries_of_commands_are_whole_sentences():
    ended = process("--help")
    assert ended.returncode == CLEAN
    lines = [line for line in ended.stdout.splitlines() if re.match(r"  [a-z]+  ", line)]
    assert len(lines) == len(cli.commands) > 9
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-k", "0"], "bulkedge: --top-k: at least 1, got 0"),
        (["--device", "gpu"], "bulkedge: --device: use cpu, cuda or cuda:0, got 'gpu'"),
        (
            ["--exclude", "a.wieght"],
            "bulkedge: 'a.wieght' matches no tensor of either side; the nearest name is "
            "'a.weight'; `bulkedge inspect BASE` and `bulkedge inspect TUNED` list the names",
        ),
    ],
)
def test_a_bad_option_is_told_by_its_name(options, message, inputs):
    ended = run("audit", inputs["base"], inputs["found"], *options)
    assert (ended.returncode, ended.stderr) == (FAILURE, message + "\n")


def test_what_can_be_chosen_is_what_there_is():
    """Words that the options list, so that the help need not import what they stand for."""
    from bulkedge.cli import repair, report
    from bulkedge.intruder import COUNTED
    from bulkedge.repairing import METHODS
    from bulkedge.report import FORMATS

    def choices(command, name):
        (option,) = (option for option in command.params if option.name == name)
        return list(option.type.choices)

    counted = [verdict.value for verdict in COUNTED]
    assert choices(audit, "fail_on") == choices(repair, "fail_on") == [*counted, "never"]
    assert choices(repair, "select") == counted
    assert choices(report, "kind") == list(FORMATS)
    assert sorted(choices(repair, "method")) == sorted([*METHODS, "protect", "rescale"])


def test_help_and_inspect_load_neither_torch_nor_rich(inputs):
    code = (
        "import sys; from bulkedge.cli import cli\n"
        f"for argv in (['--help'], ['audit', '--help'], ['inspect', {str(inputs['base'])!r}]):\n"
        "    try: cli(argv, standalone_mode=False)\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'rich', 'numpy'} & set(sys.modules), sys.modules.keys()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
