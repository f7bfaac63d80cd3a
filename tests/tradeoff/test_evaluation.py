"""What a command, or a function, may say; and what follows from the numbers."""

import json
import sys
from itertools import product

import numpy as np
import pytest

from bulkedge import CheckpointError, FrontierRecord, InputError
from bulkedge.records.frontier import Axes, Measured, dominated, gains
from bulkedge.report import frontier_csv
from bulkedge.tradeoff.evaluation import Command, Function, evaluator
from frontiers import made
from helpers import some

PYTHON = f"{sys.executable} -S -c"


def printed(code, tmp_path):
    program = (sys.executable, "-S", "-c", code, "{model}")
    return Command(program, "").run(tmp_path, tmp_path / "logs/a")


def test_the_last_line_counts(tmp_path):
    code = """print(1); print('{"b": 2, "a": 1e-3}'); print('  ')"""
    assert list(printed(code, tmp_path).items()) == [("b", 2.0), ("a", 0.001)]


def test_the_path_is_one_argument_and_no_shell_sees_it(tmp_path):
    place = tmp_path / "-x $(touch y); {a} '\" \n *"
    place.mkdir()
    code = "import sys, json; print(json.dumps({'n': len(sys.argv), 'o': len(sys.argv[1])}))"
    command = Command.parse(f'{PYTHON} "{code}" p={{model}}={{model}}')
    assert command.run(place, tmp_path / "logs/a") == {"n": 2, "o": 3 + 2 * len(str(place))}
    assert not list(tmp_path.rglob("y"))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("pass", r"expected a last line of stdout such as .*, got ''; nothing on stderr"),
        ("print('done')", "expected a last line of stdout such as .*, got 'done'"),
        ("print('[1, 2]')", "expected at least two numbers with names"),
        ("""print('{"a": 1}')""", "expected at least two numbers with names"),
        ("""print('{"a": 1, "b": NaN}')""", "expected finite numbers, got 'b': nan; print no"),
        ("""print('{"a": 1, "b": 1e999}')""", "expected finite numbers, got 'b': inf; print no"),
        ("""print('{"a": 1, "b": true}')""", "expected finite numbers, got 'b': True; print no"),
        ("""print('{"a": 1, "b": "2"}')""", "expected finite numbers, got 'b': '2'; print no"),
        ("""print('{"a": 1, "a": 2}')""", "expected each number once, got two of one name"),
        (r"""print(r'{"a": 1, "\ud800": 2}')""", "expected names of printable characters, got"),
        ("print('[' * 10**5)", "expected a last line of stdout such as"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9; nothing on stderr"),
        ("raise SystemExit(3)", "failed with exit code 3; nothing on stderr"),
    ],
)  # fmt: skip
def test_what_is_no_evaluation(code, words, tmp_path):
    with pytest.raises(InputError, match=words):
        printed(code, tmp_path)


def test_a_program_that_there_is_not(tmp_path):
    with pytest.raises(InputError, match=r"cannot be started .*; name an existing program"):
        Command.parse("no-such-program {model}").run(tmp_path, tmp_path / "logs/a")


def test_a_function_is_asked_the_same(tmp_path):
    given = Function(lambda path: {"a": np.float32(0.5), "b": float("nan")})
    with pytest.raises(InputError, match="expected finite numbers, got 'b': nan"):
        given.run(tmp_path, tmp_path)
    with pytest.raises(InputError, match=r"at least two numbers with names, .* got None"):
        Function(print).run(tmp_path, tmp_path)
    assert evaluator(np.linalg.norm).name == "numpy.linalg.norm"


def point(name, arm, strength, task, keep):
    return Measured(
        name=name, arm=arm, strength=strength, command=None, evaluated="",
        values={"t": task, "k": keep}, seconds=0, refused=[], drift=None,
    )  # fmt: skip


def test_gains_are_those_of_an_interpolation():
    """Against numpy's, where retention rises as scales fall; tasks of any shape."""
    rng = np.random.default_rng(0)
    axes = Axes(task="t", keep="k", lower=())
    for _ in range(20):
        keeps, tasks = np.sort(rng.random(5)), rng.random(5)
        scales = [1.0, 0.8, 0.5, 0.3, 0.1]
        line = [
            point(f"s{i}", "trained" if i == 0 else "scaled", scales[i] if i else None, t, k)
            for i, (t, k) in enumerate(zip(tasks, keeps, strict=True))
        ]
        held = [point(f"p{i}", "protected", i + 1, *rng.random(2)) for i in range(8)]
        found = gains([*(line[i] for i in rng.permutation(len(line))), *held], axes)
        assert [gain.point for gain in found] == [p.name for p in held]
        for gain, p in some(zip(found, held, strict=True)):
            task, keep = p.values["t"], p.values["k"]
            if keeps[0] <= keep <= keeps[-1]:
                assert gain.scaled == pytest.approx(np.interp(keep, keeps, tasks), rel=1e-9)
                assert gain.gain == pytest.approx(task - gain.scaled, abs=1e-12)
            else:
                assert gain.reach == ("above" if keep > keeps[-1] else "below")
                assert gain.gain is None


def test_a_line_that_turns_back_counts_at_its_best():
    axes = Axes(task="t", keep="k", lower=())
    line = [
        point("a", "trained", None, 1.0, 0.0),
        point("b", "scaled", 0.5, 0.8, 0.6),
        point("c", "scaled", 0.2, 0.2, 0.4),
    ]
    (gain,) = gains([*line, point("p", "protected", 1, 0.9, 0.5)], axes)
    assert gain.scaled == pytest.approx(1 - 0.2 * 0.5 / 0.6)
    (last,) = gains([*line, point("p", "protected", 1, 0.9, 0.7)], axes)
    assert last.reach == "above"
    base = point("base", "base", None, 0.0, 1.0)  # the end of the line, if it is known
    (last,) = gains([*line, base, point("p", "protected", 1, 0.9, 0.7)], axes)
    assert last.scaled == pytest.approx(0.1)


def test_where_less_is_better_the_gain_is_still_more():
    line = [point("a", "trained", None, 2.0, 9.0), point("b", "scaled", 0.5, 4.0, 5.0)]
    axes = Axes(task="t", keep="k", lower=("t", "k"))
    (gain,) = gains([*line, point("p", "protected", 1, 2.5, 7.0)], axes)
    assert (gain.scaled, gain.gain) == (3.0, 0.5)
    assert dominated([*line, point("p", "protected", 1, 2.0, 8.0)], axes) == {"a": ["p"]}


def test_dominated_points_are_those_that_a_search_finds():
    rng = np.random.default_rng(1)
    axes = Axes(task="t", keep="k", lower=())
    points = [point(f"p{i}", "scaled", 0.5, *rng.integers(0, 6, 2)) for i in range(30)]
    beaten = {}
    for a, b in some(product(points, points)):
        better = [b.values[n] - a.values[n] for n in ("t", "k")]
        if min(better) >= 0 and max(better) > 0:
            beaten.setdefault(a.name, []).append(b.name)
    assert dominated(points, axes) == beaten


def without_an_axis(content):
    del content["points"][0]["values"]["task"]


def with_one_point_twice(content):
    content["points"].append(content["points"][0])


def with_another_gain(content):
    content["gains"][0]["gain"] += 1e-3


def with_nothing_dominated(content):
    content["dominated"] = {}


def of_a_version_to_come(content):
    content["schema_version"] = "9"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_an_axis, "expected 'as-trained' to have both axes"),
        (with_one_point_twice, "expected points of different names"),
        (with_another_gain, "expected the gains that follow from the points"),
        (with_nothing_dominated, "expected as dominated those that other points beat"),
        (of_a_version_to_come, "not a frontier of schema 1"),
    ],
)
def test_a_record_is_checked_when_it_is_read(tmp_path, change, words):
    (tmp_path / "frontier.json").write_text(made().to_json())
    assert FrontierRecord.from_json(tmp_path / "frontier.json") == made()
    content = json.loads(made().to_json())
    change(content)
    (tmp_path / "frontier.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words):
        FrontierRecord.from_json(tmp_path / "frontier.json")


def test_a_data_frame_has_a_row_per_point():
    pytest.importorskip("pandas")
    record = made()
    frame = record.to_pandas().set_index("name")
    assert list(frame.index) == [point.name for point in record.points]
    for point in some(record.points):
        for name, value in some(point.values.items()):
            assert frame[f"values_{name}"][point.name] == value


def test_a_spreadsheet_gets_text_and_numbers():
    record = made(names=("=1+1", "kept"), name="@SUM(A1)")
    rows = frontier_csv(record).splitlines()
    assert '"\'=1+1"' in rows[0]
    assert sum(row.startswith('"protected-') for row in rows) == 2
    assert not any(cell.startswith(('"=', '"@')) for row in rows for cell in row.split(","))
