"""Several fine-tunes of one base in one ``bulkedge audit``."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bulkedge._errors import BulkedgeError, InputError, count, printable

from ._gate import end, gate_of
from ._output import (
    STDOUT,
    check_file,
    check_folder,
    format_by_ending,
    recipe_of,
    write,
    write_reports,
    written_files,
)
from ._progress import say_what_is_kept, show_progress

if TYPE_CHECKING:
    from bulkedge.comparison import Plan
    from bulkedge.records import Recipe, Record

TABLE, PAGE = "comparison.csv", "comparison.html"
"""What is written into the output folder, beside a folder for each fine-tune."""

HANDLED = frozenset({
    "top_k", "epsilon", "side", "include", "exclude", "partial", "device", "seed", "recipe",
    "method", "moments", "critical_scale", "output", "resume", "jobs", "force", "as_json",
    "columns", "quiet", "report", "fail_on", "max_drift", "fail_on_doubt", "download", "cache",
    "dry_run",
})  # fmt: skip
"""The options that several fine-tunes can have; any other is refused where it is given."""
FOR_ONE = {
    "shard": "",
    "csv": f"; {TABLE} is written into DIR",
    "peft": "; audit that adapter alone for its ranks",
    "engine": "; audit each alone on the cluster",
    "ray_address": "; audit each alone on the cluster",
    "insecure_ray": "; audit each alone on the cluster",
}
"""What there is instead of an option that is refused."""
RESERVED = ("", ".", "..", TABLE, PAGE)
"""No fine-tune is called so: its folder would be another, or a file of the command."""


def refuse_for_several(context: click.Context, options: dict[str, Any]) -> None:
    """UsageError for options that several fine-tunes cannot have."""
    for option in context.command.params:
        name = str(option.name)
        if not isinstance(option, click.Option) or name in HANDLED:
            continue
        if options[name] not in (None, (), False, option.get_default(context)):
            raise click.UsageError(
                f"{option.opts[-1]} is for one fine-tune, but several were given: leave it "
                f"out{FOR_ONE.get(name, '')}"
            )
    if options["output"] is None and not options["dry_run"]:
        raise click.UsageError("several TUNED need a folder for their records (--output DIR)")
    for file in options["report"]:
        if (kind := format_by_ending(file)) in ("csv", "parquet"):
            raise click.UsageError(f"--report {file}: {kind} is of one fine-tune; {TABLE} is "
                                   "written into DIR")  # fmt: skip
    if options["output"] == STDOUT:
        raise click.UsageError("--output -: several records need a folder; give --output DIR")


def plan_of(base: Path, tuned: Path, recipe: Recipe, options: dict[str, Any]) -> Plan:
    """What is to be compared, with moments where they were given."""
    from bulkedge.comparison import make_plan, with_moments

    plan = make_plan(base, tuned, recipe)
    return plan if options["moments"] is None else with_moments(plan, options["moments"])


def _plans(
    base: Path, tuned: dict[str, Path], recipe: Recipe, options: dict[str, Any]
) -> dict[str, Plan]:
    """What is to be compared, by fine-tune; an error names all that cannot be."""
    plans, problems = dict[str, "Plan"](), dict[str, BulkedgeError]()
    for name, path in tuned.items():
        try:
            plans[name] = plan_of(base, path, recipe, options)
        except BulkedgeError as error:
            problems[name] = error
    if not problems:
        return plans
    if len(set(map(str, problems.values()))) == 1:  # one alone is bad, or the base is
        raise next(iter(problems.values()))
    told = [
        str(error) if str(tuned[name]) in str(error) else f"{name}: {error}"
        for name, error in problems.items()
    ]
    raise InputError(
        f"{len(problems)} of {len(tuned)} fine-tunes cannot be audited: {'; '.join(told)}"
    )


def audit_several(base: Path, tuned: Sequence[Path], options: dict[str, Any]) -> None:
    """Audit several fine-tunes of one base, show them side by side, and exit."""
    from bulkedge.auditing import JOURNAL_NAME, hold, keep_out_of_inputs, run_plans
    from bulkedge.records import Record

    recipe, gate = recipe_of(options), gate_of(options)
    plans = _plans(base, names_of(tuned), recipe, options)
    if options["dry_run"]:
        facts = {name: len(plan.comparisons) for name, plan in plans.items()}
        text = "\n".join(
            f"{printable(name):40} {count(n, 'matrix', 'matrices')}" for name, n in facts.items()
        )
        click.echo(json.dumps(facts, indent=2) if options["as_json"] else text)
        return
    output: Path = options["output"]
    folders = [output / name for name in plans]
    for plan in plans.values():
        keep_out_of_inputs(output, plan)
    check_folder(output, options["force"] or options["resume"], kind=Record, folders=folders)
    for folder in folders:
        check_folder(folder, options["force"] or options["resume"], kind=Record)
    own = [output / name for name in (TABLE, PAGE)]
    own += [folder / name for folder in folders for name in (Record.file_name, JOURNAL_NAME)]
    for file in written_files(options, own):
        check_file(file, options["force"])
        for plan in plans.values():
            keep_out_of_inputs(file, plan)
    total = sum(len(plan.comparisons) for plan in plans.values())
    with ExitStack() as held, show_progress(options["quiet"], total) as progress:
        for folder in folders:
            held.enter_context(hold(folder))
        held.enter_context(say_what_is_kept(*folders))
        found = run_plans(
            list(plans.values()),
            recipe,
            jobs=options["jobs"],
            cache=options["cache"],
            journals=[folder / JOURNAL_NAME for folder in folders],
            resume=options["resume"],
            progress=progress,
            notice=lambda line: click.echo(printable(line), err=True),
        )
        records = dict(zip(plans, found, strict=True))
        _write(records, options)
        write_reports(found, options, gate, list(records))
        _show(records, options)
    end(records, gate)


def names_of(paths: Sequence[Path]) -> dict[str, Path]:
    """A name for each fine-tune: the last parts of its path that tell it from the others.

    Args:
        paths: What the user gave.

    Returns:
        The paths by name.

    Raises:
        click.UsageError: If one is given twice.

    Example:
        >>> list(names_of([Path("a/checkpoint-5"), Path("b/checkpoint-5"), Path("c")]))
        ['a_checkpoint-5', 'b_checkpoint-5', 'c']
    """
    resolved = [Path(os.path.realpath(path)) for path in paths]
    if twice := [path for path, n in Counter(resolved).items() if n > 1]:
        raise click.UsageError(f"{twice[0]} is given twice; leave one out")
    places = [_named(path) for path in paths]
    parts = [[p.removesuffix(".safetensors") for p in place.parts[1:]] for place in places]
    found = ["" for _ in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        tails = ["_".join(names[-depth:]).replace("@", "_") for names in parts]
        counts = Counter(tails)
        found = [had or (t if counts[t] == 1 else "") for had, t in zip(found, tails, strict=True)]
        if all(found) and len(set(found)) == len(found):
            break
    return dict(zip(_unique(found), paths, strict=True))


def _named(path: Path) -> Path:
    """Where a path lies, without links and ``..`` above it, under the name that was given."""
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent)) / path.name


def _unique(names: Sequence[str]) -> list[str]:
    """Names of which none is another's, whatever case a disk ignores, or reserved."""
    taken = {name.casefold() for name in RESERVED}
    found: list[str] = []
    for name in names:
        tries = (name, *(f"{name or 'fine-tune'}_{i}" for i in range(2, len(names) + 3)))
        found.append(next(name for name in tries if name.casefold() not in taken))
        taken.add(found[-1].casefold())
    return found


def _show(records: dict[str, Record], options: dict[str, Any]) -> None:
    """The table on stdout; as JSON the summaries by name."""
    from rich.console import Console

    from bulkedge.report import print_several

    if options["as_json"]:
        facts = {name: record.summary.model_dump(mode="json") for name, record in records.items()}
        click.echo(json.dumps(facts, indent=2))
        return
    console = Console()
    if not console.is_terminal:  # a pipe has no edge to fold at
        console = Console(width=160)
    print_several(records, console, brief=options["quiet"])


def _write(records: dict[str, Record], options: dict[str, Any]) -> None:
    """A record for each fine-tune, and the table and the page of all."""
    from bulkedge.report import several_csv, to_html

    output: Path = options["output"]
    for name, record in records.items():
        write(output / name / record.file_name, record.to_json())
    write(output / TABLE, several_csv(records))
    page = to_html(list(records.values()), list(records), options["columns"])
    write(output / PAGE, page)
    if not options["quiet"]:
        click.echo(f"records, {TABLE} and {PAGE} written to {output}", err=True)
