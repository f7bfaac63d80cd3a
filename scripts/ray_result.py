"""Store the last result of the tests on a Ray cluster, which are no part of CI.

python scripts/ray_result.py JUNIT.XML PYTHON
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree  # of a file that pytest has just written
from pathlib import Path

RESULT = Path(__file__).parents[1] / "benchmarks/results/ray.json"
VERSIONS = "import json, sys, ray, torch; print(json.dumps([ray.__version__, torch.__version__]))"


def main(report: str, python: str) -> None:
    """Write the counts of a run, its longest tests, and the versions that it was run with."""
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")  # noqa: S314 — own file
    ray, torch = json.loads(subprocess.check_output([python, "-c", VERSIONS], text=True))
    seconds = {case.get("name", ""): float(case.get("time", 0)) for case in suite.iter("testcase")}
    result = {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "ray": ray,
        "torch": torch,
        **{name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")},
        "seconds": {n: round(s, 1) for n, s in sorted(seconds.items()) if s >= 1},
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
