"""``bulkedge repair``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bulkedge._errors import OutputError, RecipeError, count, printable

from ._gate import COUNTED_NAMES, end, gate_of
from ._hub import download_option, fetch_if_asked
from ._output import (
    check_file,
    default_to_one_thread,
    keep_out_of_copy,
    recipe_of,
    recipe_options,
    refuse_stdout,
    show_as,
    write,
    write_reports,
    written_files,
)
from ._progress import show_phases

if TYPE_CHECKING:
    from collections.abc import Callable

    from bulkedge.moments import Moments
    from bulkedge.repairing import Method, Protect, RepairRecord, Rescale

NAMES = ("clip", "project", "scale", "shrink", "protect", "rescale")
SETTINGS = (
    "keep",
    "level",
    "rounds",
    "strength",
    "target_drift",
    "balance",
    "ridge",
    "sides",
    "moments",
    "task_moments",
    "recollect",
    "of",
    "uniform",
)
MANY_ROUNDS = 10
"""As many rounds as clip has by default."""
FILES = ("moments", "task_moments", "recollect")


@click.command(short_help="Take new directions out, or give back what was forgotten.")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("tuned", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder for the repaired copy."
)
@click.option("--method", type=click.Choice(NAMES), default=NAMES[0], show_default=True,
              help=f"{', '.join(sorted({*NAMES} - {'protect', 'rescale'}))}: hold or remove "
              "directions; rescale: weaken the whole update; protect: give back what was "
              "forgotten.")  # fmt: skip
@click.option(
    "--keep", type=float, help="scale: what remains of a direction, from 0 to 1.  [default: 0]"
)
@click.option(
    "--level",
    type=float,
    help="clip, rescale: the fraction of the threshold to stay below.  [default: 1]",
)
@click.option("--of", type=click.Choice(["leading", "edge"]),
              help="rescale: which threshold, θ_k or θ_c.  [default: leading]")  # fmt: skip
@click.option("--uniform", type=float, metavar="S", help="rescale: multiply every update by S.")
@click.option(
    "--moments",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="protect: moments of the texts to keep, by `bulkedge moments BASE`.",
)
@click.option(
    "--task-moments",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="protect: moments of the task, by `bulkedge moments BASE --tuned TUNED`.",
)
@click.option(
    "--strength",
    type=float,
    help="protect: λ; a larger one keeps more of the base and less of the task.  [default: 1]",
)
@click.option("--task-texts", "recollect", type=click.Path(path_type=Path), metavar="FILE",
              help="protect: texts of the task, in place of --task-moments; read again after each "
              "of --rounds.")  # fmt: skip
@click.option("--target-drift", type=float, metavar="X",
              help="protect: find the strength that leaves this mean drift; in place of "
                   "--strength.")  # fmt: skip
@click.option(
    "--balance",
    type=click.Choice(["output", "drift", "layer"]),
    help="protect: the unit of cost that all layers share.  [default: output]",
)
@click.option("--sides", type=click.Choice(["one", "two"]),
              help="protect: two weighs outputs, too, by curvatures in both moments.  "
                   "[default: one]")  # fmt: skip
@click.option("--ridge", type=float, metavar="X",
              help="protect: part of its mean that is added to the diagonal of each moment.  "
              "[default: 0.03]")  # fmt: skip
@click.option("--rounds", type=int, help="The most times that a matrix is treated.")
@click.option("--select", type=click.Choice(COUNTED_NAMES), default=COUNTED_NAMES[0],
              show_default=True, help="The mildest verdict to treat.")  # fmt: skip
@click.option(
    "--significance",
    type=float,
    metavar="P",
    help="Treat only directions that noise would make with probability below P.",
)
@click.option(
    "--only", multiple=True, metavar="GLOB", help="Treat only these matrices; repeatable."
)
@click.option("--max-rank", type=int, help="The largest rank of a repaired update.")
@recipe_options
@download_option
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=1, show_default=True,
              help="Worker processes for the audits.")  # fmt: skip
@click.option("--record", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the record to this file, too.")  # fmt: skip
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Write a page of both audits (.html), or the copy's as .md, .xml, .csv; repeatable.",
)
@click.option("--force", is_flag=True, help="Replace the files of --record and --report.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print the verdict and its doubts alone.")
@click.option("--fail-on", type=click.Choice([*COUNTED_NAMES, "never"]),
              help="The mildest remaining verdict that makes the exit code 1.  "
              f"[default: {COUNTED_NAMES[0]}; for protect: never]")  # fmt: skip
@click.option(
    "--dry-run",
    is_flag=True,
    help="Audit, print what would be done, and write nothing.  The exit code is the audit's (for "
    "protect 0 without --fail-on), or 2 if a matrix would be refused.",
)
def repair(base: Path, tuned: Path, **options: Any) -> None:
    """Take new directions out of a fine-tune, or give back what it forgot (--method protect).

    BASE and TUNED are as for audit.  The output is a copy of TUNED with the repaired matrices in
    it; everything else is copied byte for byte.
    """
    from bulkedge._repair import repair as run
    from bulkedge.auditing import keep_out, keep_out_of_inputs
    from bulkedge.comparison import make_plan
    from bulkedge.report import print_repair
    from bulkedge.report.commands import page_command

    _check_options(options)
    fetch_if_asked((base, tuned), options)
    asked = {name: value for name, value in options.items() if name != "method"}
    protects = options["method"] == "protect"
    if protects and options["fail_on"] is None:
        del asked["fail_on"]  # what a project fails on is what protecting does not take out
    recipe = recipe_of(asked)
    gate = gate_of(asked, "never" if protects else COUNTED_NAMES[0])
    files = written_files(options)
    if options["output"] is not None:
        keep_out_of_copy(files, options["output"])
    if files:
        plan = make_plan(base, tuned, recipe)
        for file in files:
            check_file(file, options["force"])
            keep_out_of_inputs(file, plan)
            keep_out(file, filter(None, map(options.get, FILES)))
    with show_phases(options["quiet"]) as progress:
        record = run(
            base,
            tuned,
            options["output"],
            method=_method(base, tuned, recipe.device, options),
            select=options["select"],
            significance=options["significance"],
            only=options["only"],
            max_rank=options["max_rank"],
            recipe=recipe,
            jobs=options["jobs"],
            progress=progress,
        )
    if options["record"] is not None:
        write(options["record"], record.to_json())
    write_reports(record, options, gate)
    show_as(record, print_repair, options)
    if record.output is not None and not options["quiet"]:
        copy = printable(record.output)
        for line in _if_some_are_left(record, options):
            click.echo(line, err=True)
        if any(row.status == "repaired" for row in record.matrices):
            click.echo(f"repaired copy written to {copy}", err=True)
            click.echo("next: look at both audits on one page, and evaluate the copy", err=True)
            click.echo(f"  {page_command(record.output, os.path.lexists)}", err=True)
        else:
            click.echo(f"nothing was repaired: the copy in {copy} is unchanged", err=True)
    if record.output is None and options["output"] is not None:
        click.echo(printable(f"nothing was repaired: {options['output']} is not written"), err=True)
    refused = {row.name: row.note or "" for row in record.matrices if row.status == "refused"}
    if refused and not options["quiet"]:
        for line in _merge_first(record):
            click.echo(line, err=True)
    end({"": record.after or record.before}, gate, refused)


def _merge_first(record: RepairRecord) -> list[str]:
    """What to do where a fine-tune was refused that can be changed once it is merged."""
    from bulkedge.report.commands import free
    from bulkedge.report.merging import MERGED, merge, to_be_merged

    if (method := to_be_merged(record.before)) is None:
        return []
    folder = free(MERGED, os.path.lexists)
    return merge(record.before, folder).lines(
        f"{printable(method)}: merge it into the model first, then repair {folder}"
    )


def _if_some_are_left(record: RepairRecord, options: dict[str, Any]) -> list[str]:
    """What to try where new directions are left that were to be taken out."""
    from bulkedge.report.commands import retry_command

    left = sum(row.intruders_after or 0 for row in record.matrices if row.status == "repaired")
    if not left or options["method"] in ("protect", "rescale"):
        return []
    added = [word for glob in options["only"] for word in ("--only", glob)]
    if options["select"] != COUNTED_NAMES[0]:
        added += ["--select", options["select"]]
    # a round of clip lowers the limit by a tenth; three times as many have left none
    more = 3 * ((options["rounds"] if options["method"] == "clip" else None) or MANY_ROUNDS)
    level = [] if options["level"] is None else ["--level", f"{options['level']:g}"]
    return [
        f"next: {count(left, 'new direction')} left: clip with more rounds, which lower its limit "
        "further and take more of the update",
        "  " + retry_command(record, [*level, "--rounds", str(more), *added], os.path.lexists),
    ]


def _check_options(options: dict[str, Any]) -> None:
    """What does not go together."""
    refuse_stdout(options["output"], "the folder of a repaired copy")
    if options["output"] is None and not options["dry_run"]:
        raise click.UsageError("name the folder to be written (--output DIR), or try --dry-run")
    if options["output"] is not None and options["dry_run"]:
        raise click.UsageError("--dry-run writes nothing: leave --output out")
    if options["force"] and options["output"] is not None and os.path.lexists(options["output"]):
        raise OutputError(
            f"{options['output']}: exists; a repair is never written over anything, name another "
            "folder (--force is for the files of --record and --report only)"
        )


def _method(
    base: Path, tuned: Path, device: str, options: dict[str, Any]
) -> Method | Protect | Rescale:
    """The method and its settings; those of another are an error."""
    from dataclasses import fields

    from bulkedge.moments import Moments
    from bulkedge.repairing import METHODS, Protect, Rescale

    method = (METHODS | {"protect": Protect, "rescale": Rescale})[options["method"]]
    settings = [field.name for field in fields(method)]
    given = {field: options[field] for field in SETTINGS}
    given = {field: value for field, value in given.items() if value is not None}
    if strange := sorted(set(given) - set(settings)):
        raise RecipeError(
            f"{_option(strange[0])} is no setting of {options['method']}, whose settings are "
            f"{', '.join(map(_option, settings))}; see --method"
        )
    if method is Protect and "moments" not in given:
        raise RecipeError(
            "--method protect needs --moments FILE; make one with `bulkedge moments BASE TEXTS`"
        )
    if method is Rescale and not {"level", "uniform"} & set(given):
        given["level"] = 1.0
    if method is Protect and given.get("rounds", 1) > 1 and "recollect" not in given:
        raise RecipeError(
            "--rounds of protect need --task-texts FILE, which is read on what each round makes"
        )
    for field in ("moments", "task_moments"):
        if field in given:
            given[field] = Moments.load(given[field])
    if "recollect" in given:
        curvatures = given.get("sides") == "two"
        given["recollect"] = _reader(base, given["recollect"], device, curvatures=curvatures)
        given.setdefault("task_moments", given["recollect"](tuned))
    return method(**given)


def _reader(base: Path, file: Path, device: str, *, curvatures: bool) -> Callable[[Path], Moments]:
    """What measures the task's inputs on a fine-tune."""
    from bulkedge._moments import collect_moments
    from bulkedge.moments import read_texts

    texts = read_texts(file)
    default_to_one_thread()
    settings: dict[str, Any] = {"device": device, "curvatures": curvatures}
    return lambda tuned: collect_moments(base, texts, tuned=tuned, **settings)


def _option(field: str) -> str:
    return "--task-texts" if field == "recollect" else "--" + field.replace("_", "-")
