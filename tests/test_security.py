"""The security checklist: where each point is tested, and the tests of points that have no module.

Checkpoints and adapters are made by strangers; an audit reads them, tells what it found, and does
nothing else.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bulkedge
from bulkedge import AdapterError, CheckpointError, OutputError, Recipe
from bulkedge.checkpoint import open_adapter, open_checkpoint, read_header, read_tensor
from bulkedge.cli import main
from bulkedge.cli._inspect import _line
from bulkedge.comparison import make_plan
from helpers import raw_safetensors, save, save_adapter, some, weights

TESTS = Path(__file__).parent
SOURCES = sorted((TESTS.parent / "src").rglob("*.py"))

CHECKLIST = {
    "1 no unpickling": [
        "test_no_module_imports_what_runs_code_from_data",
        "test_an_audit_reads_its_inputs_and_does_nothing_else",
        "test_pickles_end_in_exit_code_2_with_a_way_out",
        "test_paths_that_hold_no_checkpoint",
        "test_pickled_and_missing_weights",
    ],
    "2 headers are checked before they are believed": [
        "test_hostile_header",
        "test_header_length_is_capped_before_reading",
        "test_the_cap_is_a_number_of_megabytes",
        "test_duplicate_keys_which_the_library_takes_silently",
        "test_duplicate_fields",
        "test_short_files",
        "test_a_damaged_byte_is_a_clean_error_or_harmless",
        "test_tensors_without_elements",
        "test_damaged_inputs",
        "test_more_damaged_inputs",
    ],
    "3 an index names files beside it, nothing else": [
        "test_hostile_index",
        "test_an_index_that_says_a_thing_twice",
        "test_config_of_absurd_size",
    ],
    "4 links and special files": [
        "test_links_that_leave_the_folder_are_refused",
        "test_links_that_leave_the_adapter_are_refused",
        "test_the_hub_cache_layout_is_read",
        "test_every_kind_is_read_from_a_hub_cache",
        "test_links_to_elsewhere_in_the_hub_cache_are_refused",
        "test_links_into_the_cache_of_another_model_are_refused",
        "test_a_store_that_is_itself_a_link_is_no_store",
        "test_a_loop_of_links",
        "test_a_fifo_does_not_hang",
        "test_an_index_that_is_a_pipe_does_not_hang",
        "test_special_files_are_refused_wherever_they_stand",
    ],
    "5 configurations are data": [
        "test_bad_adapter_config",
        "test_config_that_is_not_an_object",
        "test_bad_patterns_are_errors_that_quote_them_shortly",
        "test_many_slow_matches_are_stopped_together",
        "test_a_message_does_not_repeat_megabytes",
        "test_an_audit_reads_its_inputs_and_does_nothing_else",
    ],
    "6 a terminal shows names, and obeys none": [
        "test_hostile_names_stay_inert",
        "test_errors_quote_hostile_names",
        "test_printable",
    ],
    "7 nor does a spreadsheet": ["test_csv_cells_of_hostile_names_stay_text"],
    "8 writing": [
        "test_an_output_link_is_replaced_not_followed",
        "test_a_record_that_cannot_be_written",
        "test_bad_input_is_one_line_and_leaves_nothing",
        "test_no_way_leads_an_output_into_an_input",
        "test_a_journal_does_not_replace_an_input",
        "test_csv_is_written_whole_where_asked_and_nowhere_else",
        "test_files_are_as_private_as_the_user_has_them",
    ],
    "9 matrices that cannot be audited say so": [
        "test_not_finite_is_reported_and_the_others_go_on",
        "test_zero_base_zero_tuned_and_deficient_rank",
        "test_vectors_are_matrices_too",
        "test_a_failing_matrix_says_why",
        "test_what_torch_cannot_hold_is_an_error_of_ours",
    ],
    "10 no network": [
        "test_fetched_whole_once_and_then_read_without_the_network",
        "test_no_module_imports_what_runs_code_from_data",
        "test_an_audit_reads_its_inputs_and_does_nothing_else",
    ],
}


def test_every_point_has_tests_that_exist():
    tested = {
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name for names in CHECKLIST.values() for name in names} <= tested
    assert [int(point.split()[0]) for point in CHECKLIST] == list(range(1, 11))


# ---- 1, 10: what the code does not contain

RUNS_CODE = {
    "pickle",
    "cPickle",
    "dill",
    "joblib",
    "cloudpickle",
    "shelve",
    "marshal",
    "runpy",
    "code",
}
NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "ftplib", "asyncio"}
NETWORK |= {
    "huggingface_hub",
    "transformers",
    "peft",
    "smtplib",
    "telnetlib",
    "xmlrpc",
    "webbrowser",
}
PROCESSES = {"subprocess", "pty", "ctypes"}
# what an engine is, and what loads its own modules late
MAY = {
    "auditing/engine/ray.py": {"socket", "urllib"},
    "report/sarif.py": {"urllib"},  # quotes paths
    "checkpoint/hub.py": {"huggingface_hub"},  # its cache alone, local_files_only
    "cli/_hub.py": {"huggingface_hub"},  # --download
}
# a command that the caller gives, to evaluate a model
MAY |= {"tradeoff/evaluation.py": {"subprocess"}}
# their classes, for a model that the caller has built already
MAY |= {f"tune/{name}.py": {"peft", "transformers"} for name in (
    "_experts", "_layers", "_lora", "trainer/__init__", "trainer/_hold", "trainer/_monitor",
    "trainer/_penalty", "trainer/_report", "trainer/_supported",
    "peft/__init__", "peft/config", "peft/export", "peft/layer", "peft/model", "peft/spectral",
)}  # fmt: skip
CALLS = {
    "eval",
    "exec",
    "__import__",
    "torch.load",
    "numpy.load",
    "np.load",
    "os.system",
    "os.popen",
}
CALLS |= {
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.hub.load",
    "os.execv",
    "compile",
}
WORDS = {"AutoModel", "from_pretrained", "trust_remote_code", "allow_pickle", "unsafe_load"}
RUNS_MODELS = "moments/_texts.py"
"""The one file that runs a model; how it may load one is asked of it below."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: "/".join(p.parts[-2:]))
def test_no_module_imports_what_runs_code_from_data(path):
    place = path.relative_to(TESTS.parent / "src/bulkedge").as_posix()
    allowed, words = MAY.get(place, set()), set() if place == RUNS_MODELS else WORDS
    for node in some(ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        names = set()
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {(node.module or "").partition(".")[0]}
        assert not names & (RUNS_CODE | NETWORK | PROCESSES) - allowed, ast.unparse(node)
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in CALLS, ast.unparse(node)
            assert not words & {keyword.arg for keyword in node.keywords}, ast.unparse(node)
        if isinstance(node, ast.Attribute | ast.Name):
            assert getattr(node, "attr", getattr(node, "id", "")) not in words, ast.unparse(node)


def test_the_file_that_runs_a_model_loads_no_code_and_no_pickle():
    path = TESTS.parent / "src/bulkedge" / RUNS_MODELS
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained"
    ]
    assert len(calls) == 3
    for node in some(calls):
        settings = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert (settings["local_files_only"], settings["trust_remote_code"]) == ("True", "False")
        if "dtype" in settings:  # of weights
            assert settings["use_safetensors"] == "True"


def test_the_linter_looks_for_it_too():
    settings = (TESTS.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert '"S", ' in settings.partition("\nselect = ")[2].partition("]")[0]
    assert '"S' not in settings.partition("\nignore = ")[2].partition("]")[0]


# ---- what an audit does: Python's own audit events tell

WATCHED = """
import os, sys, torch, safetensors, safetensors.torch, pydantic, yaml, rich.table, bulkedge
import bulkedge.report
from bulkedge.cli import cli
base, tuned, out = sys.argv[1:]
bad = []
EVENTS = ("socket.", "pickle.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork",
          "urllib.", "http.", "ftplib.", "webbrowser.", "shutil.", "os.remove", "os.symlink",
          "os.chown", "os.truncate", "code.", "pty.", "exec_by_name")
def watch(event, arguments):
    ours = arguments and os.fsdecode(str(arguments[0])).startswith(out)
    if event.startswith(EVENTS) and not (event == "os.remove" and ours):
        bad.append((event, repr(arguments)[:200]))
    if event == "import" and str(arguments[0]).partition(".")[0] in (
        "transformers", "peft", "huggingface_hub", "ray", "planted"):
        bad.append((event, arguments[0]))
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = arguments
        writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        place = os.path.abspath(os.fsdecode(path))
        nameless = os.path.isdir(place)  # what tries whether a folder can be written to
        if writes and not nameless and not place.startswith(out):
            bad.append((event, repr(arguments)[:200]))
sys.addaudithook(watch)
for command in (["audit", base, tuned, "-o", out], ["inspect", base], ["inspect", tuned]):
    try:
        cli(command, standalone_mode=False)
    except SystemExit as error:
        assert error.code in (0, 1), error.code
print("BAD", bad)
"""


def test_an_audit_reads_its_inputs_and_does_nothing_else(tmp_path):
    """No socket, no pickle, no process, no foreign module, no file written but the output."""
    base = tmp_path / "base"
    save(base / "model.safetensors", {"a.weight": weights(9, 7), "b.weight": weights(6, 7)})
    (base / "config.json").write_text(
        json.dumps({"auto_map": {"AutoModel": "planted.Model"}, "_name_or_path": "org/name"})
    )
    factors = {"a.lora_A.weight": weights(2, 7), "a.lora_B.weight": weights(9, 2)}
    tuned = save_adapter(
        tmp_path / "tuned",
        {f"base_model.model.{name}": W for name, W in factors.items()},
        base_model_name_or_path="https://127.0.0.1:9/org/name",
        auto_mapping={"base_model_class": "Model", "parent_library": "planted"},
    )
    for folder in (base, tuned, tmp_path):
        (folder / "planted.py").write_text("raise SystemExit('ran')")
    out = tmp_path / "out"
    command = [sys.executable, "-c", WATCHED, base, tuned, out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "BAD []"
    assert (out / "record.json").is_file()


@pytest.fixture
def run(capsys, monkeypatch):
    """The command in this process: exit code, stdout and stderr."""

    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["bulkedge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run_command


def test_pickles_end_in_exit_code_2_with_a_way_out(run, tmp_path):
    base = save(tmp_path / "b.safetensors", {"a.weight": weights(9, 7)})
    pickle = tmp_path / "pytorch_model.bin"
    # what it would run, if anything unpickled it
    pickle.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % os.fsencode(tmp_path / "ran"))
    for arguments in (["audit", base, pickle], ["audit", pickle, base], ["inspect", pickle]):
        code, told, error = run(*arguments)
        assert (code, told) == (2, "")
        assert "convert it where you trust it" in error
    pickle.rename(tmp_path / "model.safetensors")  # by another name it is as little read
    code, _, error = run("audit", base, tmp_path / "model.safetensors")
    assert code == 2
    assert "truncated or not safetensors" in error
    assert not (tmp_path / "ran").exists()


# ---- 2: tensors without elements


@pytest.mark.parametrize("shape", [[0], [3, 0], [0, 2**40], [2**31, 0, 2**31]])
def test_tensors_without_elements(shape, tmp_path):
    """They take no bytes, so nothing bounds how many dimensions of what size they claim."""
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    path = raw_safetensors(tmp_path / "x.safetensors", {"a": entry, "b": entry})
    for info in some(read_header(path)[0].values()):
        assert info.nbytes == info.size == 0
        assert read_tensor(info).shape == tuple(shape)


# ---- 4: links and special files


def cache(tmp_path, files):
    """A snapshot of a hub cache: links to blobs that have digests for names, and no suffix."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(files):
        blob = repository / "blobs" / f"{i:064x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_every_kind_is_read_from_a_hub_cache(tmp_path):
    tensors = {"a.weight": weights(9, 7), "b.weight": weights(6, 7)}
    shards = [
        save(tmp_path / f"m{i}.safetensors", {n: W}) for i, (n, W) in enumerate(tensors.items())
    ]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {n: f.name for n, f in zip(tensors, shards, strict=True)}})
    )
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "gpt2"}')
    snapshot = cache(tmp_path / "base", [*shards, index, config])
    for named in (snapshot, snapshot / index.name):
        opened = open_checkpoint(named)
        assert (set(opened.tensors), opened.config) == (set(tensors), {"model_type": "gpt2"})
    assert set(open_checkpoint(snapshot / shards[0].name).tensors) == {"a.weight"}
    adapter = save_adapter(
        tmp_path / "a", {"a.lora_A.weight": weights(2, 7), "a.lora_B.weight": weights(9, 2)}
    )
    linked = cache(tmp_path / "tuned", sorted(adapter.iterdir()))
    for named in (linked, linked / "adapter_model.safetensors"):
        assert list(open_adapter(named).factors) == ["a.weight"]
    assert len(make_plan(snapshot, linked, Recipe()).comparisons) == 1
    (tmp_path / "elsewhere").symlink_to(tmp_path / "base")  # the cache itself may stand anywhere
    moved = tmp_path / "elsewhere" / snapshot.relative_to(tmp_path / "base")
    assert set(open_checkpoint(moved).tensors) == set(tensors)


def test_links_into_the_cache_of_another_model_are_refused(tmp_path):
    private = cache(tmp_path / "hub", [save(tmp_path / "x.safetensors", {"w": weights(2, 2)})])
    blob = next((private.parents[1] / "blobs").iterdir())
    snapshot = tmp_path / "hub/models--evil--name/snapshots/1"
    (snapshot.parents[1] / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    with pytest.raises(CheckpointError, match="is a link that leaves"):
        open_checkpoint(snapshot)


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [pipe, device, Path.mkdir])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "m0.safetensors", "model.safetensors.index.json"],
)
def test_special_files_are_refused_wherever_they_stand(name, make, tmp_path):
    """Never waited for, never drunk from, never taken for absent."""
    if name == "m0.safetensors":
        index = json.dumps({"weight_map": {"w": name}})
        (tmp_path / "model.safetensors.index.json").write_text(index)
    elif name != "model.safetensors":
        save(tmp_path / "x.safetensors", {"w": weights(2, 2)})
    make(tmp_path / name)
    message = rf"{name}: (is a link that leaves|cannot be read .not a regular file)"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"not a regular file|safetensors file|is a link that leaves"
    ):
        open_checkpoint(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_special_files_are_no_adapter(name, tmp_path):
    folder = save_adapter(tmp_path / "a", {"a.lora_A.weight": weights(2, 7)})
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(
        (AdapterError, CheckpointError), match=rf"{name}: cannot be read .not a regular file"
    ):
        open_adapter(folder)


# ---- 8: outputs stay out of inputs


def test_no_way_leads_an_output_into_an_input(run, tmp_path):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    for folder, factor in ((base, 1), (tuned, 2)):
        save(folder / "m.safetensors", {"a.weight": factor * weights(9, 7)})
        index = json.dumps({"weight_map": {"a.weight": "m.safetensors"}})
        (folder / "model.safetensors.index.json").write_text(index)
    (tmp_path / "link").symlink_to(tuned)
    before = sorted(tmp_path.rglob("*"))
    index = base / "model.safetensors.index.json"
    for arguments in (
        [index, tuned, "-o", base / "out"],
        [index, tuned, "--csv", base / "x.csv"],
        [base, tuned, "--csv", tmp_path / "link/x.csv"],
        [base, tuned, "--csv", base / "m.safetensors"],
        [base / "m.safetensors", tuned, "--csv", base / "m.safetensors"],
        [base, tuned, "-o", base],
        [base, tuned, "-o", tuned / "out"],
        [base, tuned, "-o", tmp_path / "link"],
        [base, tuned, "-o", tmp_path / "link/out"],
        [base, tmp_path / "link", "-o", tuned / "deep/out"],
        [base, tuned, "-o", tmp_path / "tuned/../base/out"],
    ):
        code, _, error = run("audit", *arguments, "--force")
        assert code == 2, arguments
        assert "lies inside the input" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_the_record_of_an_audit_is_whole(run, tmp_path):
    """What is written last is there in full, or not at all; nothing is left beside it."""
    base = save(tmp_path / "b.safetensors", {"a.weight": weights(9, 7)})
    tuned = save(tmp_path / "t.safetensors", {"a.weight": 2 * weights(9, 7)})
    record = bulkedge.audit(base, tuned)
    code, *_ = run("audit", base, tuned, "-q", "-o", tmp_path / "out")
    assert code in (0, 1)
    written = bulkedge.Record.from_json(tmp_path / "out/record.json")
    assert written.matrices == record.matrices
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644)])
def test_files_are_as_private_as_the_user_has_them(mask, mode, run, tmp_path):
    base = save(tmp_path / "b.safetensors", {"a.weight": weights(9, 7)})
    tuned = save(tmp_path / "t.safetensors", {"a.weight": 2 * weights(9, 7)})
    before = os.umask(mask)
    try:
        run("audit", base, tuned, "-q", "-o", tmp_path / "out", "--csv", tmp_path / "x.csv")
    finally:
        os.umask(before)
    for path in (*(tmp_path / "out").iterdir(), tmp_path / "x.csv"):
        assert path.stat().st_mode & 0o777 & ~0o022 == mode & ~0o022
        assert not path.stat().st_mode & mask


def test_csv_is_written_whole_where_asked_and_nowhere_else(run, tmp_path):
    base = save(tmp_path / "b.safetensors", {"=a.weight": weights(9, 7)})
    tuned = save(tmp_path / "t.safetensors", {"=a.weight": 2 * weights(9, 7)})
    path = tmp_path / "new/x.csv"
    code, *_ = run("audit", base, tuned, "-k", 2, "--csv", path)
    assert code in (0, 1)
    assert path.read_text().splitlines()[1].startswith('"\'=a.weight"')
    assert len(path.read_text().splitlines()) == 1 + 2
    code, _, error = run("audit", base, tuned, "--csv", path)
    assert (code, "exists; give another file, or --force" in error) == (2, True)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.unlink()
    path.symlink_to(victim)
    assert run("audit", base, tuned, "--csv", path)[0] == 2
    assert run("audit", base, tuned, "-q", "--csv", path, "--force")[0] in (0, 1)
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    for bad, message in ((tmp_path, "is a folder; give a file"), (base / "x", "writable folder")):
        code, _, error = run("audit", base, tuned, "--csv", bad)
        assert (code, message in error) == (2, True)


def test_a_journal_does_not_replace_an_input(tmp_path):
    base = save(tmp_path / "base/m.safetensors", {"a.weight": weights(9, 7)})
    tuned = save(tmp_path / "t.safetensors", {"a.weight": 2 * weights(9, 7)})
    for path in (tuned, base, base.parent / "journal.jsonl"):
        with pytest.raises(OutputError, match="lies inside the input"):
            bulkedge.audit(base.parent, tuned, journal=path)
    assert set(open_checkpoint(base).tensors) == set(open_checkpoint(tuned).tensors) == {"a.weight"}
    assert [path.name for path in base.parent.iterdir()] == [base.name]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("field", ["count", "matrices"])
def test_a_record_of_endless_parts_is_not_counted(field, tmp_path):
    base = save(tmp_path / "b.safetensors", {"a.weight": weights(9, 7)})
    tuned = save(tmp_path / "t.safetensors", {"a.weight": 2 * weights(9, 7)})
    part = bulkedge.audit(base, tuned, shard=bulkedge.Shard(1, 2))
    content = json.loads(part.to_json())
    content["shard"][field] = 10**15
    (tmp_path / "record.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"shard\.{field}: Input should be less than"):
        bulkedge.merge_shards([tmp_path])


def test_inspect_shows_reasons_as_it_shows_names():
    told = _line({"name": "a", "not_handled": "b\x1b[31m"})
    assert told == r"a  (b\x1b[31m)"


def test_the_store_behind_a_snapshot_is_an_input_too(tmp_path):
    """The weights of a snapshot are links: what they lead to must not be written over."""
    home = tmp_path / "models--x--y"
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots/r"
    snapshot.mkdir(parents=True)
    blob = save(tmp_path / "aa.safetensors", {"q.weight": weights(30, 20)}).rename(
        home / "blobs/aa"
    )
    (snapshot / "model.safetensors").symlink_to("../../blobs/aa")
    tuned = save(tmp_path / "t.safetensors", {"q.weight": weights(30, 20, seed=1)})
    before = blob.read_bytes()
    for place in (blob, home / "blobs/j", home / "x", tuned):
        with pytest.raises(OutputError, match=r"lies inside the input"):
            bulkedge.audit(snapshot, tuned, journal=place)
        with pytest.raises(OutputError, match=r"lies inside the input|exists; a repair"):
            bulkedge.repair(snapshot, tuned, place)
    assert blob.read_bytes() == before
    with pytest.raises(OutputError, match=r"is no place that can be written"):
        bulkedge.audit(snapshot, tuned, journal=f"{tmp_path}/a\0b")


@pytest.mark.parametrize("part", ["lora_A.other.weight", "hada_w1_a", "lokr_w1", "vera_lambda_b"])
def test_parts_of_unknown_methods_are_lost_not_heads(part, tmp_path):
    base = save(
        tmp_path / "b.safetensors", {"q.weight": weights(30, 20), "k.weight": weights(30, 20)}
    )
    tensors = {"q.lora_A.weight": weights(2, 20), "q.lora_B.weight": 0.01 * weights(30, 2)}
    adapter = save_adapter(tmp_path / "a", tensors | {f"base_model.model.k.{part}": weights(2, 20)})
    record = bulkedge.audit(base, adapter)
    assert record.summary.lost == 1
    assert not record.summary.complete
    (row,) = record.skipped
    assert row.reason == "a part of an unknown adapter method"
