"""What every benchmark needs: where it ran, and a place to keep the result."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def store(name: str, measured: dict[str, Any]) -> None:
    """Write ``results/NAME.json`` with the commit and the machine, and print it."""
    text = json.dumps({"measured": measured, "where": where()}, indent=2) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text)
    print(text)


class Cells:
    """Results that are stored one by one, so that a run that was ended goes on where it was.

    Args:
        name: Of the file ``results/NAME.jsonl``: one object a line, with what it is of, its figures
            and where they were measured.
    """

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.jsonl"
        self.known: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                cell = json.loads(line)
                self.known[json.dumps(cell["of"])] = cell

    def measure(self, of: dict[str, Any], figures: Callable[[], dict[str, Any]]) -> None:
        """Store the figures of a cell, unless they are known."""
        if json.dumps(of) in self.known:
            return
        started = time.process_time()
        found = figures()
        cell = {"of": of, "figures": found, "seconds": round(time.process_time() - started, 1)}
        cell["where"] = where()
        with self.path.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        self.known[json.dumps(of)] = cell
        print(json.dumps(of | found), flush=True)


def peak_of(command: list[str]) -> int:
    """The largest resident set among a command's processes, in bytes."""
    # from a small process: what is begun inherits the peak of the one that began it
    code = (
        "import resource, subprocess, sys; "
        "ended = subprocess.run(sys.argv[1:], check=False, stdout=subprocess.DEVNULL).returncode; "
        "print(ended, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, *command],
        check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    ended, peak = told.stdout.split()
    if ended not in ("0", "2"):  # 2: a direction was left open
        raise SystemExit(f"{command} failed: {told.stderr}")
    return int(peak)


@cache
def where() -> dict[str, Any]:
    """The commit and the machine, as far as they matter to a figure."""
    return {
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _commit() -> str:
    """The commit of the working tree, if git knows; results may change, they are what is made."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    command = [git, "describe", "--always"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    results = [":(top,exclude)benchmarks/results", ":(top,exclude)studies/forgetting/results"]
    changed = [git, "diff", "--quiet", "HEAD", "--", ":/", *results]
    dirty = subprocess.run(changed, check=False, stderr=subprocess.DEVNULL).returncode == 1
    return (found + "-dirty" * dirty) or "unknown"


def _processor() -> str:
    """The model name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
