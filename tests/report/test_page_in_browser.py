"""The report in Chromium, from a file, without a network: what a reader does with it."""

import re
import shutil

import pytest
import torch
from torch import nn

import bulkedge
from bulkedge.moments import Moments
from bulkedge.report import to_html
from helpers import EXAMPLE, MINILM, save, some, weights

api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.filterwarnings("default"),  # playwright's own
]


@pytest.fixture
def records(shipped):
    return list(shipped.values())


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
            **{"offline": True, "viewport": {"width": 1200, "height": 900}} | options
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
    assert {url.partition("#")[0] for url in asked if url.startswith("file:")} <= {
        (tmp_path / "report.html").as_uri()
    }


def names(page):
    return page.locator("#matrices tbody td:first-child .link").all_inner_texts()


def headline(page):
    return page.locator("#verdict .verdict").inner_text()


def test_the_first_screen_says_how_many_where_and_what_next(show, records):
    page = show(to_html(records[0]))
    assert headline(page) == "8 new directions in 8 of 37 matrices"
    told, steps = page.locator("#verdict").inner_text(), page.locator("#next").inner_text()
    assert "Every verdict is certain: two float64 SVDs decided it" in told
    assert "1 of the new ones is in a matrix whose base looks untrained" in told
    assert f"bulkedge repair {MINILM}" in steps
    assert "--exclude pooler.dense" in steps
    assert page.locator("#map button").count() == 37
    assert page.locator("#verdict .facts li").first.inner_text().startswith("≈ 0.")
    assert page.locator("#verdict .chart .plotly").count() == 1
    assert "at 1 7 new" in page.locator("#verdict .chart > div").get_attribute("aria-label")
    for part in ("#verdict", "#next"):  # without scrolling
        box = page.locator(part).bounding_box()
        assert box["y"] + box["height"] < 900


def test_the_commands_about_a_weaker_copy_unfold(show, records):
    page = show(to_html(records[0]))
    command = page.locator("#next details.inline code").first
    assert not command.is_visible()
    page.get_by_text("Make the update weaker").click()
    assert command.is_visible()
    assert command.inner_text().endswith("--critical-scale --exclude pooler.dense")


def test_the_verdict_needs_no_script(show, records):
    page = show(to_html(records, ["one", "eight"]), java_script_enabled=False)
    told = page.locator("main").inner_text()
    assert "8 new directions in 8 of 37 matrices" in told
    assert "22 new directions in 16 of 37 matrices" in told
    assert told.count("Every verdict is certain: two float64 SVDs decided it") == 2
    assert f"bulkedge repair {MINILM}" in told
    assert page.locator("noscript tbody tr").count() == 8 + 16
    assert page.locator("select, input, #theme").filter(visible=True).count() == 0


def test_the_table_is_sorted_and_filtered(show, records):
    page = show(to_html(records[0]))
    assert len(names(page)) == 8
    page.select_option("#only", "all")
    assert len(names(page)) == 37
    page.click("#matrices thead button:has-text('matrix')")
    up = names(page)
    assert up[0].startswith("encoder.layer.0.")
    assert up[-1] == "pooler.dense"
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
    assert page.locator("#detail-name").inner_text() == "pooler.dense"
    assert page.locator("#charts .chart").count() == 7
    assert page.locator("#charts .plotly").count() == 7
    assert page.locator("#directions tbody tr").count() == 10
    page.locator("#matrices tbody tr").nth(1).locator(".link").focus()
    page.keyboard.press("Enter")
    second = page.locator("#detail-name").inner_text()
    assert second == names(page)[1]
    page.locator("#map button").first.click()
    assert page.locator("#detail-name").inner_text().startswith("encoder.layer.0.")
    assert not page.locator("text=Share chart").count()


def test_points_tell_what_they_are(show, records):
    page = show(to_html(records[0]))
    page.click("#matrices tbody tr >> nth=0")
    point = page.locator("#charts .chart").first.locator(".points path").first
    point.hover(force=True)
    page.wait_for_selector(".hoverlayer text")
    assert "direction 0" in page.locator(".hoverlayer text").first.text_content()


def test_charts_stay_in_their_frames(show, records):
    page = show(to_html(records[0]))
    page.click("#matrices tbody tr >> nth=0")
    for chart in some(page.locator(".chart").all()):
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
    assert page.locator("#compared").inner_text() == (
        "New directions: 8 in rank one, 22 in rank eight"
    )
    rows = page.locator("#compare-table tbody tr")
    assert rows.count() == 2
    for column in ("new", "worst"):
        assert page.locator(f"#matrices th:has-text('{column}: rank eight')").count() == 1
    assert headline(page).startswith("8 new")
    rows.nth(1).locator("button").click()
    assert headline(page).startswith("22 new")
    assert page.locator("#verdict h2").inner_text() == "rank eight"
    assert "about rank eight" in page.locator("#next").inner_text()
    assert page.locator("#matrices th:has-text('worst: rank one')").count() == 1


def test_before_and_after_a_repair(show, tmp_path):
    recipe = {"include": ["encoder.layer.0.*", "encoder.layer.5.*"]}
    repaired = bulkedge.repair(MINILM, EXAMPLE / "lora-r1", tmp_path / "out", recipe=recipe)
    page = show(to_html(repaired))
    assert page.locator("#verdict h2").inner_text() == "lora-r1, repaired"  # the new one first
    page.locator("#compare-table button:has-text('show')").first.click()
    assert page.locator("#verdict h2").inner_text() == "lora-r1, as trained"
    assert "bulkedge repair" not in page.locator("#next").inner_text()  # it was just made
    page.locator("#compare-table button:has-text('show')").last.click()
    assert headline(page).startswith("No new direction in")
    assert names(page)  # not an empty table of affected ones
    assert "Nothing to take out" in page.locator("#next").inner_text()


def test_a_matrix_has_an_address_and_neighbours(show, records):
    page = show(to_html(records, ["one", "eight"]))
    page.click("#matrices tbody tr >> nth=1")
    first = page.locator("#detail-name").inner_text()
    page.click("text=‹ previous")
    assert page.locator("#detail-name").inner_text() == names(page)[0]
    page.click("text=next ›")
    assert page.locator("#detail-name").inner_text() == first
    assert first in page.url
    page.reload()
    assert page.locator("#detail-name").inner_text() == first
    page.click("text=close")
    assert page.locator("#details").is_hidden()


def test_the_map_tells_findings_from_the_rest(show, records):
    page = show(to_html(records[0]))
    for colours in ("score", "over"):
        page.select_option("#colour", colours)
        found = page.locator("#map button.found")
        assert found.count() == 8
    for button in some(page.locator("#map button").all()):
        style = button.evaluate("b => [b.style.color, b.style.background]")
        assert contrast(*style) > 4.5  # WCAG AA


def contrast(*colours):
    def luminance(colour):
        parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def test_a_filter_that_nothing_passes_says_so(show, records):
    page = show(to_html(records[0]))
    page.fill("#filter", "no such matrix")
    assert "None is so" in page.locator("#count").inner_text()


def test_a_phone_shows_a_name_on_few_lines(show, records):
    page = show(to_html(records[0]), viewport={"width": 390, "height": 800})
    heights = [row.bounding_box()["height"] for row in page.locator("#matrices tbody tr").all()]
    assert max(heights) < 120
    frame, plot = (page.locator(f"#verdict {part}").first.bounding_box()
                   for part in (".chart", ".main-svg"))  # fmt: skip
    assert plot["x"] + plot["width"] <= frame["x"] + frame["width"] + 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for part in ("#map", "#matrices"):  # nothing is cut: not the map, nor the worst score
        table = page.locator(part)
        assert table.evaluate("t => t.scrollWidth <= t.parentElement.clientWidth"), part
    assert page.locator("#matrices thead th").last.inner_text().startswith("worst")


def test_paper_is_light_and_has_the_words(show, records):
    page = show(to_html(records[0]), color_scheme="dark")
    page.click("#matrices tbody tr >> nth=0")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#words").evaluate("d => d.open")
    for chart in some(page.locator(".chart").all()):
        frame, plot = chart.bounding_box(), chart.locator(".main-svg").first.bounding_box()
        assert plot["x"] + plot["width"] <= frame["x"] + frame["width"] + 1
    assert not page.locator(".screen").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not page.locator("#words").evaluate("d => d.open")


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
    for factor, file in ((1, "a"), (1.05, "b")):
        save(tmp_path / f"{file}.safetensors", {"w.weight": factor * weights(30, 20)})
    record = bulkedge.audit(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    page = show(to_html(record))
    assert headline(page) == "No new direction in 1 matrix"
    assert "Nothing to take out" in page.locator("#next").inner_text()
    assert len(names(page)) == 1
    assert page.locator("#verdict .chart").count() == 0  # one point is no curve


def test_drift_colours_the_map_and_has_a_chart(show, tmp_path):
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20))
    with Moments(model) as moments, torch.no_grad():
        model(weights(100, 16))
    tensors = dict(model.state_dict())
    base = save(tmp_path / "base.safetensors", tensors)
    moved = tensors | {"2.weight": tensors["2.weight"] + 0.1 * weights(20, 24)}
    tuned = save(tmp_path / "tuned.safetensors", moved)
    record = bulkedge.audit(base, tuned, recipe={"top_k": 2}, moments=moments)
    page = show(to_html([record, bulkedge.audit(base, tuned, recipe={"top_k": 2})]))
    assert page.locator("#compare-table th").all_inner_texts()[-2] == "mean drift"
    page.select_option("#colour", "drift")
    percent = f"{100 * record.matrices[1].drift:.2g}"
    assert [float(x) for x in page.locator("#map button").all_inner_texts()] == [0, float(percent)]
    assert f"{float(percent):g} %: the most here" in page.locator("#legend").inner_text()
    page.locator("#map button").last.click()
    titles = page.locator(".chart h3").all_inner_texts()
    assert titles[-1] == "What carries the drift"
    assert "part of the drift" in page.locator("#directions").inner_text()
    page.locator("#compare-table button:not([disabled])").click()
    assert page.locator("#map button").all_inner_texts() == ["–", "–"]
    assert "drift" not in page.locator("#matrices thead").inner_text()
    alone = show(to_html(bulkedge.audit(base, tuned, recipe={"top_k": 2})))
    assert alone.locator("#colour option").count() == 2
