"""``bulkedge simulate``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bulkedge._errors import MissingExtraError, OutputError, RecipeError

from ._output import STDOUT, default_to_one_thread, write
from ._progress import show_progress

if TYPE_CHECKING:
    from bulkedge.simulate import Table


@click.command(short_help="Run an experiment on random matrices.")
@click.argument("name", required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for table and figure; - prints the table as JSON.",
)
@click.option("--set", "pairs", multiple=True, metavar="FIELD=VALUE", help="A setting; repeatable.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="Settings in YAML; --set overrides them."
)
@click.option(
    "--list", "as_list", is_flag=True, help="List the experiments, or the settings of NAME."
)
@click.option("--force", is_flag=True, help="Overwrite table and figure.")
@click.option("--json", "as_json", is_flag=True, help="Print the table, or the list, as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no messages.")
def simulate(name: str | None, **options: Any) -> None:
    """Run an experiment on random matrices: a table (JSON) and a figure (SVG).

    --list shows every NAME.
    """
    from bulkedge.simulate import configure

    if name is None or options["as_list"]:
        _list_experiments(name, options["as_json"])
        return
    experiment = configure(name, _settings(options), str(options["config"] or "settings"))
    out: Path | None = options["output"]
    if out == STDOUT:
        out, options["as_json"] = None, True
    if out is not None or not options["as_json"]:
        _check_free(out, name, options["force"])
    default_to_one_thread()
    with show_progress(options["quiet"], experiment.repeats, "simulating") as progress:
        table = experiment.run(progress)
    if out is not None:
        _write_experiment(table, out, options["quiet"])
    if options["as_json"]:
        click.echo(table.to_json(), nl=False)
        sys.stdout.flush()


def _list_experiments(name: str | None, as_json: bool) -> None:
    """All experiments with what they show, or the settings of one with their defaults."""
    from bulkedge.simulate import EXPERIMENTS, configure

    facts = {key: kind.summary() for key, kind in EXPERIMENTS.items()}
    if name is not None:
        fields, defaults = type(configure(name, {})).model_fields, configure(name, {}).model_dump()
        facts = {key: f"{field.description} [{defaults[key]}]" for key, field in fields.items()}
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for key, told in facts.items():
        click.echo(f"{key:13} {told}")


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """What the file says, overridden by what was set on the command line."""
    import yaml

    from bulkedge.records import read_recipe

    settings = read_recipe(options["config"]) if options["config"] is not None else {}
    for pair in options["pairs"]:
        field, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"expected --set FIELD=VALUE, got {pair!r}")
        try:
            settings[field] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise RecipeError(f"--set {field}: expected a value in YAML, got {value!r}") from None
    return settings


def _check_free(folder: Path | None, name: str, force: bool) -> None:
    """Everything that can go wrong with table and figure, before the first computation."""
    if folder is None:
        raise click.UsageError("give a folder for table and figure (--output DIR), or --json")
    from bulkedge.auditing import refuse_held

    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; give a folder")
    for path in (folder / f"{name}.json", folder / f"{name}.svg"):
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; give another place")
        if path.exists() and not force:
            raise OutputError(f"{path}: exists; give another folder, or --force to overwrite it")
    refuse_held(folder)
    parent = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{folder}: {parent} is not writable")


def _write_experiment(table: Table, out: Path, quiet: bool) -> None:
    """The table, and the figure if there is something to draw it with."""
    from bulkedge.simulate import draw, to_svg

    name = table.experiment
    write(out / f"{name}.json", table.to_json())
    told = f"table written to {out / name}.json"
    try:
        write(out / f"{name}.svg", to_svg(draw(table)))
        told += f", figure to {out / name}.svg"
    except MissingExtraError as error:  # the table is what took the time
        click.echo(f"bulkedge: no figure: {error}", err=True)
    if not quiet:
        click.echo(told, err=True)
