"""Every test runs on one torch thread, with no network and no hub."""

import fcntl
import json
import os
import struct
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# a deadline measures the machine, not the code
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """The audits of the adapters that the repository ships, computed once in all processes."""
    import bulkedge
    from helpers import EXAMPLE, MINILM

    assert MINILM.is_dir(), "run `make minilm` first"
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    found = {}
    for name in ("lora-r1", "lora-r8"):
        path = shared / f"{name}.json"
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one computes, the others wait and read
            if not path.exists():
                path.write_text(bulkedge.audit(MINILM, EXAMPLE / name).to_json())
        found[name] = bulkedge.Record.from_json(path)
    return found


@pytest.fixture(autouse=True)
def same_weights_every_time():
    """Layers are initialised from torch's global generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def every_tensor_is_accounted_for(monkeypatch):
    """Whatever a test audits: each tensor of two or more dimensions is listed once, none besides.

    Headers are read here by other means; what becomes of each tensor is for the single tests.
    """
    from bulkedge.comparison import plan

    make = plan.Plan

    def checked(base, tuned, *fields):
        made = make(base, tuned, *fields)
        listed = Counter((row.side, row.name) for row in made.tensors)
        assert listed == Counter([*_matrices("base", base), *_matrices("tuned", tuned)])
        lost = any(row.fate == "lost" for row in made.tensors)
        assert not lost or any(row.lost for row in made.skipped)
        return made

    monkeypatch.setattr(plan, "Plan", checked)


def _matrices(side, opened):
    for file in opened.files:
        if file.suffix == ".gguf":
            yield from _in_gguf(side, file)
        if file.suffix != ".safetensors":
            continue
        with open(file, "rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            header = json.loads(content.read(length))
        header.pop("__metadata__", None)
        copies = getattr(opened, "superseded", {})
        for name, entry in header.items():
            if len(entry["shape"]) > 1 and f"{name} in {file.name}" not in copies:
                yield side, name


def _in_gguf(side, file):
    from gguf import GGUFReader

    yield from ((side, t.name) for t in GGUFReader(file).tensors if len(t.shape) > 1)
