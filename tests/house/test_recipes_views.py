"""The recipes of CONTRIBUTING.md for a verdict and a report column, followed in a copy."""

import pytest
from test_recipes import Copy, is_named

pytestmark = pytest.mark.timeout(300)

SCORE = "src/bulkedge/intruder/score.py"
LOOKS = "src/bulkedge/report/verdicts.py"
COLUMNS = "src/bulkedge/report/columns.py"
PAGE, SCORE_TESTS = "docs/audit.md", "tests/intruder/test_score.py"
REPORT_TESTS = "tests/test_report.py"
ALWAYS = ("tests/house/test_sizes.py", "tests/house/test_cycles.py")

# the leading direction of one matrix turns into many others: its score falls to 0.52
AUDIT = """
import io, sys, tempfile
from pathlib import Path
import torch
from rich.console import Console
from safetensors.torch import save_file
import bulkedge
from bulkedge import report

folder = Path(tempfile.mkdtemp())
sigma = torch.cat([torch.tensor([300.0]), torch.linspace(3, 1, 39)])
base, turned = torch.diag(sigma), torch.diag(sigma)
turned[0, 0], turned[20:, 0] = 300 * 0.52, 300 * ((1 - 0.52**2) / 20) ** 0.5
save_file({"a.weight": base, "b.weight": base.clone()}, folder / "base.safetensors")
save_file({"a.weight": turned, "b.weight": 1.01 * base}, folder / "tuned.safetensors")
record = bulkedge.audit(folder / "base.safetensors", folder / "tuned.safetensors",
                       recipe={"epsilon": float(sys.argv[1])})
terminal = io.StringIO()
report.print_record(record, Console(file=terminal, width=160))
print(terminal.getvalue())
for format in ("markdown", "csv", "html", "junit"):
    print(f"== {format}", report.render(record, format).replace(
        report.html._page("plotly-cartesian.min.js"), ""))
print("==", dict(record.summary.verdicts))
"""


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


def views(copy, epsilon=0.5):
    """What an audit in the copy shows in each view."""
    printed = copy.run("-c", AUDIT, str(epsilon))
    names = ("terminal", "markdown", "csv", "html", "junit", "verdicts")
    return dict(zip(names, printed.split("\n=="), strict=True))


def file_with(copy, text):
    """The file of intruder/ that a recipe means by what is in it."""
    (found,) = (
        path
        for path in (copy.top / "src/bulkedge/intruder").glob("*.py")
        if text in path.read_text(encoding="utf-8")
    )
    return str(found.relative_to(copy.top))


def follow(copy, title, edits):
    for edit in edits:
        copy.put(*edit)
    assert [path for path in copy.touched if not is_named(path, title)] == []
    assert len([path for path in copy.touched if path.startswith("src/")]) <= 3
    copy.run("-m", "pytest", "-q", "-o", "addopts=", *ALWAYS)


@pytest.mark.slow
def test_a_verdict(copy):
    interval = "    if lower >= epsilon:\n"
    edits = [
        (SCORE, '    ROTATED = "rotated"', '    NEAR = "near"\n    """Its score is near ε."""\n'),
        (
            SCORE,
            "    if score >= epsilon:\n",
            "    if abs(score - epsilon - 0.05) < vector_error:\n"
            "        return Verdict.UNDECIDED\n"
            "    if epsilon <= score < epsilon + 0.05:\n"
            "        return Verdict.NEAR\n",
        ),
        (
            file_with(copy, interval),
            interval,
            "    if epsilon <= lower < epsilon + 0.05:\n"
            "        return Verdict.NEAR if upper < epsilon + 0.05 else Verdict.UNDECIDED\n",
        ),
        (
            LOOKS,
            "    Verdict.ROTATED: ",
            '    Verdict.NEAR: Appearance(\n        several="near", meaning="Nearly new.",\n'
            '        ink="#009E73", mark="^", light="#007755", dark="#55ddaa",\n    ),\n',
        ),
        (PAGE, "| `rotated` |", "| `near` | ε ≤ score < ε + 0.05 | nearly new |\n"),
        (
            SCORE_TESTS,
            "def judge(",
            "def test_a_near_score():\n"
            '    assert verdict(0.52, 0.6, epsilon=0.5).value == "near"\n\n\n',
        ),
    ]
    follow(copy, "Add a verdict", edits)
    near = copy.run("-m", "pytest", "-o", "addopts=", SCORE_TESTS, "-k", "near_score")
    assert "1 passed" in near
    appearance = "tests/test_report.py::test_every_verdict_has_its_appearance"
    assert "1 passed" in copy.run("-m", "pytest", "-o", "addopts=", appearance)
    shown = views(copy)
    assert "<Verdict.NEAR: 'near'>: 1" in shown["verdicts"]
    assert '"near"' in shown["csv"]
    assert "<dt>near</dt><dd>Nearly new.</dd>" in shown["html"]
    assert "--near: light-dark(#007755, #55ddaa);" in shown["html"]
    assert '<option value="near">with near</option>' in shown["html"]


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
    follow(copy, "Add a report column", edits)
    assert "1 passed" in copy.run("-m", "pytest", "-o", "addopts=", REPORT_TESTS, "-k", "products")
    shown = views(copy, epsilon=0.6)
    for view in ("terminal", "markdown", "csv", "html"):
        assert "products" in shown[view], view
        assert ".25" in shown[view], view
    assert "products" not in shown["junit"]
