"""The command line: parse, one library call, show.  Exit 0 clean, 1 findings, 2 failure.

Data goes to stdout, progress and messages to stderr.  Nothing heavier than click is imported until
a command needs it, so that ``bulkedge --help`` answers at once.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from ._errors import BulkedgeError, MissingExtraError, OutputError, RecipeError, printable

if TYPE_CHECKING:
    from ._audit import Plan, Recipe, Record
    from .simulate import Table

CLEAN, FINDINGS, FAILURE, INTERRUPTED = 0, 1, 2, 130
RECORD_NAME = "record.json"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bulkedge")
def cli() -> None:
    """Spectral instruments for neural-network weights."""


@cli.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("tuned", type=click.Path(path_type=Path))
@click.option("-k", "--top-k", type=int, help="Leading tuned directions to judge.  [default: 10]")
@click.option("--epsilon", type=float, help="Score below which one counts.  [default: 0.5]")
@click.option(
    "--side",
    type=click.Choice(["left", "right", "both"]),
    help="Singular vectors to compare.  [default: left]",
)
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Only tensors that match; repeatable."
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="No tensors that match; repeatable.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cpu]")
@click.option("--seed", type=int, help="Seed of the solver's start block.  [default: 0]")
@click.option(
    "--config", type=click.Path(path_type=Path), help="Recipe in YAML; options override it."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for record.json.")
@click.option("--force", is_flag=True, help="Write into an output folder that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print the verdict alone, no progress.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=1, show_default=True,
              help="Worker processes, one thread each.")  # fmt: skip
@click.option(
    "--fail-on",
    type=click.Choice(["rotated", "intruder", "never"]),
    default="rotated",
    show_default=True,
    help="Mildest verdict that makes the exit code 1; rotated is the paper's count.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, stop.")
def audit(base: Path, tuned: Path, **options: Any) -> None:
    """Find the intruder dimensions that a fine-tune wrote into a model.

    BASE is a .safetensors file or a model folder; TUNED is the same, or a PEFT LoRA adapter folder.
    """
    from ._audit import check_device, make_plan, run_plan

    recipe = _recipe(options)
    plan = make_plan(base, tuned, recipe)
    check_device(recipe.device)
    output: Path | None = options["output"]
    if output is not None:
        _check_output(output, options["force"], plan)
    if options["dry_run"]:
        facts = _describe(plan, recipe)
        told = "\n".join(printable(f"{name:20} {value}") for name, value in facts.items())
        click.echo(json.dumps(facts, indent=2) if options["as_json"] else told)
        return
    _one_thread()
    with _progress(options["quiet"], len(plan.comparisons)) as progress:
        record = run_plan(plan, recipe, jobs=options["jobs"], progress=progress)
    _show(record, options)
    if output is not None:
        _write(output / RECORD_NAME, record.to_json())
        if not options["quiet"]:
            click.echo(f"record written to {output / RECORD_NAME}", err=True)
    sys.exit(_exit_code(record, options["fail_on"]))


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """List the tensors of a checkpoint or an adapter from its headers."""
    from .checkpoint import is_adapter, open_adapter, open_checkpoint

    if is_adapter(path):
        adapter = open_adapter(path)
        rows = [
            {"name": name, "shape": list(f.shape), "dtype": f.A.dtype, "rank": f.rank,
             "scale": f.scale} for name, f in adapter.factors.items()
        ]  # fmt: skip
        rows += [
            {"name": name, "shape": list(info.shape), "dtype": info.dtype}
            for name, info in adapter.tensors.items()
        ]
        rows += [{"name": row.info.name, "not_handled": row.reason} for row in adapter.unhandled]
    else:
        rows = [
            {"name": name, "shape": list(info.shape), "dtype": info.dtype, "file": info.file.name}
            for name, info in open_checkpoint(path).tensors.items()
        ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(_told(row))


@cli.command()
@click.argument("name", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for table and figure.")
@click.option("--set", "pairs", multiple=True, metavar="FIELD=VALUE", help="Setting; repeatable.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="Settings in YAML; --set overrides them."
)
@click.option("--list", "as_list", is_flag=True, help="List experiments, or the settings of NAME.")
@click.option("--force", is_flag=True, help="Overwrite table and figure.")
@click.option("--json", "as_json", is_flag=True, help="Print the table, or the list, as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no messages.")
def simulate(name: str | None, **options: Any) -> None:
    """Run an experiment on random matrices: a table (JSON) and a figure (SVG).

    NAME is one of those that --list shows; no NAME lists them too.
    """
    from .simulate import configure

    if name is None or options["as_list"]:
        _list_experiments(name, options["as_json"])
        return
    experiment = configure(name, _settings(options), str(options["config"] or "settings"))
    out: Path | None = options["out"]
    if out is not None or not options["as_json"]:
        _check_free(out, name, options["force"])
    _one_thread()
    with _progress(options["quiet"], experiment.repeats, "simulating") as progress:
        table = experiment.run(progress)
    if out is not None:
        _write_experiment(table, out, options["quiet"])
    if options["as_json"]:
        click.echo(table.to_json(), nl=False)
        sys.stdout.flush()


def _list_experiments(name: str | None, as_json: bool) -> None:
    """All experiments with what they show, or the settings of one with their defaults."""
    from .simulate import EXPERIMENTS, configure

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

    from ._audit import read_recipe

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
        raise click.UsageError("give a folder for table and figure (--out DIR), or --json")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; give a folder")
    for path in (folder / f"{name}.json", folder / f"{name}.svg"):
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; give another place")
        if path.exists() and not force:
            raise OutputError(f"{path}: exists; give another folder, or --force to overwrite it")
    parent = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{folder}: {parent} is not writable")


def _write_experiment(table: Table, out: Path, quiet: bool) -> None:
    """The table, and the figure if there is something to draw it with."""
    from .simulate import draw, to_svg

    name = table.experiment
    _write(out / f"{name}.json", table.to_json())
    told = f"table written to {out / name}.json"
    try:
        _write(out / f"{name}.svg", to_svg(draw(table)))
        told += f", figure to {out / name}.svg"
    except MissingExtraError as error:  # the table is what took the time
        click.echo(f"bulkedge: no figure: {error}", err=True)
    if not quiet:
        click.echo(told, err=True)


def _told(row: dict[str, Any]) -> str:
    """One tensor on one line."""
    name = printable(row["name"])
    if "not_handled" in row:
        return f"{name}  ({row['not_handled']})"
    line = f"{name}  {row['dtype']}  {'×'.join(map(str, row['shape'])) or 'scalar'}"
    return line + (f"  lora r={row['rank']} scale={row['scale']:g}" if "rank" in row else "")


def _recipe(options: dict[str, Any]) -> Recipe:
    """The recipe file's settings, overridden by what was given on the command line."""
    from ._audit import Recipe, make_recipe, read_recipe

    path: Path | None = options["config"]
    settings = read_recipe(path) if path is not None else {}
    given = {name: options[name] for name in Recipe.model_fields if options[name] not in (None, ())}
    return make_recipe(settings | given, source=str(path) if path is not None else "options")


def _describe(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """What an audit would do, and what it would need."""
    infos = [comparison.base for comparison in plan.comparisons]
    largest = max(infos, key=lambda info: info.size)
    read = sum(file.stat().st_size for file in {*plan.base.files, *plan.tuned.files})
    svd = sum(6 * max(i.shape) * min(i.shape) ** 2 for i in infos)
    return {
        "matrices": len(infos),
        "skipped": len(plan.skipped),
        "lost": sum(row.lost for row in plan.skipped),
        "largest": f"{largest.name} {'×'.join(map(str, largest.shape))} {largest.dtype}",
        "gigabytes_to_read": round(read / 1e9, 2),
        "gigabytes_of_memory": round(_peak_bytes(largest.shape) / 1e9, 2),
        "teraflop_in_float64": round(svd / 1e12, 2),
        "recipe": recipe.model_dump(mode="json"),
    }


def _peak_bytes(shape: tuple[int, ...]) -> float:
    """Memory of a job whose largest matrix has ``shape``: torch, and the SVD's copies and work."""
    long, short = max(shape), min(shape)
    return 300e6 + 8 * (4 * long * short + 5 * short**2)


def _check_output(output: Path, force: bool, plan: Plan) -> None:
    """Everything that can go wrong with the output, before the first computation."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file; give a folder")
    if (output / RECORD_NAME).is_dir():
        raise OutputError(f"{output}: {RECORD_NAME} in it is a folder; give another")
    if output.exists() and any(output.iterdir()) and not force:
        raise OutputError(f"{output}: exists; give another folder, or --force to write into it")
    for source in (plan.base.path, plan.tuned.path):
        if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
            raise OutputError(f"{output}: lies inside the input {source}; write elsewhere")
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{output}: {parent} is not writable")
    needed = 2**20 + 2**14 * len(plan.comparisons) + 2**10 * len(plan.skipped)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(f"{output}: {free} bytes free, the record needs about {needed}")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all; a link in its place is replaced, not followed."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None


@contextmanager
def _progress(quiet: bool, total: int, doing: str = "auditing") -> Iterator[Any]:
    """A bar with the time left on stderr; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (doing, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda name, done, total: bar.update(task, completed=done)


def _show(record: Record, options: dict[str, Any]) -> None:
    """The record on stdout, as JSON or as a table."""
    if options["as_json"]:
        text = record.to_json()
        if sys.stdout.isatty():  # names may hold characters that act on a terminal
            text = json.dumps(json.loads(text), indent=2) + "\n"
        click.echo(text, nl=False)
    else:
        from rich.console import Console

        from .report import print_record

        console = Console()
        if not console.is_terminal:  # a pipe has no edge to fold at
            console = Console(width=160)
        print_record(record, console, brief=options["quiet"])
    sys.stdout.flush()  # a full disk must be noticed here, not at exit


def _exit_code(record: Record, fail_on: str) -> int:
    """A linter's exit code; what could not be judged outranks what was."""
    from .intruder import Verdict
    from .report import findings

    if not record.summary.complete:
        return FAILURE
    if fail_on != "never" and findings(record, Verdict(fail_on)):
        return FINDINGS
    return CLEAN


def _one_thread() -> None:
    """One thread a job, unless the user has said how many: two on a busy machine are slower."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def main() -> None:
    """Run the command line; whatever goes wrong becomes one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show σ gets an escape
            stream.reconfigure(errors="backslashreplace")
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(FAILURE)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except BulkedgeError as error:
        click.echo(f"bulkedge: {printable(str(error))}", err=True)
        sys.exit(FAILURE)
    except Exception as error:  # Python's own exit code would be 1, which here means findings
        if "BULKEDGE_TRACEBACK" in os.environ:
            raise
        what = printable(f"{type(error).__name__}: {error}")
        click.echo(f"bulkedge: {what}; set BULKEDGE_TRACEBACK=1 to see where", err=True)
        sys.exit(FAILURE)
