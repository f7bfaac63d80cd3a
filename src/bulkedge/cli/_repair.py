"""``bulkedge repair``."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bulkedge._errors import OutputError, RecipeError, printable

from ._output import (
    COUNTED_NAMES,
    FAILURE,
    check_file,
    default_to_one_thread,
    exit_code,
    recipe_of,
    recipe_options,
    show_as,
    show_phases,
    write,
    write_report,
    written_files,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from bulkedge.moments import Moments
    from bulkedge.repairing import Method, Protect, Rescale

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
FILES = ("moments", "task_moments", "recollect")


@click.command(short_help="Take the intruder dimensions out of a fine-tune.")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("tuned", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to be written.")
@click.option("--method", type=click.Choice(NAMES), default=NAMES[0], show_default=True,
              help="What to do.")  # fmt: skip
@click.option("--keep", type=float, help="scale: what stays, 0 none to 1 all.  [default: 0]")
@click.option(
    "--level",
    type=float,
    help="clip, rescale: fraction of the threshold, such as 0.9.  [default: 1]",
)
@click.option("--of", type=click.Choice(["leading", "edge"]),
              help="rescale: level of θ_k or of θ_c.  [default: leading]")  # fmt: skip
@click.option("--uniform", type=float, metavar="S", help="rescale: one factor for all layers.")
@click.option("--moments", type=click.Path(path_type=Path), metavar="FILE",
              help="protect: of text to be kept, by `bulkedge moments BASE`.")  # fmt: skip
@click.option("--task-moments", type=click.Path(path_type=Path), metavar="FILE",
              help="protect: of the task, by `bulkedge moments BASE --tuned TUNED`.")  # fmt: skip
@click.option(
    "--strength",
    type=float,
    help="protect: λ; larger keeps more of the base and less of the task.  [default: 1]",
)
@click.option("--task-texts", "recollect", type=click.Path(path_type=Path), metavar="FILE",
              help="protect: of the task, read on TUNED without --task-moments, and on what each "
              "of --rounds makes.")  # fmt: skip
@click.option("--target-drift", type=float, metavar="X",
              help="protect: mean drift to be left, below what `audit --moments` reports; in "
                   "place of --strength.")  # fmt: skip
@click.option("--balance", type=click.Choice(["output", "drift", "layer"]),
              help="protect: unit that is the same in every layer.  [default: output]")  # fmt: skip
@click.option("--sides", type=click.Choice(["one", "two"]),
              help="protect: two: outputs count, too, by curvatures in both moments.  "
                   "[default: one]")  # fmt: skip
@click.option("--ridge", type=float, metavar="X",
              help="protect: part of its mean that is added to the diagonal of each moment.  "
              "[default: 0.03]")  # fmt: skip
@click.option("--rounds", type=int, help="How often a matrix is treated at most.")
@click.option("--select", type=click.Choice(COUNTED_NAMES), default=COUNTED_NAMES[0],
              show_default=True, help="Mildest verdict that is treated.")  # fmt: skip
@click.option("--significance", type=float, metavar="P",
              help="Only values that the base's noise reaches with probability P.")  # fmt: skip
@click.option("--only", multiple=True, metavar="GLOB", help="Only matrices that match; repeatable.")
@click.option("--max-rank", type=int, help="Largest rank of a repaired update.")
@recipe_options
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=1, show_default=True,
              help="Worker processes of the audits.")  # fmt: skip
@click.option("--record", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the record to a file as well.")  # fmt: skip
@click.option("--report", type=click.Path(path_type=Path), metavar="FILE",
              help="Write a page of both audits, .html; of the copy .md, .xml, .csv.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the files of --record and --report.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print the verdict alone, no progress.")
@click.option("--fail-on", type=click.Choice([*COUNTED_NAMES, "never"]),
              help="Mildest verdict left that makes the code 1.  "
              f"[default: {COUNTED_NAMES[0]}; of protect never]")  # fmt: skip
@click.option(
    "--dry-run",
    is_flag=True,
    help="Audit, say what would be done, write nothing; the exit code is that of the audit "
    "(of protect 0 without --fail-on), or 2 if a matrix would be refused.",
)
def repair(base: Path, tuned: Path, **options: Any) -> None:
    """Take the intruder dimensions out of a fine-tune, or give back what it forgot (protect).

    BASE and TUNED as for audit.  A copy of TUNED is written with the repaired matrices in it; what
    is not repaired is carried over byte for byte.
    """
    from bulkedge._repair import repair as run
    from bulkedge.auditing import keep_out, keep_out_of_inputs
    from bulkedge.comparison import make_plan
    from bulkedge.report import print_repair

    _check_options(options)
    recipe = recipe_of({name: value for name, value in options.items() if name != "method"})
    if files := written_files(options):
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
    show_as(record, print_repair, options)
    if record.output is not None and not options["quiet"]:
        copy = printable(record.output)
        click.echo(f"repaired copy written to {copy}", err=True)
        click.echo(f"next: bulkedge report {shlex.quote(copy)} -o compare.html", err=True)
    if options["record"] is not None:
        write(options["record"], record.to_json())
    write_report(record, options)
    if any(row.status == "refused" for row in record.matrices):
        sys.exit(FAILURE)  # what was to be treated is as it was
    default = "never" if options["method"] == "protect" else COUNTED_NAMES[0]
    sys.exit(exit_code(record.after or record.before, options["fail_on"] or default))


def _check_options(options: dict[str, Any]) -> None:
    """What does not go together."""
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
