"""The same charts for papers: on axes that are given, in vectors, of what the record says."""

import io

import pytest

import bulkedge
from bulkedge import InputError
from bulkedge.report import plots
from helpers import EXAMPLE, MINILM

matplotlib = pytest.importorskip("matplotlib")
NAME = "encoder.layer.0.attention.self.value.weight"
ALL = [plots.scores, plots.scree, plots.density, plots.spikes, plots.similarity]


@pytest.fixture(scope="module")
def record():
    return bulkedge.audit(MINILM, EXAMPLE / "lora-r8", recipe={"include": ["encoder.layer.0.*"]})


@pytest.mark.parametrize("plot", ALL)
def test_it_draws_where_it_is_told_and_alone(plot, record):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert plot(record, NAME, ax=ax) is ax
    alone = plot(record, NAME)
    assert alone.get_xlabel()
    assert alone.get_ylabel()
    text = io.StringIO()
    alone.figure.savefig(text, format="svg")
    assert "<image" not in text.getvalue() or plot is plots.similarity  # its colour bar


def test_scores_are_those_of_the_record(record):
    ax = plots.scores(record, NAME)
    (row,) = [matrix for matrix in record.matrices if matrix.name == NAME]
    drawn = sorted(y for bars in ax.containers for y in bars.lines[0].get_ydata())
    assert drawn == pytest.approx(sorted(direction.score for direction in row.directions))


def test_spikes_are_over_the_threshold(record):
    ax = plots.spikes(record, NAME)
    (row,) = [matrix for matrix in record.matrices if matrix.name == NAME]
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx([p.theta / row.threshold for p in row.predicted])


@pytest.mark.parametrize("plot", ALL)
def test_unknown_names_are_refused(plot, record):
    with pytest.raises(InputError, match="expected a matrix of the record"):
        plot(record, "nowhere")


@pytest.mark.parametrize("plot", [plots.scores, plots.similarity])
def test_a_side_that_was_not_audited_is_refused(plot, record):
    with pytest.raises(InputError, match="of the right side"):
        plot(record, NAME, side="right")
