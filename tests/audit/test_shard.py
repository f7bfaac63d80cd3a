"""Parts of an audit, and one record from all of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bulkedge
from bulkedge import CheckpointError, InputError, Recipe, Record, Shard, merge_shards
from bulkedge.checkpoint import Plain, StoredMatrix, TensorInfo
from bulkedge.comparison import Comparison, make_plan
from cases import gaussian, orthonormal
from commands import run
from helpers import save, weights

ROOT = Path(__file__).parents[2]
SHAPES = [(30, 20), (60, 40), (20, 20), (90, 80), (12, 12), (60, 40), (31, 20)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    base = {f"l{i}.weight": gaussian(*shape) for i, shape in enumerate(SHAPES)}
    tuned = {
        name: W + 40 * orthonormal(W.shape[0], 1, 1) @ orthonormal(W.shape[1], 1, 2).mT
        for name, W in base.items()
    }
    tuned["head.weight"] = weights(3, 3)
    return save(folder / "b.safetensors", base), save(folder / "t.safetensors", tuned)


def write(folder, record):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(record.to_json())
    return folder


@pytest.fixture(scope="module")
def parts(pair, tmp_path_factory):
    """The records of three parts."""
    folder = tmp_path_factory.mktemp("parts")
    return [
        write(folder / f"{i}", bulkedge.audit(*pair, shard=Shard(i, 3), jobs=1)) for i in (1, 2, 3)
    ]


def facts(record):
    return record.model_dump(exclude={"run"})


def comparisons(sizes):
    infos = [TensorInfo(f"{i}", "F32", (size, 1), Path("f"), 0) for i, size in enumerate(sizes)]
    return [Comparison(StoredMatrix(Plain(info)), None, None, info.name) for info in infos]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 9))
def test_parts_are_a_balanced_partition(sizes, count):
    found = comparisons(sizes)
    parts = [Shard(i + 1, count).positions(found) for i in range(count)]
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    assert all(part == sorted(part) for part in parts)
    loads = [sum(sizes[i] for i in part) for part in parts]
    # whoever got one got it with the least so far: no part exceeds another by more than one matrix
    for load, part in zip(loads, parts, strict=True):
        assert load - min(loads) <= max((sizes[i] for i in part), default=0)


def test_which_part_is_whose_is_settled_by_shapes():
    """By hand: 50 | 30 | 20; then 10 joins 20, the next 10 the 30 (the first of two), 5 the 20."""
    found = comparisons([10, 50, 5, 20, 30, 10])
    assert [Shard(i, 3).positions(found) for i in (1, 2, 3)] == [[1], [4, 5], [0, 2, 3]]


def test_merged_parts_are_the_whole(pair, parts):
    whole = bulkedge.audit(*pair)
    for places in (parts, parts[::-1], [p / "record.json" for p in parts]):
        merged = merge_shards(places)
        assert facts(merged) == facts(whole)
        assert merged.to_json().split('"run"')[0] == whole.to_json().split('"run"')[0]
    records = [Record.from_json(part / "record.json") for part in parts]
    assert merged.run.seconds == pytest.approx(sum(r.run.seconds for r in records))
    assert merged.run.jobs == 3
    assert sum(len(r.matrices) for r in records) == len(SHAPES)
    assert all(len(r.skipped) == 1 for r in records)


def test_more_parts_than_matrices(pair, tmp_path):
    parts = [
        write(tmp_path / f"{i}", bulkedge.audit(*pair, shard=Shard(i, 9))) for i in range(1, 10)
    ]
    empty = Record.from_json(parts[8] / "record.json")
    assert (empty.matrices, empty.summary.matrices) == ([], 0)
    assert facts(merge_shards(parts)) == facts(bulkedge.audit(*pair))


def test_one_part_of_one(pair, tmp_path):
    part = write(tmp_path / "1", bulkedge.audit(*pair, shard=Shard(1, 1)))
    assert facts(merge_shards([part])) == facts(bulkedge.audit(*pair))


@pytest.mark.parametrize("numbers", [(0, 3), (4, 3), (1, 0), (-1, 2)])
def test_impossible_shards(numbers):
    message = r"expected a shard I/N with 1 ≤ I ≤ N, got|expected index ≥ 0, got -1; give Shard a"
    with pytest.raises(InputError, match=message):
        Shard(*numbers)


# ---- parts that do not belong together


def test_missing_doubled_and_no_parts(parts):
    with pytest.raises(InputError, match=r"expected 3 shards, got 2; missing: 2/3"):
        merge_shards([parts[0], parts[2]])
    with pytest.raises(InputError, match=r"1 and .*1.record.json: both hold shard 1"):
        merge_shards([*parts, parts[0] / "record.json"])
    with pytest.raises(InputError, match=r"expected the folders of an audit's shards, got none"):
        merge_shards([])


def other(pair, tmp_path, **changes):
    return write(tmp_path / "other", bulkedge.audit(*pair, shard=Shard(2, 3), **changes))


def test_mixed_recipes_and_numbers(pair, parts, tmp_path):
    strange = other(pair, tmp_path, recipe=Recipe(seed=1))
    with pytest.raises(InputError, match=r"1 and .*other: .* but their recipes differ"):
        merge_shards([parts[0], strange, parts[2]])
    strange = write(tmp_path / "four", bulkedge.audit(*pair, shard=Shard(2, 4)))
    with pytest.raises(InputError, match=r"but their numbers of shards differ"):
        merge_shards([parts[0], strange, parts[2]])


def test_mixed_inputs(pair, parts, tmp_path):
    base, _ = pair
    changed = {f"l{i}.weight": gaussian(*shape) + 1 for i, shape in enumerate(SHAPES)}
    strange = other((base, save(tmp_path / "t.safetensors", changed)), tmp_path)
    with pytest.raises(InputError, match=r"but their inputs differ"):
        merge_shards([parts[0], strange, parts[2]])


def test_inputs_mounted_elsewhere_are_the_same(pair, parts, tmp_path):
    moved = [save(tmp_path / file.name, {}) for file in pair]
    for file, target in zip(pair, moved, strict=True):
        target.write_bytes(file.read_bytes())
    assert facts(merge_shards([parts[0], other(moved, tmp_path), parts[2]])) == facts(
        bulkedge.audit(*pair)
    )


def edited(part, tmp_path, **changes):
    content = json.loads((part / "record.json").read_text())
    for name, value in changes.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    (tmp_path / "edited").mkdir()
    (tmp_path / "edited/record.json").write_text(json.dumps(content))
    return tmp_path / "edited"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tool": {"torch": "1.0"}}, r"but their versions differ"),
        ({"shard": {"matrices": 8}}, r"but their numbers of matrices differ"),
        (
            {"skipped": [], "summary": {"skipped": 0, "lost": 0}},
            r"but their skipped tensors differ",
        ),
        ({"skipped": []}, r"expected the counts of the rows listed"),
        ({"matrices": []}, r"do not add up; was a record.json edited"),
        ({"shard": {"positions": [0, 1, 2, 3]}}, r"do not add up; was a record.json edited"),
        ({"shard": None}, r"expected the record of a shard, got one of a whole audit"),
        ({"shard": {"index": 0}}, r"not a bulkedge record"),
    ],
)
def test_edited_records(changes, message, parts, tmp_path):
    strange = edited(parts[1], tmp_path, **changes)
    with pytest.raises((InputError, CheckpointError), match=message):
        merge_shards([parts[0], strange, parts[2]])


def test_a_part_that_is_not_finished(parts, tmp_path):
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(CheckpointError, match=r"no record.json in it; finish that shard first"):
        merge_shards([*parts[:2], tmp_path])
    with pytest.raises(CheckpointError, match=r"nowhere: cannot be read"):
        merge_shards([tmp_path / "nowhere"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.timeout(20)
def test_a_part_whose_record_is_no_file(parts, tmp_path):
    os.mkfifo(tmp_path / "record.json")
    message = (
        r"record\.json: cannot be read .not a regular file.; give the file of a bulkedge record"
    )
    with pytest.raises(CheckpointError, match=message):
        merge_shards([*parts[:2], tmp_path])
    (tmp_path / "record.json").unlink()
    (tmp_path / "record.json").symlink_to("elsewhere")  # no hint to go on with a finished shard
    with pytest.raises(CheckpointError, match=r"record\.json: cannot be read .No such file"):
        merge_shards([*parts[:2], tmp_path])


# ---- on the command line


def test_the_slurm_script_of_the_docs(pair, tmp_path):
    """Its two blocks, of fewer parts and jobs, the scheduler's part played here."""
    page = (ROOT / "docs/audit.md").read_text()
    script, merge = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    script = script.replace("BASE", str(pair[0])).replace("TUNED", str(pair[1]))
    assert "--array=1-4" in script
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def shell(text, **more):
        return subprocess.run(
            ["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=120,
            env=os.environ | {"PATH": path} | more,
        )  # fmt: skip

    quick = script.replace("-j 4", "-j 1").replace("/4 ", "/2 ")
    for task in (1, 2):
        result = shell(quick, SLURM_ARRAY_TASK_ID=str(task))
        assert result.returncode == 0, result.stderr  # though every matrix has a finding
    merged = shell(merge)
    assert merged.returncode == 1, merged.stderr
    assert f"in {len(SHAPES)} of {len(SHAPES)} matrices" in merged.stdout
    found = Record.from_json(tmp_path / "whole/record.json")
    assert facts(found) == facts(bulkedge.audit(*pair)) | {"inputs": found.inputs.model_dump()}
    again = shell(merge)
    assert again.returncode == 2
    assert "exists; give another folder" in again.stderr


def test_parts_are_no_more_than_can_be_counted():
    assert Shard(2**20, 2**20).count == 2**20
    with pytest.raises(InputError, match=r"expected at most 1048576 shards, got 1048577"):
        Shard(1, 2**20 + 1)


def test_a_dry_run_tells_of_the_part(pair, tmp_path):
    options = ("--shard", "2/3", "-o", tmp_path / "out", "--dry-run", "--json")
    ended = run("audit", *pair, *options)
    assert ended.returncode == 0, ended.stderr
    facts = json.loads(ended.stdout)
    mine = Shard(2, 3).positions(make_plan(*pair, Recipe()).comparisons)
    assert facts["matrices"] == len(mine) < len(SHAPES)
    assert facts["largest"].startswith(f"l{max(mine, key=lambda i: SHAPES[i])}.weight")


def test_a_part_says_that_it_is_one(pair, tmp_path):
    result = run("audit", *pair, "--shard", "2/3", "-o", tmp_path / "out")
    assert result.returncode == 0
    assert "part 2 of 3: `bulkedge merge` judges the whole" in result.stderr


def test_a_dry_run_of_an_empty_part(pair, tmp_path):
    options = ("--shard", "9/9", "-o", tmp_path / "out", "--dry-run")
    result = run("audit", *pair, *options)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "out").exists()
