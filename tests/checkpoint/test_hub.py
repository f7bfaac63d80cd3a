"""Models by their id on the hub: in the cache, or fetched by the real client from a small hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save as to_bytes

from bulkedge import CheckpointError
from bulkedge.checkpoint import open_base, open_checkpoint, open_path
from bulkedge.checkpoint.hub import hub_id, located
from bulkedge.cli._hub import fetch
from helpers import save_adapter, weights
from hub_server import SHA, Hub

BASE = {
    "model.safetensors": to_bytes({"h.0.q.weight": weights(40, 30), "n.weight": weights(30)}),
    "config.json": b'{"model_type": "llama"}',
    "pytorch_model.bin": b"a pickle",
    "modeling_org.py": b"raise SystemExit",
}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    factors = {"h.0.q.lora_A.weight": weights(2, 30), "h.0.q.lora_B.weight": 9 * weights(40, 2)}
    named = {f"base_model.model.{name}": tensor for name, tensor in factors.items()}
    folder = save_adapter(
        tmp_path_factory.mktemp("a"), named, base_model_name_or_path="org/base", revision="main"
    )
    return {
        "org/base": BASE,
        "org/lora": {file.name: file.read_bytes() for file in folder.iterdir()},
        "org/gated": BASE,
    }


DRIVER = """
import json, sys
from bulkedge.cli import main
for arguments in json.loads(sys.stdin.read()):
    sys.argv = ["bulkedge", *arguments]
    try:
        code = main() or 0
    except SystemExit as end:
        code = end.code
    for stream in (sys.stdout, sys.stderr):
        print(f"code {code}", file=stream, flush=True)
"""


def bulkedge(hub, home, *calls, offline="0"):
    """Several commands in one process, since the client reads its settings when it is loaded."""
    environment = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([call.split() for call in calls]),
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    parts = (re.split(r"code (\d+)\n", text) for text in (done.stdout, done.stderr))
    out, err = parts
    return [(int(code), o, e) for o, code, e in zip(out[::2], out[1::2], err[::2], strict=False)]


FAILING = {
    "org/gated": "gated: accept its terms on the hub, then log in with `hf auth login`",
    "org/none": "not on the hub, or private; check the id, or log in with `hf auth login`",
    "org/base@v9": "no revision 'v9' on the hub; check what follows the @",
}


def test_fetched_whole_once_and_then_read_without_the_network(repositories, tmp_path):
    with Hub(repositories, gated=["org/gated"]) as hub:
        *failed, repaired, lora, base, again = bulkedge(
            hub.url,
            tmp_path,
            *(f"inspect --json --download {name}" for name in FAILING),
            f"repair --download org/base org/lora -o {tmp_path / 'repaired'} --fail-on never",
            "inspect --download org/lora",
            "inspect --download org/base@main",
            "inspect --download org/base",
        )
        for (name, message), found in zip(FAILING.items(), failed, strict=True):
            assert found == (2, "", f"bulkedge: {name.partition('@')[0]}: {message}\n")
        assert repaired[2].startswith("fetching org/base from the hub\nfetching org/lora from")
        assert (repaired[0], open_path(tmp_path / "repaired").method) == (0, "LoRA")
        assert lora[1].endswith(
            "LoRA adapter by PEFT: 1 layer updated by factors of rank 2; trained on org/base\n"
        )
        assert base == again == (0, base[1], "fetching org/base from the hub\n")
        fetched = ["adapter_config.json", "adapter_model.safetensors"]
        fetched += ["config.json", "model.safetensors"]
        assert sorted(hub.asked) == fetched  # no code, no pickle, and nothing twice
        url = hub.url
    unset, gone, cached = bulkedge(
        url, tmp_path, "inspect --download org/none", "inspect org/none", "inspect org/base",
        offline="1",
    )  # fmt: skip
    assert unset[2].endswith("HF_HUB_OFFLINE is set: unset it, or fetch the model elsewhere\n")
    assert "add --download to fetch it from the hub" in gone[2]
    assert cached == (0, base[1], "")
    assert cached[1].endswith("full model of type llama: 2 tensors in one file and its "
                              "configuration\n")  # fmt: skip


def test_a_hub_that_cannot_be_reached(tmp_path):
    ((code, _, told),) = bulkedge("http://127.0.0.1:9", tmp_path, "inspect --download org/base")
    assert code == 2
    assert told.endswith("org/base: the hub at http://127.0.0.1:9 cannot be reached; try again "
                         "when it can\n")  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with one model, as the client lays it out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--base"
    (folder := repository / "snapshots" / SHA).mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(SHA)
    for i, name in enumerate(("model.safetensors", "config.json")):
        (blob := repository / f"blobs/{i}").write_bytes(BASE[name])
        (folder / name).symlink_to(os.path.relpath(blob, folder))
    return folder


def test_an_id_is_its_folder_in_the_cache(cache):
    for name in ("org/base", "org/base@main", f"org/base@{SHA}"):
        assert open_checkpoint(name).path == open_path(name).path == open_base(name).path == cache
        assert set(open_checkpoint(name).tensors) == {"h.0.q.weight", "n.weight"}


def test_what_is_not_in_the_cache_says_what_to_do(cache):
    for name in ("org/other", "org/base@v2"):
        with pytest.raises(CheckpointError, match=f"{name}: no such file .* add --download to"):
            open_path(name)
    (cache / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"only a part of it is in the hub's cache"):
        open_path("org/base")


@pytest.mark.parametrize(
    "path", ["base", "./org/base", "/org/base", "org/../base", "a/b/c", "org/b.safetensors",
             "org/a--b", "org/base@../x", "org/base@", "-o/base", ""],
)  # fmt: skip
def test_paths_that_are_no_ids(path):
    assert hub_id(path) is None
    assert located(path) == path


def test_what_lies_on_the_disk_comes_first(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/base").mkdir(parents=True)
    assert located("org/base") == "org/base"


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"nothing is fetched.*pip install 'bulkedge\[hub\]'"):
        located("org/base")


def test_nothing_is_fetched_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"of the hub: .*pip install"):
        fetch([Path("org/base"), None])


def test_an_adapter_alone(repositories, cache, tmp_path, capsys, monkeypatch):
    from bulkedge.cli import main

    def told(*arguments):
        monkeypatch.setattr(sys, "argv", ["bulkedge", "audit", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr()

    folder = tmp_path / "lora"
    folder.mkdir()
    for name, content in repositories["org/lora"].items():
        (folder / name).write_bytes(content)
    code, out = told(folder)
    assert code == 1
    assert "against org/base@main, which the adapter names as its base" in out.err
    settings = json.loads((folder / "adapter_config.json").read_text())
    for base, message in {
        "org/elsewhere": "add --download to fetch it from the hub; or give the base itself: "
        f"bulkedge audit BASE {folder}",
        "/nowhere": f"which is not on this disk; give bulkedge audit BASE {folder}",
        None: f"does not say which base it was trained on; give bulkedge audit BASE {folder}",
    }.items():
        changed = settings | {"base_model_name_or_path": base, "revision": None}
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        code, out = told(folder)
        assert (code, message in out.err.replace("\n", " ")) == (2, True), out.err
    code, out = told(cache)
    assert (code, "Missing argument 'TUNED'" in out.err) == (2, True)
