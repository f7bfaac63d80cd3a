"""What every benchmark needs: where it ran, and a place to keep the result."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def store(name: str, measured: dict[str, Any]) -> None:
    """Write ``results/NAME.json`` with the commit and the machine, and print it."""
    text = json.dumps({"measured": measured, "where": _where()}, indent=2) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text)
    print(text)


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


def _where() -> dict[str, Any]:
    """The machine, as far as it matters to a figure."""
    return {
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _commit() -> str:
    """The commit of the working tree, if git knows."""
    git = shutil.which("git")
    command = [git or "git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False) if git else None
    return (found.stdout.strip() if found else "") or "unknown"


def _processor() -> str:
    """The model name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
