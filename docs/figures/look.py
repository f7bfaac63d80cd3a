"""Pictures to look at before a release: the page at two widths, the terminal at two.

python docs/figures/look.py FOLDER      (needs playwright and Chromium)

They are not kept in the repository.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from bulkedge.report import print_record, to_html
from report import ROOT, shown_record

WIDTHS, SCHEMES, COLUMNS = (390, 1280), ("light", "dark"), (60, 100)
HEIGHT = 844


def pages(page: str) -> Iterator[tuple[str, bytes]]:
    """The page in full, and its first screen, in each width and colour scheme."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width in WIDTHS:
            for scheme in SCHEMES:
                viewport = {"width": width, "height": HEIGHT}
                opened = browser.new_page(viewport=viewport, color_scheme=scheme)
                opened.set_content(page)
                opened.wait_for_timeout(500)
                yield f"page-{width}-{scheme}-first", opened.screenshot()
                opened.locator("#next .link").first.click()
                opened.wait_for_timeout(500)
                yield f"page-{width}-{scheme}", opened.screenshot(full_page=True)
                opened.close()
        browser.close()


def main(folder: str) -> None:
    """Audit, and write the pictures and the terminal's lines."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    record = shown_record(ROOT / "examples/minilm_wordnet/lora-r1", "lora-r1")
    for columns in COLUMNS:
        stream = io.StringIO()
        print_record(record, Console(file=stream, width=columns, force_terminal=True,
                                     color_system=None))  # fmt: skip
        (out / f"terminal-{columns}.txt").write_text(stream.getvalue(), encoding="utf-8")
    for name, content in pages(to_html(record)):
        (out / f"{name}.png").write_bytes(content)


if __name__ == "__main__":
    main(*sys.argv[1:])
