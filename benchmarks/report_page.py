"""A report of a whole model in a browser: how large the page is, and how soon it is there.

    python benchmarks/report_page.py [--scale 1] [--made FOLDER]     (needs playwright and Chromium)

Audits the made-up model of the shape of 7B (made_up_model.py) on both sides, writes the page, and
opens it from the disk, without a network, in a fresh browser each time.  *Seen* is from the
navigation to the first frame after everything is drawn, *opened* from a click on a matrix to the
first frame with its charts.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import made_up_model
from common import store

import bulkedge
from bulkedge.report import to_html

REPEATS = 5
FRAME = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
CLICK = f"""async () => {{
  const start = performance.now();
  document.querySelector('#matrices tbody .link').click();
  await {FRAME};
  return performance.now() - start;
}}"""


def open_once(browser: Any, path: Path) -> tuple[float, float]:
    """Milliseconds until the page is seen, and until its first matrix is open."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(path.as_uri(), wait_until="load")
    seen = page.evaluate(f"{FRAME}.then(() => performance.now())")
    opened = page.evaluate(CLICK)
    context.close()
    return seen, opened


def main() -> None:
    """Make, audit, write, open."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=int, default=16)
    parser.add_argument("--made", type=Path, help="a folder that made_up_model.py has filled")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        folder = arguments.made or Path(place) / "model"
        if arguments.made is None:
            made_up_model.make(folder, arguments.scale)
        record = bulkedge.audit(
            folder / "base", folder / "adapter", recipe={"side": "both"}, jobs=2
        )
        path = Path(place) / "report.html"
        path.write_text(to_html(record), encoding="utf-8")
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        times = []
        for _ in range(REPEATS):
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            times.append(open_once(browser, path))
            browser.close()
        seen, opened = zip(*times, strict=True)
        store(
            f"report_page_{arguments.scale}",
            {
                "scale": arguments.scale,
                "matrices": len(record.matrices),
                "directions": sum(len(matrix.directions) for matrix in record.matrices),
                "intruders": record.summary.new_directions,
                "page_MB": round(path.stat().st_size / 1e6, 2),
                "seen_ms": round(statistics.median(seen)),
                "seen_ms_most": round(max(seen)),
                "opened_ms": round(statistics.median(opened)),
                "opened_ms_most": round(max(opened)),
            },
        )


if __name__ == "__main__":
    main()
