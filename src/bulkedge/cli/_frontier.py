"""``bulkedge frontier``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bulkedge._errors import RecipeError, printable

from ._output import check_file, show_as, show_phases, write

PAGE = "frontier.html"


@click.command(short_help="Draw task against retention, by scaling and by protect.")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("tuned", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR",
              help="Folder of the copies, record and page; one of before goes on.")  # fmt: skip
@click.option("--moments", type=click.Path(path_type=Path), metavar="FILE", required=True,
              help="Of text to be kept, by `bulkedge moments BASE`.")  # fmt: skip
@click.option("--task-moments", type=click.Path(path_type=Path), metavar="FILE",
              help="Of the task, by `bulkedge moments BASE --tuned TUNED`.")  # fmt: skip
@click.option("--evaluate", required=True, metavar="COMMAND",
              help="What prints the numbers of {model}, as JSON on its last line.")  # fmt: skip
@click.option("--task", metavar="NAME", help="Number of the task.  [default: the first]")
@click.option("--keep", metavar="NAME", help="Number to be kept.  [default: the next]")
@click.option("--lower", multiple=True, metavar="NAME",
              help="Number of which less is better; repeatable.")  # fmt: skip
@click.option("--scales", metavar="S,S,…", help="Factors.  [default: 0.85,0.7,0.5,0.35,0.2]")
@click.option("--strengths", metavar="λ,λ,…", help="Of protect.  [default: 0.1,0.3,1,3,10]")
@click.option("--balance", type=click.Choice(["output", "drift", "layer"]), default="output",
              show_default=True, help="Unit that is the same in every layer.")  # fmt: skip
@click.option("--with-base", is_flag=True, help="Evaluate BASE, too: a model, no adapter.")
@click.option("--partial", is_flag=True, help="TUNED stores some weights only.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=1, show_default=True,
              help="Worker processes of the audit.")  # fmt: skip
@click.option("--csv", type=click.Path(path_type=Path), metavar="FILE",
              help="Write a row a point, for spreadsheets.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the file of --csv.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print the headline alone, no progress.")
def frontier(base: Path, tuned: Path, **options: Any) -> None:
    """Draw task against retention: TUNED scaled, and protected, at several strengths each.

    Every copy is written into DIR as `bulkedge repair` writes it, and evaluated by a command, run
    without a shell, whose last line is a JSON object such as {"task": 0.76, "kept": 0.11}.  A run
    that was stopped goes on when the command is repeated.
    """
    from bulkedge.auditing import keep_out
    from bulkedge.report import frontier_csv, frontier_page, print_frontier
    from bulkedge.tradeoff import frontier as run

    if options["csv"] is not None:
        check_file(options["csv"], options["force"])
        inputs = (base, tuned, options["moments"], options["task_moments"])
        keep_out(options["csv"], [path for path in inputs if path is not None])
    names = ("moments", "task_moments", "evaluate", "task", "keep", "lower", "balance",
             "with_base", "partial", "device", "jobs")  # fmt: skip
    given = {name: options[name] for name in names}
    for name in ("scales", "strengths"):
        if options[name] is not None:
            given[name] = _numbers(name, options[name])
    output, quiet = options["output"], options["quiet"]
    with show_phases(quiet) as progress:
        notice = None if quiet else _notice
        record = run(base, tuned, output, **given, progress=progress, notice=notice)
    show_as(record, print_frontier, options)
    write(output / PAGE, frontier_page(record))
    if options["csv"] is not None:
        write(options["csv"], frontier_csv(record))
    if not quiet:
        _notice(f"written to {output / PAGE}, with the copies beside it")


def _numbers(name: str, text: str) -> list[float]:
    """Numbers between commas."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise RecipeError(f"expected numbers with commas for --{name}, got {text!r:.60}") from None


def _notice(line: str) -> None:
    """A word on stderr."""
    click.echo(printable(line), err=True)
