"""Store the last result of tests that are no part of CI.

python scripts/test_result.py JUNIT.XML NAME PACKAGE…

It goes to NAME.json in ``benchmarks/results``, with the versions of the packages as the Python that
runs this has them.
"""

from __future__ import annotations

import datetime
import json
import sys
import xml.etree.ElementTree as ElementTree  # of a file that pytest has just written
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks/results"


def main(report: str, name: str, *packages: str) -> None:
    """Write the counts of a run, its longest tests, and the versions that it was run with."""
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")  # noqa: S314 — own file
    seconds = {case.get("name", ""): float(case.get("time", 0)) for case in suite.iter("testcase")}
    result = {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        **{package: version(package) for package in packages},
        **{part: int(suite.get(part, 0)) for part in ("tests", "failures", "errors", "skipped")},
        "seconds": {n: round(s, 1) for n, s in sorted(seconds.items()) if s >= 1},
    }
    text = json.dumps(result, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
