"""The report as text: its policy, its data, and names that would be more than names."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

import bulkedge
from bulkedge import InputError
from bulkedge.report import to_html
from bulkedge.report.parts import PLOTLY
from helpers import save, some, weights

PAGE = Path(bulkedge.__file__).parent / "report" / "page"
HOSTILE = (
    "</script><script>alert(1)</script>.weight",
    "<img src=x onerror=alert(1)>.weight",
    "a&quot;onmouseover=alert(1)//.weight",
    "=HYPERLINK(\"http://x\").{{data}}.weight",
)  # fmt: skip


@pytest.fixture
def records(shipped):
    return list(shipped.values())


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    for side in (1, 2):
        tensors = {name: side * weights(20, 16, seed=i) for i, name in enumerate(HOSTILE)}
        save(folder / f"{side}</script>.safetensors", tensors)
    return bulkedge.audit(folder / "1</script>.safetensors", folder / "2</script>.safetensors")


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))


def test_scripts_are_those_of_the_policy_and_no_others(records):
    page = to_html(records[0])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'none'; form-action 'none'; base-uri 'none'" in policy
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 3
    for script in some(scripts):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe-eval" not in policy


def test_plotly_is_the_published_file_with_its_licence():
    code = (PAGE / "plotly-cartesian.min.js").read_bytes()
    assert hashlib.sha256(code).hexdigest() == PLOTLY
    assert (PAGE / "plotly-LICENSE").read_text().startswith("MIT License")


def test_nothing_is_fetched_or_uploaded(records):
    page = to_html(records)
    own = page.replace((PAGE / "plotly-cartesian.min.js").read_text(), "")
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:|//)""", own)
    assert "showSendToCloud: false" in own
    assert "fetch(" not in own
    assert "innerHTML" not in own


def test_the_data_are_the_record(records):
    page = to_html(records, ["one", "eight"])
    parts = data_of(page)["records"]
    assert [part["label"] for part in parts] == ["one", "eight"]
    for part, record in some(zip(parts, records, strict=True)):
        assert part["summary"]["new_directions"] == record.summary.new_directions
        assert [m["name"] for m in part["matrices"]] == [m.name for m in record.matrices]
        for shown, matrix in some(zip(part["matrices"], record.matrices, strict=True)):
            assert len(shown["directions"]) == len(matrix.directions)
            assert shown["worst"] == pytest.approx(min(d.score for d in matrix.directions), 1e-4)
            assert len(shown["similarity"]["left"]) == 10
            assert len(shown["similarity"]["left"][0]) == 20
            assert shown["spectrum"]["ranks"][-1] == min(matrix.shape) - 1


def test_hostile_names_end_no_script(hostile):
    page = to_html(hostile, [HOSTILE[0]])
    assert page.count("</script>") == 4
    names = {matrix["name"] for matrix in data_of(page)["records"][0]["matrices"]}
    assert names == set(HOSTILE)
    assert "&lt;/script&gt;" in page  # in the title


def test_the_verdict_and_the_worst_stand_there_without_a_script(records):
    (static,) = re.findall(r"<noscript>\n(.*?)</noscript>", to_html(records), re.DOTALL)
    assert "8 new directions in 8 of 37 matrices" in static
    assert "22 new directions in 16 of 37 matrices" in static
    assert static.count("<tr>") == 2 + 8 + 16
    assert "<td>pooler.dense</td>" in static


def test_names_are_no_markup_without_a_script(hostile):
    (static,) = re.findall(r"<noscript>\n(.*?)</noscript>", to_html(hostile), re.DOTALL)
    assert "<img" not in static
    assert "<script" not in static


def test_a_page_is_small(records):
    assert len(to_html(records[0])) < 2e6
    per_matrix = len(json.dumps(data_of(to_html(records[0])))) / len(records[0].matrices)
    assert 1.6e6 + 2 * 224 * per_matrix < 10e6  # a model of 7B, both sides


def test_equal_names_are_told_apart_and_labels_must_fit(records):
    parts = data_of(to_html([records[0], records[0]]))["records"]
    assert [part["label"] for part in parts] == ["lora-r1 (1)", "lora-r1 (2)"]
    with pytest.raises(InputError, match="expected 1 labels, one for each audit, got 2"):
        to_html(records[0], ["a", "b"])
    with pytest.raises(InputError, match="at least one record"):
        to_html([])
