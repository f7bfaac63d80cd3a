"""What is shown of a frontier: sentences, table, and a page on which names do nothing."""

import base64
import hashlib
import io
import json
import re

import pytest
from rich.console import Console

from bulkedge.report import frontier_page, print_frontier
from bulkedge.report.frontier import frontier_headline, frontier_remarks
from frontiers import POINTS, made
from helpers import some

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{data}}\x1b[31m"


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))


def shown(record, **settings):
    print_frontier(record, Console(file=(text := io.StringIO()), width=120), **settings)
    return text.getvalue()


def test_it_says_where_protecting_gains():
    record = made()
    assert frontier_headline(record) == (
        "At the same kept, protecting is better at task than scaling at 1 of 1 strength that can "
        "be compared, most at λ = 1: 0.05"
    )
    remarks = " ".join(frontier_remarks(record))
    assert "It retains more than scaling did at any strength at λ = 4." in remarks
    assert "Without moments of the task" in remarks


def test_it_says_where_protecting_gains_nothing():
    worse = [(*row[:3], 0.1, row[4]) if row[1] == "protected" else row for row in POINTS[:4]]
    assert frontier_headline(made(worse)).startswith(
        "At the same kept, protecting is not better at task than scaling at any of 1 strength"
    )
    assert "It is worse at λ = 1." in frontier_remarks(made(worse))
    apart = [*POINTS[:3], POINTS[4], ("protected-9", "protected", 9.0, 1.0, 0.0)]
    assert "nothing to compare" in frontier_headline(made(apart))
    assert "It retains less than scaling did at any strength at λ = 9." in frontier_remarks(
        made(apart)
    )


def test_matrices_that_stayed_are_told():
    (told,) = (s for s in frontier_remarks(made(refused=["a\x1b.weight"])) if "NOT" in s)
    assert told.startswith("1 matrix could NOT be changed in some copies, such as a\\x1b.weight in")


def test_the_terminal_has_the_points_in_order():
    lines = shown(made()).splitlines()
    names = [line.split()[0] for line in lines[1:6]]
    assert names == ["as-trained", "scaled-0.25", "protected-1", "scaled-0.5", "protected-4"]
    assert re.search(r"scaled-0\.25 +0\.5 +0\.2 +scaled-0\.5, protected-1 \+1$", lines[2])
    assert re.search(r"protected-1 +0\.85 +0\.2 +0\.8 +\+0\.05", lines[3])
    assert len(shown(made(), brief=True).splitlines()) <= 2
    assert "\x1b" not in shown(made(names=(HOSTILE, "kept"), name=HOSTILE))


def test_scripts_are_those_of_the_policy_and_no_others():
    page = frontier_page(made())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'none'; form-action 'none'; base-uri 'none'" in policy
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 3
    for script in some(scripts):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    own = page.replace(scripts[0], "")
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:|//)""", own)
    assert "innerHTML" not in own


def test_the_points_stand_there_without_a_script():
    record = made()
    (static,) = re.findall(r"<noscript>\n(.*?)</noscript>", frontier_page(record), re.DOTALL)
    assert static.count("<tr>") == 1 + len(record.points)
    assert f"<td>{record.points[0].name}</td>" in static


def test_hostile_names_end_no_script():
    page = frontier_page(made(names=(HOSTILE, "kept"), name=HOSTILE))
    assert page.count("</script>") == 4
    data = data_of(page)
    assert data["task"]["name"] == HOSTILE.replace("\x1b", "\\x1b")
    assert "&lt;/script&gt;" not in data["headline"]


def test_the_data_are_the_points():
    data = data_of(frontier_page(made(lower=("kept",))))
    assert [p["name"] for p in data["points"]] == [p.name for p in made(lower=("kept",)).in_order]
    assert data["keep"] == {"name": "kept", "lower": True}
    assert data["lines"]["scaled"] == ["as-trained", "scaled-0.5", "scaled-0.25"]
    assert data["lines"]["protected"] == ["as-trained", "protected-1", "protected-4"]
    assert all(len(p["cells"]) == len(data["columns"]) - 1 for p in some(data["points"]))
    assert [p["command"] for p in data["points"]].count("make adapter") == 4


def test_the_page_in_a_browser(tmp_path):
    api = pytest.importorskip("playwright.sync_api")
    import shutil

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium")
    told, asked = [], []
    (tmp_path / "page.html").write_text(
        frontier_page(made(names=(HOSTILE, "kept"), name=HOSTILE)), encoding="utf-8"
    )
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(offline=True).new_page()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("dialog", lambda dialog: told.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector("#chart .scatterlayer")
        assert page.locator("#points tbody tr").count() == 5
        assert page.locator("#commands dt").count() == 5
        assert "[object" not in page.inner_text("#commands")
        assert page.locator("main img, main a").count() == 0
        page.click("#theme")
        browser.close()
    assert told == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
