"""The report in Chromium, from a file, without a network: what a reader does with it."""

import shutil

import pytest

import bulkedge
from bulkedge.report import to_html
from helpers import EXAMPLE, MINILM, save, weights

api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.filterwarnings("default"),  # playwright's own
]


@pytest.fixture(scope="module")
def records():
    return [bulkedge.audit(MINILM, EXAMPLE / name) for name in ("lora-r1", "lora-r8")]


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open a page; at the end nothing was asked for, and nothing went wrong."""
    told, asked, opened = [], [], []

    def open_page(html, **options):
        path = tmp_path / "report.html"
        path.write_text(html, encoding="utf-8")
        context = browser.new_context(
            offline=True, viewport={"width": 1200, "height": 900}, **options
        )
        page = context.new_page()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: told.append(f"dialog: {dialog.message}"))
        page.goto(path.as_uri())
        opened.append(context)
        return page

    yield open_page
    for context in opened:
        context.close()
    assert told == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    assert sum(url.startswith("file:") for url in asked) == len(opened)


def names(page):
    return page.locator("#matrices tbody td:first-child").all_inner_texts()


def test_the_first_screen_says_how_many_where_and_what_next(show, records):
    page = show(to_html(records[0]))
    assert page.locator(".verdict").inner_text() == "8 new directions in 8 matrices of 37"
    assert "bulkedge repair" in page.locator("#next").inner_text()
    assert page.locator("#map button").count() == 37
    for part in ("#verdict", "#next"):  # without scrolling
        box = page.locator(part).bounding_box()
        assert box["y"] + box["height"] < 900


def test_the_table_is_sorted_and_filtered(show, records):
    page = show(to_html(records[0]))
    assert len(names(page)) == 8
    page.select_option("#only", "all")
    assert len(names(page)) == 37
    page.click("#matrices thead button:has-text('matrix')")
    up = names(page)
    assert up[0].startswith("encoder.layer.0.")
    assert up[-1] == "pooler.dense.weight"
    page.click("#matrices thead button:has-text('matrix')")
    assert names(page) == up[::-1]
    assert page.locator("#matrices th[aria-sort=descending]").count() == 1
    page.click("#matrices thead button:has-text('worst score')")
    worst = [float(x) for x in page.locator("#matrices tbody td:nth-child(8)").all_inner_texts()]
    assert worst == sorted(worst)
    page.fill("#filter", "QUERY")
    assert len(names(page)) == 6
    assert page.locator("#count").inner_text() == "6 of 37 matrices"


def test_a_matrix_opens_by_mouse_by_keyboard_and_from_the_map(show, records):
    page = show(to_html(records[0]))
    page.click("#matrices tbody tr >> nth=0")
    assert page.locator("#detail-name").inner_text() == "pooler.dense.weight"
    assert page.locator(".chart").count() == 6
    assert page.locator(".chart .plotly").count() == 6
    assert page.locator("#directions tbody tr").count() == 10
    page.locator("#matrices tbody tr").nth(1).focus()
    page.keyboard.press("Enter")
    second = page.locator("#detail-name").inner_text()
    assert second == names(page)[1]
    page.locator("#map button").first.click()
    assert page.locator("#detail-name").inner_text().startswith("encoder.layer.0.")
    assert not page.locator("text=Share chart").count()


def test_points_tell_what_they_are(show, records):
    page = show(to_html(records[0]))
    page.click("#matrices tbody tr >> nth=0")
    point = page.locator(".chart").first.locator(".points path").first
    point.hover(force=True)
    page.wait_for_selector(".hoverlayer text")
    assert "direction 0" in page.locator(".hoverlayer text").first.text_content()


def test_charts_stay_in_their_frames(show, records):
    page = show(to_html(records[0]))
    page.click("#matrices tbody tr >> nth=0")
    for chart in page.locator(".chart").all():
        frame, plot = chart.bounding_box(), chart.locator(".main-svg").first.bounding_box()
        assert plot["x"] >= frame["x"]
        assert plot["x"] + plot["width"] <= frame["x"] + frame["width"] + 1


def test_light_and_dark(show, records):
    page = show(to_html(records[0]), color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.click("#theme")
    light = page.evaluate(background)
    assert (dark, light) == ("rgb(21, 24, 28)", "rgb(255, 255, 255)")
    page.click("#theme")
    assert page.evaluate(background) == dark


def test_records_side_by_side(show, records):
    page = show(to_html(records, ["rank one", "rank eight"]))
    rows = page.locator("#compare-table tbody tr")
    assert rows.count() == 2
    assert page.locator("#matrices th:has-text('worst: rank eight')").count() == 1
    before = page.locator(".verdict").inner_text()
    rows.nth(1).click()
    assert page.locator(".verdict").inner_text() != before
    assert page.locator("#matrices th:has-text('worst: rank one')").count() == 1


def test_hostile_names_stay_inert(show, tmp_path):
    hostile = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a{{data}}b"]
    for factor, file in ((1, "a"), (2, "b")):
        tensors = {name: factor * weights(20, 16, seed=i) for i, name in enumerate(hostile)}
        save(tmp_path / f"{file}.safetensors", tensors)
    record = bulkedge.audit(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    page = show(to_html(record))
    page.select_option("#only", "all")
    assert set(names(page)) == set(hostile)
    for row in range(3):
        page.locator("#matrices tbody tr").nth(row).click()
    assert page.locator("img").count() == 0


def test_a_fine_tune_without_findings_says_so(show, tmp_path):
    for factor, file in ((1, "a"), (1.5, "b")):
        save(tmp_path / f"{file}.safetensors", {"w.weight": factor * weights(30, 20)})
    record = bulkedge.audit(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    page = show(to_html(record))
    assert page.locator(".verdict").inner_text() == "No new direction in 1 matrix"
    assert "Nothing to do" in page.locator("#next").inner_text()
    assert len(names(page)) == 1
