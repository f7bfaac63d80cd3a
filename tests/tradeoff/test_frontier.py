"""A frontier from files to files: its copies, its numbers, and going on after a stop."""

import json
import shlex
import shutil
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import bulkedge
from bulkedge import CheckpointError, FrontierRecord, InputError, OutputError
from bulkedge.cli import cli
from bulkedge.moments import Moments
from bulkedge.repairing import Protect, Rescale
from bulkedge.tradeoff import copies, frontier
from helpers import save, save_adapter, some, weights

FEW = {"scales": (0.5, 0.25), "strengths": (1.0, 4.0)}
NAMES = ["as-trained", "scaled-0.5", "scaled-0.25", "protected-1", "protected-4"]
SCRIPT = """
import json, pathlib, sys
model = pathlib.Path(sys.argv[1])
alpha = json.loads((model / "adapter_config.json").read_text())["lora_alpha"]
pathlib.Path(sys.argv[2], "asked").open("a").write(model.name + "\\n")
print("a line that is no number")
print(json.dumps({"task": alpha, "kept": -alpha}))
"""


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 12))


def measured(seed, model=None):
    model = net() if model is None else model
    with Moments(model) as moments, torch.no_grad():
        model(weights(60, 16, seed=seed))
    return moments


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The files; nobody changes them."""
    folder = tmp_path_factory.mktemp("inputs")
    save(folder / "base.safetensors", dict(net().state_dict()))
    shapes = {"0.lora_A": (2, 16), "0.lora_B": (20, 2), "2.lora_A": (2, 20), "2.lora_B": (12, 2)}
    tensors = {
        f"base_model.model.{name}.weight": weights(*shape, seed=i)
        for i, (name, shape) in enumerate(shapes.items())
    }
    save_adapter(folder / "adapter", tensors)
    save(
        folder / "full.safetensors",
        {name: x + 0.3 * weights(*x.shape, seed=9) for name, x in net().state_dict().items()},
    )
    measured(1).save(folder / "base.moments")
    measured(2).save(folder / "task.moments")
    return folder


def alpha(path):
    """The numbers of a copy, known in advance of a scaled one."""
    scale = json.loads((path / "adapter_config.json").read_text())["lora_alpha"] / 4
    return {"task": scale, "kept": torch.tensor(1 - scale)}


def run(inputs, out, evaluate=alpha, tuned="adapter", **settings):
    given = {"moments": inputs / "base.moments", "task_moments": inputs / "task.moments"}
    return frontier(
        inputs / "base.safetensors", inputs / tuned, out, evaluate=evaluate,
        **given | FEW | settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """One of them, finished; tests that change it copy it first."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return run(inputs, out), out


def test_every_copy_is_what_repair_writes(inputs, finished, tmp_path):
    record, out = finished
    methods = {
        "scaled-0.5": Rescale(uniform=0.5),
        "protected-4": Protect(
            Moments.load(inputs / "base.moments"), Moments.load(inputs / "task.moments"), strength=4
        ),
    }
    for name, method in some(methods.items()):
        repaired = bulkedge.repair(
            inputs / "base.safetensors", inputs / "adapter", tmp_path / name, method=method
        )
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (out / name / file).read_bytes() == (tmp_path / name / file).read_bytes()
        kept = bulkedge.RepairRecord.from_json(out / name / "repair.json")
        assert kept.after is None
        assert kept.matrices == [
            row.model_copy(update={"intruders_after": None}) for row in repaired.matrices
        ]
    drifts = [row.drift_after for row in repaired.matrices]
    (last,) = (point for point in record.points if point.name == "protected-4")
    assert last.drift == pytest.approx(sum(drifts) / len(drifts), rel=1e-12)


def test_the_record_has_every_point_and_reads_back(finished):
    record, out = finished
    assert [point.name for point in record.points] == NAMES
    assert [point.values["task"] for point in record.points] == [1, 0.5, 0.25, 1, 1]
    assert (record.axes.task, record.axes.keep) == ("task", "kept")
    assert FrontierRecord.from_json(out / "frontier.json") == record
    assert record.evaluation.by == "function"
    assert record.evaluation.text.endswith("test_frontier.alpha")
    assert record.dominated == {}
    assert [(gain.reach, gain.gain) for gain in record.gains] == [("within", 0.0)] * 2


def test_the_command_of_a_point_makes_it(inputs, finished, tmp_path, monkeypatch):
    record, out = finished
    monkeypatch.chdir(tmp_path)
    for point in some(point for point in record.points if point.command):
        typed = shlex.split(point.command)
        assert typed[0] == "bulkedge"
        if point.name in ("scaled-0.25", "protected-1"):
            ended = CliRunner().invoke(cli, [*typed[1:], "--fail-on", "never"])
            assert (tmp_path / point.name).is_dir(), ended.output
            file = f"{point.name}/adapter_model.safetensors"
            assert (tmp_path / file).read_bytes() == (out / file).read_bytes()


def test_the_input_is_audited_once(inputs, tmp_path, monkeypatch):
    calls, audit = [], copies.run_plan
    monkeypatch.setattr(copies, "run_plan", lambda *a, **k: calls.append(1) or audit(*a, **k))
    run(inputs, tmp_path / "out")
    assert len(calls) == 1
    run(inputs, tmp_path / "out")
    assert len(calls) == 1


def test_a_checkpoint_and_its_base(inputs, tmp_path):
    seen = []

    def evaluate(path):
        seen.append(path)
        tensors = bulkedge.checkpoint.open_checkpoint(path).tensors
        return {"kept": len(tensors), "task": len(seen), "loss": 1.0}

    record = run(inputs, tmp_path / "out", evaluate, "full.safetensors", with_base=True,
                 task="task", lower=["loss"])  # fmt: skip
    assert seen[:2] == [inputs / "full.safetensors", inputs / "base.safetensors"]
    assert seen[2] == tmp_path / "out/scaled-0.5/full.safetensors"
    assert record.axes.keep == "kept"
    assert [point.arm for point in record.points[:2]] == ["trained", "base"]


def stopping(after):
    """An evaluation that is interrupted after some points, and what it was asked."""
    asked = []

    def evaluate(path):
        if len(asked) == after:
            raise KeyboardInterrupt
        asked.append(path.name)
        return alpha(path)

    evaluate.__qualname__ = "stopping"
    return evaluate, asked


def test_it_goes_on_after_a_kill(inputs, tmp_path):
    out, (evaluate, asked) = tmp_path / "out", stopping(2)
    with pytest.raises(KeyboardInterrupt):
        run(inputs, out, evaluate)
    assert asked == ["adapter", "scaled-0.5"]
    assert not (out / "frontier.json").exists()
    (out / ".scaled-0.25.half").mkdir()  # of a process that was killed while it wrote
    with (out / "points.jsonl").open("a") as journal:
        journal.write('{"key": "torn')
    written = (out / "scaled-0.5/adapter_config.json").stat().st_mtime_ns
    told, (evaluate, asked) = [], stopping(9)
    record = run(inputs, out, evaluate, notice=told.append, progress=lambda *a: told.append(a))
    assert asked == ["scaled-0.25", "protected-1", "protected-4"]
    assert record.run.resumed == 2
    assert (out / "scaled-0.5/adapter_config.json").stat().st_mtime_ns == written
    assert not list(out.glob(".*"))
    assert "3 of 5: scaled-0.25: task 0.25, kept 0.75" in told
    assert ("evaluating", "protected-4", 5, 5) in told


def test_more_strengths_are_added_to_those_of_before(inputs, tmp_path):
    out, (evaluate, asked) = tmp_path / "out", stopping(99)
    run(inputs, out, evaluate)
    record = run(inputs, out, evaluate, strengths=(1.0, 4.0, 20.0), task="kept", keep="task")
    assert asked[5:] == ["protected-20"]
    assert (record.axes.task, record.axes.keep) == ("kept", "task")
    shutil.rmtree(out / "scaled-0.5")  # who takes a copy away gets it again
    run(inputs, out, evaluate)
    assert asked[6:] == ["scaled-0.5"]


def test_a_folder_of_other_inputs_is_refused(inputs, finished, tmp_path):
    before = sorted(path.name for path in finished[1].iterdir())
    others = {
        "file of moments": {"moments": inputs / "task.moments"},
        "file of task moments": {"task_moments": None},
        "balance": {"balance": "layer"},
    }
    for what, settings in some(others.items()):
        with pytest.raises(
            OutputError, match=r"holds points of another .*; give another"
        ) as raised:
            run(inputs, finished[1], **settings)
        assert f"another {what};" in str(raised.value)
    shutil.copytree(inputs / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 5}))
    with pytest.raises(OutputError, match="holds points of another TUNED; give another folder"):
        run(inputs, finished[1], tuned=tmp_path / "adapter")
    assert sorted(path.name for path in finished[1].iterdir()) == before


def test_folders_that_hold_something_else(inputs, finished, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file; give a folder"):
        run(inputs, tmp_path / "file")
    with pytest.raises(OutputError, match="exists, and is not a frontier to resume"):
        run(inputs, tmp_path)
    with pytest.raises(OutputError, match="lies inside the input"):
        run(inputs, inputs / "adapter/out")
    out = tmp_path / "out"
    shutil.copytree(finished[1], out)
    (out / "protected-1/repair.json").unlink()
    (out / "points.jsonl").unlink()
    with pytest.raises(OutputError, match=r"protected-1: exists without the repair\.json of a"):
        run(inputs, out)
    (out / "inputs.json").write_text("[")
    with pytest.raises(OutputError, match=r"inputs\.json: damaged; give another folder"):
        run(inputs, out)


def test_a_full_disk_is_noticed_before_the_first_copy(inputs, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    size = 2 * 2**20 + 10**4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    monkeypatch.setattr(copies, "check_output", lambda *a: None)
    run(inputs, tmp_path / "fits")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"1000 bytes free, 4 copies need .* fewer strengths"):
        run(inputs, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*ed-*"))


def test_an_input_that_changes_meanwhile_gives_no_numbers(inputs, tmp_path):
    shutil.copytree(inputs / "adapter", tmp_path / "adapter")

    def evaluate(path):
        with (tmp_path / "adapter/adapter_config.json").open("a") as file:
            file.write("\n")
        return alpha(path)

    with pytest.raises(CheckpointError, match="an input file was changed"):
        run(inputs, tmp_path / "out", evaluate, tmp_path / "adapter")
    assert (tmp_path / "out/points.jsonl").read_text() == ""


def test_moments_of_another_model_are_refused_before_any_evaluation(inputs, tmp_path):
    torch.manual_seed(5)
    measured(1, nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 12))).save(
        tmp_path / "other.moments"
    )
    with pytest.raises(InputError, match="the base moments are of another model; measure this one"):
        run(inputs, tmp_path / "out", moments=tmp_path / "other.moments")
    with pytest.raises(CheckpointError, match=r"none\.moments"):
        run(inputs, tmp_path / "out", moments=tmp_path / "none.moments")
    assert not (tmp_path / "out").exists()


def test_a_fine_tune_that_nothing_can_be_done_about(inputs, tmp_path):
    tensors = {
        "base_model.model.0.lora_A.weight": weights(2, 16),
        "base_model.model.0.lora_B.weight": weights(20, 2),
        "base_model.model.0.lora_magnitude_vector": weights(20).abs() + 1,
    }
    dora = save_adapter(tmp_path / "dora", tensors, use_dora=True)
    with pytest.raises(InputError, match="dora: no update can be scaled: DoRA"):
        run(inputs, tmp_path / "out", tuned=dora)
    assert not list((tmp_path / "out").glob("*scaled*"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"scales": ()},
            "expected scales between 0 and 1, the ends excluded, got .*; give one or",
        ),
        (
            {"scales": (0.5, 1.0)},
            "expected scales between 0 and 1, the ends excluded, got .*; give one or",
        ),
        ({"strengths": (0.0,)}, "expected strengths more than 0, got .*; give one or more"),
        ({"strengths": ("1",)}, "expected strengths more than 0, got .*; give one or more"),
        ({"strengths": (1, 1.0)}, "expected strengths that differ, got .* give each once"),
        ({"balance": "none"}, "expected balance to be"),
        ({"jobs": 0}, "expected jobs ≥ 1, got 0"),
        ({"moments": Moments()}, "expected the path of a file for moments, got Moments"),
        ({"task": "other"}, "the evaluation gives no number 'other', but task, kept"),
        ({"lower": ["other"]}, "the evaluation gives no number 'other', but task, kept"),
        ({"task": "kept", "keep": "kept"}, "expected two numbers to compare, got 'kept' twice"),
        ({"evaluate": 7}, "expected evaluate to be a command or a function, got 7"),
        ({"evaluate": "python eval.py"}, "expected a command with {model} where the path of"),
        ({"evaluate": "python '{model}"}, "no command .*; quote it as in a shell"),
    ],
)
def test_settings_that_make_no_sense(inputs, tmp_path, settings, words):
    with pytest.raises(InputError, match=words):
        run(inputs, tmp_path / "out", **settings)
    assert not list(tmp_path.glob("out/*ed-*"))


def test_other_numbers_than_before_are_an_error_that_keeps_what_is_finished(inputs, tmp_path):
    def evaluate(path):
        return alpha(path) if path.name == "adapter" else {"task": 1, "other": 2}

    with pytest.raises(InputError, match=r"of scaled-0.5: expected the numbers that as-trained has,"
                       r".* 1 of 5 points are finished and kept"):  # fmt: skip
        run(inputs, tmp_path / "out", evaluate)
    assert len((tmp_path / "out/points.jsonl").read_text().splitlines()) == 1


def test_what_a_function_raises_is_its_own(inputs, tmp_path):
    def evaluate(path):
        raise OutputError("of the function")

    with pytest.raises(OutputError, match=r"^of the function$"):
        run(inputs, tmp_path / "out", evaluate)


def test_a_wrong_name_costs_no_evaluation(inputs, tmp_path):
    evaluate, asked = stopping(99)
    with pytest.raises(InputError, match="the evaluation gives no number 'tusk', but task, kept"):
        run(inputs, tmp_path / "out", evaluate, task="tusk")
    with pytest.raises(InputError, match="the evaluation gives no number 'tusk', but task, kept"):
        run(inputs, tmp_path / "out", evaluate, task="tusk")
    assert asked == ["adapter"]
    assert len(run(inputs, tmp_path / "out", evaluate, task="task").points) == len(asked) == 5


@pytest.fixture
def command(inputs, tmp_path):
    """The command line, in a folder whose name a shell would act on."""
    place = tmp_path / "a b; touch $(echo c) '"
    place.mkdir()
    (place / "eval.py").write_text(SCRIPT)

    def invoke(*words, evaluate=f"{sys.executable} -S eval.py {{model}} ."):
        given = ["frontier", str(inputs / "base.safetensors"), str(inputs / "adapter"),
                 "--moments", str(inputs / "base.moments"), "--evaluate", evaluate, "-o", "out",
                 "--scales", "0.5,0.25", "--strengths", "1", *words]  # fmt: skip
        return CliRunner().invoke(cli, given)

    return place, invoke


def test_the_command_line(command, monkeypatch):
    place, invoke = command
    monkeypatch.chdir(place)
    ended = invoke("--csv", "points.csv")
    assert ended.exit_code == 0, ended.output
    assert "5 of" not in ended.stderr
    assert "4 of 4: protected-1: task 4, kept -4" in ended.stderr
    assert "written to out/frontier.html" in ended.stderr
    assert "scaled-0.25" in ended.stdout
    asked = (place / "asked").read_text().split()
    assert asked == ["adapter", "scaled-0.5", "scaled-0.25", "protected-1"]
    assert sorted(path.name for path in place.iterdir()) == [
        "asked", "eval.py", "out", "points.csv",
    ]  # fmt: skip
    assert (place / "out/logs/as-trained.out").read_text().startswith("a line that is no number")
    assert "frontier" in (place / "out/frontier.html").read_text()[:2000]
    record = FrontierRecord.from_json(place / "out/frontier.json")
    assert [file.name for file in record.evaluation.files][-1] == "eval.py"

    again = invoke("--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["run"]["resumed"] == 4
    assert (place / "asked").read_text().split() == asked

    (place / "eval.py").write_text(SCRIPT + "\n")  # another evaluation of the same copies
    made = (place / "out/scaled-0.5/repair.json").stat().st_mtime_ns
    assert invoke("-q").exit_code == 0
    assert len((place / "asked").read_text().split()) == 8
    assert (place / "out/scaled-0.5/repair.json").stat().st_mtime_ns == made


def test_a_failing_command_ends_with_its_last_words(command, monkeypatch):
    place, invoke = command
    monkeypatch.chdir(place)
    (place / "eval.py").write_text(SCRIPT + "if alpha == 2: sys.exit('no \\x1b[31mmemory left')\n")
    error = invoke().exception
    assert isinstance(error, InputError)
    told = str(error)
    assert told.startswith("the evaluation of scaled-0.5: ")
    assert "eval.py" in told
    assert "failed with exit code 1; the last lines of stderr: no \\x1b[31mmemory left" in told
    assert "1 of 4 points are finished and kept; correct the evaluation, and repeat" in told
    (place / "eval.py").write_text(SCRIPT)
    assert invoke().exit_code == 0


def test_options_that_are_no_numbers(command):
    _, invoke = command
    error = invoke("--scales", "0.5;0.2").exception
    assert "expected numbers with commas for --scales, got '0.5;0.2'" in str(error)
