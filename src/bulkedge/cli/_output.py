"""What the commands share: exit codes, streams, files, progress."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bulkedge._errors import InputError, OutputError
from bulkedge._fields import DEFAULT_EPSILON
from bulkedge._verdict import COUNTED

if TYPE_CHECKING:
    from bulkedge.records import Recipe, Record
    from bulkedge.repairing import RepairRecord

CLEAN, FINDINGS, FAILURE, INTERRUPTED = 0, 1, 2, 130

COUNTED_NAMES = [verdict.value for verdict in COUNTED]
"""The verdicts that an option may name, the mildest first."""

Command = TypeVar("Command", bound=Callable[..., None])


def recipe_options(command: Command) -> Command:
    """The options of a command that audits: what a recipe has."""
    options = (
        click.option(
            "-k", "--top-k", type=int, help="Leading tuned directions to judge.  [default: 10]"
        ),
        click.option(
            "--epsilon",
            type=float,
            help=f"Score below which one counts.  [default: {DEFAULT_EPSILON}]",
        ),
        click.option(
            "--side",
            type=click.Choice(["left", "right", "both"]),
            help="Singular vectors to compare.  [default: left]",
        ),
        click.option(
            "--include", multiple=True, metavar="GLOB", help="Only tensors that match; repeatable."
        ),
        click.option(
            "--exclude", multiple=True, metavar="GLOB", help="No tensors that match; repeatable."
        ),
        click.option(
            "--partial",
            is_flag=True,
            default=None,
            help="TUNED stores some weights only, to be loaded over BASE.  [default: False]",
        ),
        click.option("--device", help="cpu, cuda or cuda:N.  [default: cpu]"),
        click.option("--seed", type=int, help="Seed of the solver's start block.  [default: 0]"),
        click.option(
            "--recipe",
            type=click.Path(path_type=Path),
            help="Recipe in YAML; options override it.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def recipe_of(options: dict[str, Any]) -> Recipe:
    """The recipe file's settings, overridden by what was given on the command line."""
    from bulkedge.records import Recipe, make_recipe, read_recipe

    path: Path | None = options["recipe"]
    settings = read_recipe(path) if path is not None else {}
    fields = Recipe.model_fields  # what is no option is for the file
    given = {n: v for n, v in options.items() if n in fields and v not in (None, ())}
    spelled = {name: f"--{name.replace('_', '-')}" for name in given}
    return make_recipe(settings | given, str(path or "options"), spelled)


def _not_negative(
    context: click.Context, option: click.Parameter, value: float | None
) -> float | None:
    """A limit; NaN, which nothing exceeds, is none."""
    if value is not None and not value >= 0:
        raise click.BadParameter(f"expected a number of at least 0, got {value}")
    return value


def _names_of_columns(
    context: click.Context, option: click.Parameter, value: str | None
) -> tuple[str, ...]:
    """Names of columns, each of which there is."""
    if value is None:
        return ()
    from bulkedge.report.columns import CHOICES

    names = tuple(name.strip() for name in value.split(","))
    for name in names:
        if name not in CHOICES:
            raise click.BadParameter(f"expected names of {', '.join(CHOICES)}, got {name!r:.40}")
    return names


columns_option = click.option(
    "--columns",
    callback=_names_of_columns,
    metavar="NAME,…",
    help="Columns of the table besides the usual ones, such as over_threshold.",
)
"""The option of a command that shows a table of matrices."""


def verdict_options(command: Command) -> Command:
    """The options of a command that shows a record and judges it."""
    options = (
        click.option("--force", is_flag=True, help="Write into an output folder that exists."),
        click.option("--json", "as_json", is_flag=True, help="Print the record as JSON."),
        click.option(
            "--csv",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Write a row a direction, for spreadsheets.",
        ),
        click.option(
            "--report",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Write a page to look at, .html; or .md, .xml (JUnit), .parquet.",
        ),
        columns_option,
        click.option("-q", "--quiet", is_flag=True, help="Print the verdict alone, no progress."),
        click.option(
            "--fail-on",
            type=click.Choice([*COUNTED_NAMES, "never"]),
            default=COUNTED_NAMES[0],
            show_default=True,
            help="Mildest verdict that makes the exit code 1; "
            f"{COUNTED_NAMES[0]} is the paper's count.",
        ),
        click.option(
            "--max-drift",
            type=float,
            callback=_not_negative,
            metavar="X",
            help="Mean drift above which the exit code is 1; needs moments.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def check_folder(output: Path, force: bool, *, resume: bool = False) -> None:
    """Whether a record may be written into a folder."""
    from bulkedge.auditing import JOURNAL_NAME, refuse_held
    from bulkedge.records import Record

    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file; give a folder")
    if (output / Record.file_name).is_dir():
        raise OutputError(f"{output}: {Record.file_name} in it is a folder; give another")
    used = output.exists() and any(output.iterdir())
    if resume and used and not (output / JOURNAL_NAME).exists():
        raise OutputError(f"{output}: exists without a {JOURNAL_NAME} to resume; give another")
    if used and not (force or resume):
        raise OutputError(
            f"{output}: exists; give another folder, or --force to write into it, or --resume to "
            "go on with its journal"
        )
    refuse_held(output)
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{output}: {parent} is not writable")


def check_file(path: Path, force: bool) -> None:
    """Whether a file may be written."""
    from bulkedge.auditing import refuse_held

    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give a file")
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path}: exists; give another file, or --force to replace it")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise OutputError(f"{path}: {parent} is not a writable folder")
    refuse_held(parent)


def written_files(options: dict[str, Any]) -> list[Path]:
    """The files beside the output that were asked for, the ending of a report checked."""
    if options["report"] is not None:
        format_by_ending(options["report"])
    files = [options[n] for n in ("csv", "peft", "record", "report") if options.get(n) is not None]
    # a repair's folder is a copy of the fine-tune, and holds no record of its own
    refuse_twice(files, None if "record" in options else options["output"])
    return files


def refuse_twice(files: Sequence[Path], folder: Path | None = None) -> None:
    """OutputError where one file is to be written twice, or over the record in the output."""
    from bulkedge.auditing import JOURNAL_NAME
    from bulkedge.budgeting import BudgetRecord
    from bulkedge.records import Record

    own = (Record.file_name, BudgetRecord.file_name, JOURNAL_NAME)
    places = [os.path.realpath(folder / name) for name in own] if folder else []
    for file in files:
        if (place := os.path.realpath(file)) in places:
            raise OutputError(f"{file}: would be written twice; give each output a file of its own")
        places.append(place)


def format_by_ending(path: Path, remedy: str = "") -> str:
    """The format that a report's ending means; a wrong one is a wrong option."""
    from bulkedge.report import format_of

    try:
        return format_of(path)
    except InputError as error:
        raise click.UsageError(f"{error}{remedy}") from None


def write_all(record: Record, options: dict[str, Any]) -> None:
    """The record, and its table as CSV, where they were asked for."""
    output: Path | None = options["output"]
    if output is not None:
        write(output / record.file_name, record.to_json())
        if not options["quiet"]:
            click.echo(f"record written to {output / record.file_name}", err=True)
    if options["csv"] is not None:
        from bulkedge.report import to_csv

        write(options["csv"], to_csv(record))
    write_report(record, options)


def write_report(record: Record | RepairRecord, options: dict[str, Any]) -> None:
    """The report of a record, where one was asked for."""
    from bulkedge.report import format_of, render

    if options["report"] is not None:
        kind, columns = format_of(options["report"]), options.get("columns", ())
        write(options["report"], render(record, kind, columns=columns))
        if not options["quiet"]:
            click.echo(f"report written to {options['report']}", err=True)


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; a link in its place is replaced, not followed."""
    from bulkedge.checkpoint.write import umask

    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(descriptor)
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None


@contextmanager
def show_progress(quiet: bool, total: int, doing: str = "auditing") -> Iterator[Any]:
    """A bar with the time left on stderr; nothing where stderr is no terminal."""
    with show_phases(quiet) as bar:
        yield bar and (lambda name, done, total_=total: bar(doing, name, done, total_))


@contextmanager
def show_phases(quiet: bool) -> Iterator[Any]:
    """The same for several things that are done one after the other."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(doing: str, name: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = bar.add_task(doing, total=total)
            bar.update(tasks[doing], completed=done, total=total)

        yield advance


def show(record: Record, options: dict[str, Any]) -> None:
    """The record on stdout, as JSON or as a table."""
    from functools import partial

    from bulkedge.report import print_record

    show_as(record, partial(print_record, columns=options["columns"]), options)


def show_as(record: Any, print_: Callable[..., None], options: dict[str, Any]) -> None:
    """A record on stdout, as JSON or as ``print_`` shows it in a console."""
    if options["as_json"]:
        text = record.to_json()
        if sys.stdout.isatty():  # names may hold characters that act on a terminal
            text = json.dumps(json.loads(text), indent=2) + "\n"
        click.echo(text, nl=False)
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:  # a pipe has no edge to fold at
            console = Console(width=160)
        print_(record, console, brief=options["quiet"])
    sys.stdout.flush()  # a full disk must be noticed here, not at exit


def exit_code(record: Record, fail_on: str, max_drift: float | None = None) -> int:
    """A linter's exit code; what could not be judged, or measured, outranks what was."""
    from bulkedge._verdict import Verdict
    from bulkedge.report import findings

    if not record.summary.complete:
        return FAILURE
    if max_drift is not None and not record.summary.drift_known:
        return FAILURE
    if fail_on != "never" and findings(record, Verdict(fail_on)):
        return FINDINGS
    drift = record.summary.drift
    above = max_drift is not None and drift is not None and (drift.mean or 0.0) > max_drift
    return FINDINGS if above else CLEAN


def default_to_one_thread() -> None:
    """Use one thread unless the user has set how many, as two on a busy machine are slower."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
