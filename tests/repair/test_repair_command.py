"""``bulkedge repair``: options, output, exit codes."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import commands
from bulkedge import RepairRecord
from bulkedge.cli import cli, repair
from bulkedge.cli._repair import NAMES
from bulkedge.moments import Moments
from bulkedge.repairing import METHODS
from cases import gaussian, orthonormal
from helpers import save, save_adapter, some


@pytest.fixture
def pair(tmp_path):
    W0 = gaussian(40, 30).float()
    save(tmp_path / "base.safetensors", {"a.weight": W0, "b\x1b[31m.weight": W0})
    tensors = {}
    for name in ("a", "b\x1b[31m"):
        tensors[f"{name}.lora_A.weight"] = orthonormal(30, 2, 2).mT.float()
        tensors[f"{name}.lora_B.weight"] = (40 * orthonormal(40, 2, 1)).float()
    adapter = save_adapter(tmp_path / "tuned", tensors, r=2, lora_alpha=2)
    (adapter / "optimizer.pt").write_bytes(b"")
    return str(tmp_path / "base.safetensors"), str(adapter)


def run(*arguments):
    return CliRunner().invoke(cli, ["repair", *map(str, arguments), "-k", "3"])


@pytest.mark.parametrize(
    ("options", "settings", "rank"),
    [
        ([], {"name": "clip", "level": 1.0, "rounds": 10}, 2),
        (["--method", "project"], {"name": "project", "rounds": 5}, 2),
        (["--method", "scale", "--keep", "0.0"], {"name": "scale", "keep": 0.0, "rounds": 1}, 4),
        (["--method", "clip", "--level", "0.5", "--rounds", "2"],
         {"name": "clip", "level": 0.5, "rounds": 2}, 2),
        (["--method", "scale", "--max-rank", "3"], {"name": "scale", "keep": 0.0, "rounds": 1}, 3),
    ],
)  # fmt: skip
def test_methods_and_their_settings(options, settings, rank, pair, tmp_path):
    done = run(*pair, "-o", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    record = RepairRecord.from_json(tmp_path / "out/repair.json")
    assert record.method == settings
    assert {row.rank_after for row in record.matrices} == {rank}
    assert record.after.summary.new_directions == 0
    assert "4 directions new before, 0 after, 2 of 2 matrices" in done.stdout
    assert "\x1b" not in done.output
    assert "b\\x1b[31m " in done.stdout
    assert "not carried over: optimizer.pt" in done.stdout
    assert f"repaired copy written to {tmp_path / 'out'}" in done.stderr


def test_the_command_names_every_method():
    assert (*METHODS, "protect", "rescale") == NAMES


def test_what_remains_is_a_finding(pair, tmp_path):
    options = ["--method", "scale", "--keep", "0.9"]
    assert run(*pair, "-o", tmp_path / "1", *options).exit_code == 1
    assert run(*pair, "-o", tmp_path / "2", *options, "--fail-on", "never").exit_code == 0
    done = run(*pair, "-o", tmp_path / "3", *options, "-q")
    assert done.exit_code == 1
    verdict, doubt, settings = done.stdout.splitlines()
    assert verdict.startswith("scale: 4 directions new before, 4 after")
    assert doubt.startswith("doubt: In a.weight the update is larger than the base's matrix")
    assert settings == "settings: top_k=3"
    assert done.stderr.startswith("exit code 1, --fail-on rotated: new directions in 2 matrices")


def test_a_dry_run(pair, tmp_path):
    done = run(*pair, "--dry-run", "--record", tmp_path / "r.json")
    assert done.exit_code == 1  # of the fine-tune as it is
    assert "would repair 2 matrices with 4 directions new" in done.stdout
    assert RepairRecord.from_json(tmp_path / "r.json").after is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "r.json", "tuned"]
    inside = run(*pair, "--dry-run", "--force", "--record", f"{pair[1]}/adapter_config.json")
    assert "lies inside the input" in str(inside.exception)
    again = run(*pair, "--dry-run", "--record", tmp_path / "r.json")
    assert again.exit_code != 0
    assert "r.json: exists" in str(again.exception)
    assert run(*pair, "--dry-run", "--record", tmp_path / "r.json", "--force").exit_code == 1


def test_json_and_selections(pair, tmp_path):
    done = run(*pair, "-o", tmp_path / "out", "--json", "--only", "a.*", "--select", "intruder",
               "--significance", "0.01", "--side", "both")  # fmt: skip
    record = json.loads(done.stdout)
    assert [row["name"] for row in record["matrices"]] == ["a.weight"]
    assert record["selection"] == {"select": "intruder", "significance": 0.01}
    assert record["before"]["recipe"]["side"] == "both"
    assert done.exit_code == 1  # b is as it was


def test_refusals_are_loud(tmp_path):
    W0 = gaussian(48, 16).float()
    base = save(tmp_path / "b.safetensors", {"mha.in_proj_weight": W0})
    tensors = {
        "mha.lora_A.weight": orthonormal(16, 2, 2).mT.float(),
        "mha.lora_B.weight": 60 * orthonormal(48, 2, 1).float(),
    }
    adapter = save_adapter(tmp_path / "tuned", tensors, r=2, lora_alpha=2)
    done = run(base, adapter, "-o", tmp_path / "out")
    assert "NOT repaired: mha.in_proj_weight: MultiheadAttention" in done.stdout
    assert f"nothing was repaired: {tmp_path / 'out'} is not written" in done.stderr
    assert done.exit_code == 2
    refused = "; 1 of 1 matrix to be treated REFUSED, such as mha.in_proj_weight"
    for method in ((), ("--method", "rescale", "--uniform", "0.5")):
        done = run(base, adapter, "--dry-run", "-q", "--fail-on", "never", *method)
        assert refused in done.stdout
        assert done.exit_code == 2


def test_a_drift_is_not_met_where_a_layer_is_refused(pair, tmp_path):
    base, tuned = pair
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(30, 40)})
    model["a"].weight.data = gaussian(40, 30).float()
    with Moments(model) as moments, torch.no_grad():
        model["a"](gaussian(80, 30).float())
    moments.save(tmp_path / "a.moments")
    protect = ("--method", "protect", "--moments", tmp_path / "a.moments", "--dry-run", "-q")
    done = run(base, tuned, *protect, "--target-drift", "0.01")
    assert "; 1 of 2 matrices to be treated REFUSED, such as b" in done.stdout
    assert "(not in the mean)" in done.stdout
    assert done.exit_code == 2
    assert run(base, tuned, *protect, "--only", "a.weight").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0.5", "-o", "out"], "--keep is no setting of clip"),
        (["--method", "scale", "--level", "1", "-o", "out"], "settings are --keep, --rounds"),
        (["--method", "scale", "--keep", "2", "-o", "out"], "expected keep between 0 and 1, got 2"),
        ([], "name the folder to be written"),
        (["-o", "out", "--dry-run"], "--dry-run writes nothing"),
        (["--method", "nothing", "-o", "out"], "Invalid value for '--method'"),
    ],
)
def test_options_that_make_no_sense(options, message, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*pair, *options)
    assert done.exit_code != 0
    assert message in done.output + str(done.exception)
    assert not (tmp_path / "out").exists()


def test_an_incomplete_audit_is_a_failure(tmp_path):
    base = save(tmp_path / "b.safetensors", {"a.weight": gaussian(40, 30).float()})
    tensors = {
        "a.lora_A.weight": orthonormal(30, 2, 2).mT.float(),
        "a.lora_B.weight": 0.01 * orthonormal(40, 2, 1).float(),
        "stranger.lora_A.weight": torch.ones(2, 5),
        "stranger.lora_B.weight": torch.ones(5, 2),
    }
    adapter = save_adapter(tmp_path / "tuned", tensors, r=2, lora_alpha=2)
    done = run(base, adapter, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "nothing can be repaired; not everything could be judged" in done.stdout
    assert "NOT judged: 2, such as stranger.lora_A.weight" in done.stdout
    assert not (tmp_path / "out").exists()
    tensors["a.lora_B.weight"] = 20 * orthonormal(40, 2, 1).float()  # and one to be repaired
    adapter = save_adapter(tmp_path / "found", tensors, r=2, lora_alpha=2)
    done = run(base, adapter, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "the audit of the output is NOT complete" in done.stdout
    assert (tmp_path / "out").is_dir()


def test_force_is_not_for_the_copy(pair, tmp_path):
    def refusal(*more):
        ended = commands.run("repair", *pair, "-o", tmp_path, *more)
        assert ended.returncode == 2
        return ended.stderr

    assert "exists; a repair is never written over anything, name another" in refusal()
    assert "--force" not in refusal()
    assert "(--force is for the files of --record and --report only)" in refusal("--force")


def test_help_and_page_tell_the_exit_code_of_a_dry_run():
    (option,) = (option for option in repair.params if option.name == "dry_run")
    assert "The exit code is the audit's" in option.help
    page = (Path(__file__).parents[2] / "docs/repair.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| `--dry-run`"))
    assert "the exit code is that of the audit: 1 if there is something to repair" in row


def test_protect_by_files_of_moments(pair, tmp_path):
    """Its exit code does not count intruders, unless it is asked to."""
    base, tuned = pair
    model = torch.nn.ModuleDict({name: torch.nn.Linear(30, 40) for name in ("a", "b\x1b[31m")})
    for layer in model.values():
        layer.weight.data = gaussian(40, 30).float()
    with Moments(model) as moments, torch.no_grad():
        for layer in model.values():
            layer(gaussian(80, 30).float())
    moments.save(tmp_path / "base.moments")
    protect = ("--method", "protect", "--moments", tmp_path / "base.moments", "--strength", "2")
    done = run(base, tuned, "-o", tmp_path / "out", *protect)
    assert done.exit_code == 0, done.output
    assert "; mean drift on the base's inputs " in done.stdout
    record = RepairRecord.from_json(tmp_path / "out/repair.json")
    assert record.method == {
        "name": "protect", "strength": 2.0, "target_drift": None, "balance": "output",
        "task_moments": False, "ridge": 0.03, "sides": "one", "rounds": 1,
    }  # fmt: skip
    for row in some(record.matrices):
        assert row.drift_after < row.drift_before
        assert row.task_change is None
    assert "to the task's inputs" not in done.stdout
    of_task = ("--task-moments", tmp_path / "base.moments")
    done = run(base, tuned, "-o", tmp_path / "tasked", *protect, *of_task)
    record = RepairRecord.from_json(tmp_path / "tasked/repair.json")
    for row in some(record.matrices):
        assert 0.4 < row.task_change < 0.5  # of equal moments (λ/(1 + λ))², λ = 2
    assert "to the task's inputs by 44% (mean square)" in " ".join(done.stdout.split())
    aimed = (*protect[:-2], "--target-drift", "0.01", "--balance", "layer")
    done = run(base, tuned, "-o", tmp_path / "aimed", *aimed)
    found = RepairRecord.from_json(tmp_path / "aimed/repair.json")
    assert found.method["target_drift"] == 0.01
    assert found.method["balance"] == "layer"
    drifts = [row.drift_after for row in some(found.matrices)]
    assert sum(drifts) / len(drifts) == pytest.approx(0.01, rel=1e-2)
    strict = run(base, tuned, "-o", tmp_path / "again", *protect, "--fail-on", "rotated")
    assert strict.exit_code == (1 if record.after.summary.new_directions else 0)
    for options, message in (
        (["--method", "protect"], "needs --moments FILE"),
        (["--strength", "2"], "--strength is no setting of clip"),
        ([*protect, "--target-drift", "1"], "a strength or a target drift, got both"),
        (
            [*protect, "--level", "1"],
            "settings are --moments, --task-moments, --strength, --target-drift, --balance",
        ),
    ):
        done = run(base, tuned, "-o", tmp_path / "none", *options)
        assert message in done.output + str(done.exception)


def test_the_cost_is_of_the_matrices_that_changed(pair):
    """A reader takes what no number of matrices follows for the whole model."""
    for only, number in (("a*", 1), ("*", 2)):
        done = run(*pair, "--dry-run", "--method", "rescale", "--uniform", "0.3", "--only", only)
        where = " in 1 of 2 matrices" if number == 1 else ""
        each = "the update in 1 of 2 matrices (a)" if where else "each update on average"
        assert f"the repair changed 70% of {each}" in done.stdout
        assert f"WARNING: more than half of the update is gone{where}, and" in done.stdout


@pytest.mark.parametrize("option", ["--record", "--report"])
@pytest.mark.parametrize(
    "place",
    ["copy/tuned.html", "copy/sub/x.html", "link/copy/x.html", "copy.html", "copy/../copy/a.html"],
)
def test_no_other_output_lies_in_the_copy(option, place, pair, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    copy = tmp_path / ("copy.html" if place == "copy.html" else "copy")
    given = "-o", copy, option, tmp_path / place, "--force"
    result = commands.run("repair", *pair, "-k", "3", *given)
    assert result.returncode == 2
    assert f"{tmp_path / place}: lies in the folder of the copy" in result.stderr
    assert not copy.exists()


def test_an_output_is_not_the_folder_above_the_copy(pair, tmp_path):
    above = tmp_path / "r"
    result = commands.run("repair", *pair, "-o", above / "copy", "--record", above)
    assert result.returncode == 2
    assert "lies in the folder of the copy" in result.stderr
    assert not above.exists()
