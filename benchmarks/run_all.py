"""The benchmarks of this folder, one after the other, within a limit of time.

    python benchmarks/run_all.py MINILM [--minutes 30]
    python benchmarks/run_all.py --quick            # small matrices, once, nothing stored

What does not fit is ended or left out, and named at the end: run it alone.  Each stores its result
when it is done, so that what was measured before stays.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
STAGES = (
    ("precision.py",),
    ("triplet.py", "gradient"),
    ("training_step.py",),
    ("certified.py", "speed"),
    ("audit_memory.py",),
    ("dry_run.py",),
    ("certified.py", "model"),
    ("monitor.py", "MINILM"),
    ("monitor_default.py", "MINILM"),
    ("predicted.py",),
    ("report_page.py",),
    ("certified.py", "cost"),
    ("rmt.py", "fit"),
    ("triplet.py", "seeds", "choose"),
    ("rmt.py", "alarms"),
    ("repair.py",),
)
"""In order of worth; the last ones are the first to be left out."""
QUICK = (("before_after.py", "--quick"),)


def run(stage: tuple[str, ...], seconds: float | None) -> str | None:
    """One benchmark; why it has no result, or None."""
    command = [sys.executable, str(HERE / stage[0]), *stage[1:]]
    try:
        code = subprocess.run(command, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return "ended: no time was left"
    return f"failed with code {code}" if code else None


def run_within(stages: tuple[tuple[str, ...], ...], minutes: float) -> dict[str, str]:
    """All of them within so many minutes; those without a result, and why."""
    begun, without = time.monotonic(), {}
    for number, stage in enumerate(stages, start=1):
        name = " ".join(stage)
        left = 60 * minutes - (time.monotonic() - begun)
        print(f"[{number} of {len(stages)}, {max(left, 0) / 60:.0f} min left] {name}", flush=True)
        started = time.monotonic()
        why = run(stage, left) if left > 0 else "left out: no time was left"
        print(f"{name} took {(time.monotonic() - started) / 60:.1f} min", flush=True)
        if why is not None:
            without[name] = why
    return without


def main() -> int:
    """Run them; 1 if one has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("minilm", nargs="?", help="the folder of the MiniLM model")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--quick", action="store_true", help="small matrices, once, not stored")
    asked = parser.parse_args()
    stages = QUICK if asked.quick else STAGES
    if (minilm := asked.minilm) is None:
        named = tuple(stage for stage in stages if "MINILM" not in stage)
    else:
        named = tuple(tuple(minilm if x == "MINILM" else x for x in s) for s in stages)
    without = run_within(named, asked.minutes)
    for name, why in without.items():
        print(f"{name}: {why}")
    return int(any(why.startswith("failed") for why in without.values()))


if __name__ == "__main__":
    sys.exit(main())
