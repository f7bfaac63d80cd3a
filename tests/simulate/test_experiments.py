"""What every experiment keeps to, whatever it is about."""

from __future__ import annotations

import json
import math

import pytest

from bulkedge import InputError, RecipeError, __version__
from bulkedge.simulate import EXPERIMENTS, Rank, Table, Transition, configure, draw, run, to_svg
from bulkedge.simulate.laws import Laws
from helpers import some

every = pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)


@pytest.fixture(scope="module")
def tables():
    """One quick table of each experiment."""
    return {name: kind(**kind.quick).run() for name, kind in EXPERIMENTS.items()}


@every
def test_a_table_is_plain_numbers_under_documented_columns(experiment, tables):
    table = tables[experiment.name]
    assert table.experiment == experiment.name
    assert table.version == __version__
    assert table.config == experiment(**experiment.quick).model_dump(mode="json")
    assert table.columns == experiment.columns()
    assert all(len(meaning) > 5 for meaning in table.columns.values())
    keys = list(zip(*map(table.column, experiment.keys), strict=True))
    assert len(keys) == len(set(keys)) == len(table) > 1
    for value in some(value for row in table.rows for value in row):
        assert value is None or type(value) in (int, str) or math.isfinite(value)


@every
def test_every_column_holds_something(experiment, tables):
    """Spreads aside, which a single draw has not, and heads of columns that theory leaves out."""
    table = tables[experiment.name]
    for name in (*experiment.keys, *experiment.measured, *experiment.predicted):
        assert any(value is not None for value in table.column(name)), name


@every
def test_the_same_settings_give_the_same_table(experiment, tables):
    settings = experiment.quick
    assert experiment(**settings).run() == tables[experiment.name]
    assert experiment(**settings | {"seed": 1}).run().rows != tables[experiment.name].rows


@every
def test_json_goes_round(experiment, tables):
    table = tables[experiment.name]
    assert Table.from_json(table.to_json()) == table
    assert len(json.loads(table.to_json())["rows"]) == len(table)
    assert configure(table.experiment, table.config) == experiment(**experiment.quick)


@every
def test_settings_are_described_and_checked(experiment):
    assert experiment.summary().endswith(".")
    assert len(experiment.summary()) <= 97
    for name, field in some(experiment.model_fields.items()):
        assert field.description, name
        assert field.is_required() is False, name
    with pytest.raises(RecipeError, match=r"size: at least \d+, got 3 .*fields are .*seed"):
        run(experiment.name, size=3)
    with pytest.raises(RecipeError, match=r"unknown field 'sise'; did you mean size\?"):
        run(experiment.name, sise=3)


@every
def test_a_figure_says_what_its_axes_are(experiment, tables):
    pytest.importorskip("matplotlib")
    figure = draw(Table.from_json(tables[experiment.name].to_json()))
    assert figure.get_suptitle()
    for axes in some(figure.axes):
        if axes.get_label() == "<colorbar>":
            continue
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.has_data()


@every
def test_a_figure_is_the_same_svg_every_time(experiment, tables):
    pytest.importorskip("matplotlib")
    first, second = (to_svg(draw(tables[experiment.name])) for _ in range(2))
    assert first == second
    assert first.startswith("<?xml")
    assert "<dc:date>" not in first


def test_drawing_leaves_the_settings_of_matplotlib_alone(tables):
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    to_svg(draw(tables["rank"]))
    assert dict(matplotlib.rcParams) == before


def test_more_repeats_go_on_where_fewer_stopped(tables):
    """The mean of two draws is half the first, half a second."""
    one = Rank(**Rank.quick | {"repeats": 1}).run().numbers("strongest")
    two = tables["rank"]
    difference = abs(two.numbers("strongest") - one)
    assert difference == pytest.approx(two.numbers("strongest_sd") / math.sqrt(2), abs=1e-12)


def test_progress_tells_every_repeat():
    told = []
    run("laws", **Laws.quick, progress=lambda *arguments: told.append(arguments))
    assert told == [("laws", 1, 2), ("laws", 2, 2)]


def test_an_experiment_that_is_not_there():
    with pytest.raises(InputError, match=r"expected one of laws, transition, .*; got 'nothing'"):
        run("nothing")


def test_ranks_leave_a_bulk():
    with pytest.raises(RecipeError, match=r"ranks: .*expected at most size/2 = 10"):
        run("rank", size=20, ranks=[1, 11])
    with pytest.raises(RecipeError, match=r"settings: repeats: .*, got 0; seed: .*, got -1"):
        run("rank", seed=-1, repeats=0)


@every
def test_the_smallest_matrix_is_enough(experiment):
    (smallest,) = (m.ge for m in experiment.model_fields["size"].metadata if hasattr(m, "ge"))
    for size in (smallest, str(smallest)):
        chosen = configure(experiment.name, {"size": size, "repeats": 1})
        for name in {"rank", "ranks", "tracked", "signals", "top_k"} & chosen.model_fields_set:
            value = getattr(chosen, name)
            assert max(value if isinstance(value, tuple) else (value,)) <= smallest / 2, name
    table = chosen.run()
    assert table.numbers(next(iter(experiment.measured))).size == len(table) > 1
    assert configure(table.experiment, table.config) == chosen


def test_defaults_shrink_with_the_size_and_what_is_given_does_not():
    assert configure("rank", {}).ranks[-1] == 48
    assert configure("rank", {"size": 60}).ranks[-1] == 24
    assert configure("scaling", {"size": 20}).ranks == (1, 2, 3, 4, 6, 8)
    assert configure("similarity", {"size": 20}).tracked == 10
    with pytest.raises(RecipeError, match=r"tracked: .*expected at most size/2 = 10, got 20"):
        configure("similarity", {"size": 20, "tracked": 20})
    with pytest.raises(RecipeError, match=r"top_k: .*expected at most size/2 = 10, got 11"):
        configure("full_vs_lora", {"size": 20, "top_k": 11})
    with pytest.raises(RecipeError, match=r"size: Input should be a valid integer"):
        configure("rank", {"size": 20.5})


@every
def test_all_defaults_leave_a_bulk(experiment):
    settings = experiment().model_dump()
    assert experiment(**settings) == experiment()


def test_a_table_of_something_else(tables):
    with pytest.raises(InputError, match=r"expected a table of 'transition', got one of 'rank'"):
        Transition().draw(tables["rank"])
    with pytest.raises(InputError, match=r"expected the table of an experiment: .*version"):
        Table.from_json('{"experiment": "rank"}')
    ragged = {"experiment": "rank", "version": "", "config": {}, "columns": {"a": ""}, "rows": [[]]}
    with pytest.raises(InputError, match=r"expected 1 values in every row"):
        Table.from_json(json.dumps(ragged))


def test_rows_and_columns_by_name(tables):
    table = tables["rank"]
    assert set(table.where(spikes="equal", rank=4).column("rank")) == {4}
    assert len(table.where(spikes="neither")) == 0
    with pytest.raises(InputError, match=r"expected one of the columns spikes, .*, got 'colour'"):
        table.column("colour")
