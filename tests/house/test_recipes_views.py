"""The recipes of CONTRIBUTING.md for a verdict and a report column, followed in a copy."""

import pytest
from recipe import Copy, follow_and_check

pytestmark = pytest.mark.timeout(300)

VERDICT = "src/bulkedge/_verdict.py"
LOOKS = "src/bulkedge/report/verdicts.py"
COLUMNS = "src/bulkedge/report/columns.py"
PAGE, SCORE_TESTS = "docs/audit.md", "tests/intruder/test_score.py"
REPORT_TESTS = "tests/test_report.py"

# the leading direction of one matrix turns into many others: its score falls to 0.52
VIEWS = """
import io

import torch
from rich.console import Console

import bulkedge
from bulkedge import report
from helpers import save


def views(folder, epsilon):
    sigma = torch.cat([torch.tensor([300.0]), torch.linspace(3, 1, 39)])
    base, turned = torch.diag(sigma), torch.diag(sigma)
    turned[0, 0], turned[20:, 0] = 300 * 0.52, 300 * ((1 - 0.52**2) / 20) ** 0.5
    before = save(folder / "b.safetensors", {"a.weight": base, "b.weight": base})
    after = save(folder / "t.safetensors", {"a.weight": turned, "b.weight": 1.01 * base})
    record = bulkedge.audit(before, after, recipe={"epsilon": epsilon})
    shown = {name: report.render(record, name) for name in ("markdown", "csv", "html", "junit")}
    shown["html"] = shown["html"].replace(report.parts.part("plotly-cartesian.min.js"), "")
    report.print_record(record, Console(file=(terminal := io.StringIO()), width=160))
    return record, shown | {"terminal": terminal.getvalue()}

"""
VERDICT_VIEWS = (
    VIEWS
    + """
def test_near_in_every_view(tmp_path):
    record, shown = views(tmp_path, 0.6)
    assert record.summary.verdicts["near"] == 1
    assert '"near"' in shown["csv"]
    assert "<dt>near</dt><dd>Barely new.</dd>" in shown["html"]
    assert "--near: light-dark(#007755, #55ddaa);" in shown["html"]
    assert '<option value="near">with near</option>' in shown["html"]
    assert ": 1 is close (near), 0 lie mostly" in report.advice.explanation(record)[0]


def test_near_can_be_selected(tmp_path):
    views(tmp_path, 0.6)
    before, after = (tmp_path / f"{name}.safetensors" for name in "bt")
    record = bulkedge.repair(
        before, after, None, method=bulkedge.Scale(), select="near", recipe={"epsilon": 0.6}
    )
    assert record.selection["select"] == "near"
    assert [row.status for row in record.matrices] == ["repaired"]
"""
)
COLUMN_VIEWS = (
    VIEWS
    + """
def test_products_in_every_view(tmp_path):
    _, shown = views(tmp_path, 0.6)
    for view in ("terminal", "markdown", "csv", "html"):
        assert "products" in shown[view], view
        assert ".25" in shown[view], view
    assert "products" not in shown["junit"]
"""
)


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


@pytest.mark.slow
def test_a_verdict(copy):
    edits = [
        (
            VERDICT,
            '    ROTATED = "rotated"',
            '    NEAR = "near"\n    """Its score is almost ε."""\n',
        ),
        (VERDICT, "Verdict.ROTATED, Verdict.INTRUDER)", "Verdict.NEAR, "),
        (
            VERDICT,
            "    if not abs(subspace_overlap",
            "    if abs(score - epsilon + 0.1) < vector_error:\n"
            "        return Verdict.UNDECIDED\n"
            "    if score >= epsilon - 0.1:\n"
            "        return Verdict.NEAR\n",
        ),
        (
            LOOKS,
            "    Verdict.ROTATED: ",
            '    Verdict.NEAR: Appearance(\n        several="near", meaning="Barely new.",\n'
            '        ink="#009E73", mark="^", light="#007755", dark="#55ddaa",\n'
            '        clauses=("is close", "are close"),\n    ),\n',
        ),
        (PAGE, "| `rotated` |", "| `near` | ε − 0.1 ≤ score < ε | barely new |\n"),
        (
            SCORE_TESTS,
            "def judge(",
            "def test_a_near_score():\n"
            '    assert verdict(0.52, 0.6, epsilon=0.6).value == "near"\n\n\n',
        ),
    ]
    copy.check("tests/report/test_near.py", VERDICT_VIEWS)
    tests = (SCORE_TESTS, REPORT_TESTS, "tests/report/test_near.py", "tests/test_cli.py")
    new = "near_score or near_in or near_can or every_verdict_has or what_can_be_chosen"
    follow_and_check(copy, "Add a verdict", edits, tests, new)


@pytest.mark.slow
def test_a_report_column(copy):
    entry = '    number("products", "products", lambda m: m.passes + 0.25, 2, views=EVERYWHERE),\n'
    tested = (
        "def test_products():\n"
        "    (column,) = (c for c in columns.COLUMNS if c.name == 'products')\n"
        "    assert column.views == columns.EVERYWHERE\n\n\n"
    )
    edits = [
        (COLUMNS, '    number("worst",', entry),
        (REPORT_TESTS, "def printed(", tested),
    ]
    copy.check("tests/report/test_products.py", COLUMN_VIEWS)
    tests = (REPORT_TESTS, "tests/report/test_products.py")
    follow_and_check(copy, "Add a report column", edits, tests, "test_products")
