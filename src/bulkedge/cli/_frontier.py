"""``bulkedge frontier``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bulkedge._errors import RecipeError, printable

from ._output import check_file, keep_out_of_copy, refuse_stdout, show_as, write
from ._progress import show_phases

PAGE = "frontier.html"


@click.command(short_help="Scale and protect at several strengths, and evaluate each.")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("tuned", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder for the copies, the record and the page; a stopped run resumes there.",
)
@click.option("--moments", type=click.Path(path_type=Path), metavar="FILE", required=True,
              help="Moments of the texts to keep, by `bulkedge moments BASE`.")  # fmt: skip
@click.option(
    "--task-moments",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Moments of the task, by `bulkedge moments BASE --tuned TUNED`.",
)
@click.option(
    "--evaluate",
    required=True,
    metavar="COMMAND",
    help="Command that evaluates {model} and prints its numbers as JSON on the last line.",
)
@click.option("--task", metavar="NAME", help="Which number is the task.  [default: the first]")
@click.option("--keep", metavar="NAME", help="Which number should be kept.  [default: the next]")
@click.option("--lower", multiple=True, metavar="NAME",
              help="A number that is better when lower; repeatable.")  # fmt: skip
@click.option(
    "--scales", metavar="S,S,…", help="Factors to scale by.  [default: 0.85,0.7,0.5,0.35,0.2]"
)
@click.option(
    "--strengths", metavar="λ,λ,…", help="Strengths of protect.  [default: 0.1,0.3,1,3,10]"
)
@click.option("--balance", type=click.Choice(["output", "drift", "layer"]), default="output",
              show_default=True, help="The unit of cost that all layers share.")  # fmt: skip
@click.option("--with-base", is_flag=True, help="Evaluate BASE, too.")
@click.option("--partial", is_flag=True, help="TUNED stores only some weights.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=1, show_default=True,
              help="Worker processes for the audit.")  # fmt: skip
@click.option("--csv", type=click.Path(path_type=Path), metavar="FILE",
              help="Write one row per point, for spreadsheets.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the file of --csv.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the headline, no progress.")
def frontier(base: Path, tuned: Path, **options: Any) -> None:
    """Draw task against retention for TUNED, scaled and protected at several strengths.

    Every copy is written into DIR as `bulkedge repair` writes it.  Your command evaluates it; the
    last line that it prints must be a JSON object such as {"task": 0.76, "kept": 0.11}.  Repeat the
    command to resume a run that was stopped.
    """
    from bulkedge.auditing import keep_out
    from bulkedge.report import frontier_csv, frontier_page, print_frontier
    from bulkedge.tradeoff import frontier as run

    refuse_stdout(options["output"], "a folder")
    if options["csv"] is not None:
        keep_out_of_copy([options["csv"]], options["output"])
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
    write(output / PAGE, frontier_page(record))
    if options["csv"] is not None:
        write(options["csv"], frontier_csv(record))
    show_as(record, print_frontier, options)
    if not quiet:
        _notice(f"written to {output / PAGE}, with the copies beside it")


def _numbers(name: str, text: str) -> list[float]:
    """Numbers between commas."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise RecipeError(f"expected numbers with commas for --{name}, got {text!r:.60}") from None


def _notice(line: str) -> None:
    """Print a line on stderr."""
    click.echo(printable(line), err=True)
