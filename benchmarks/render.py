"""Fill the figures and tables of the pages from the stored results.

python benchmarks/render.py

A page names a figure between two comments, ``<!-- speed[seconds]:.1f -->1.6<!-- end -->``: the
first is a field of :meth:`str.format`, looked up in the values of the page, and what stands between
them is written anew.  No figure is typed by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import render_certified
import render_early
import render_finetune
import render_integrations
import render_law
import render_moments
import render_protect
import render_random
import render_repair
import render_scale
import render_sides
import render_tables as tables

HERE = Path(__file__).parent
ROOT = HERE.parent
EXAMPLE = ROOT / "examples/minilm_wordnet"
MARK = re.compile(r"<!-- ([^<>]+) -->(.*?)<!-- end -->", re.DOTALL)


def fill(page: str, values: Mapping[str, Any]) -> str:
    """A page with every figure anew; a mark that ends its line has its text on lines of its own."""

    def anew(found: re.Match[str]) -> str:
        field, gap = found[1], "\n" if found[2].startswith("\n") else ""
        try:
            text = f"{{{field}}}".format_map(values)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"no figure for the mark {field!r}: {error!r}") from None
        return f"<!-- {field} -->{gap}{text}{gap}<!-- end -->"

    return MARK.sub(anew, page)


def result(name: str) -> dict[str, Any]:
    """A stored result."""
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def measured(name: str) -> dict[str, Any]:
    """The figures of a stored result."""
    return result(name)["measured"]


def cells(name: str) -> list[dict[str, Any]]:
    """The results that are stored one a line."""
    lines = (HERE / "results" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def where(name: str) -> str:
    """The machine of a stored result on one line."""
    return _where(result(name)["where"])


def where_of_cells(name: str) -> str:
    """The same of cells, which commits may have measured one after another."""
    found = [cell["where"] for cell in cells(name)]
    commits = dict.fromkeys(place["commit"] for place in found)
    return _where(found[-1] | {"commit": ", ".join(commits)})


def _where(place: dict[str, Any]) -> str:
    return (
        f"*Commit {place['commit']}; {place['processor']}, {place['cores']} cores, "
        f"{place['threads']} thread; Python {place['python']}, torch {place['torch']}.*"
    )


def goals(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that the design named beforehand."""
    at = {(r["n"], r["spectrum"]): r for r in rows}
    seed = [r["seed_ratio"] for r in rows if "seed_ratio" in r]
    return {
        "goal_gaussian": at[2048, "gaussian"]["svd_ratio"],
        "goal_decaying": at[2048, "decaying"]["svd_ratio"],
        "goal_large_gaussian": at[4096, "gaussian"]["svd_ratio"],
        "goal_large_decaying": at[4096, "decaying"]["svd_ratio"],
        "goal_gaussian_error": at[2048, "gaussian"]["ours_error"],
        "goal_decaying_error": at[2048, "decaying"]["ours_error"],
        "goal_passes": at[2048, "gaussian"]["passes"],
        "goal_seed_low": min(seed),
        "goal_seed_high": max(seed),
    }


def predictions(measured: dict[str, Any]) -> dict[str, float]:
    """Counts of the predictions on MiniLM's adapters."""
    names = (
        "matrices", "not_white", "same_count", "predicted_outliers", "measured_outliers",
        "with_intruders", "with_intruders_above", "without_intruders_above", "exact_error_largest",
    )  # fmt: skip
    return {name: measured[name] for name in names} | {
        "aligned": measured["encoder"]["aligned_median"],
        "without_intruders": measured["matrices"] - measured["with_intruders"],
    }


def certified() -> dict[str, Any]:
    """The section on the certified audit."""
    speed, cost = measured("certified_speed"), measured("certified_cost")
    turns, many = measured("before_after"), measured("many_small")
    ratios = sorted(r["ratio"] for r in speed["rows"] if r["shape"] == [4096, 4096])
    found = [path.stem for path in (HERE / "results").glob("certified_model_*.json")]
    models = sorted(found, key=lambda name: -measured(name)["scale"])
    plain = cost["plain"]
    return {
        "rank": speed["rank"],
        "k": speed["k"],
        "speed_table": render_certified.speed_table(speed["rows"]),
        "turns_table": render_certified.turns_table(turns["rows"]),
        "turns_before": turns["before"],
        "turns_where": where("before_after"),
        "many_table": render_certified.many_table(many["rows"]),
        "many_before": many["before"],
        "many_where": where("many_small"),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "speed_where": where("certified_speed"),
        "layers": measured(models[0])["matrices"],
        "model_table": render_certified.model_table([measured(name) for name in models]),
        "model_where": where(models[-1]),
        "n": plain["n"],
        "base_k": plain["k"],
        "r": plain["r"],
        "epsilon": plain["epsilon"],
        "cost_table": render_certified.cost_table(cost["rows"]),
        "cost_where": where("certified_cost"),
    }


def benchmarks() -> dict[str, Any]:
    """Values of docs/benchmarks.md."""
    triplet, training = measured("triplet")["rows"], measured("training_step")
    alarms, predicted = measured("alarms")["rows"], measured("predicted")
    return {
        "certified": certified(),
        **goals(triplet),
        **measured("audit_memory"),
        **measured("precision"),
        **measured("bad_gradients"),
        "batch": training["batch"],
        "steps": training["steps"],
        "gradient_table": tables.gradient_table(triplet),
        "forward_table": tables.forward_table(triplet),
        "training_table": tables.training_table(training["rows"]),
        "certificate_table": tables.bound_table(training["certificates"]),
        "fit_table": tables.fit_table(measured("bulk_fit")["rows"]),
        "alarm_table": tables.alarm_table(alarms),
        "draws": alarms[0]["draws"],
        "predicted_table": tables.predicted_table(predicted),
        **predictions(predicted),
        "fit_where": where("bulk_fit"),
        "alarm_where": where("alarms"),
        "predicted_where": where("predicted"),
        "memory_where": where("audit_memory"),
        "precision_where": where("precision"),
        "triplet_where": where("triplet"),
        "bad_gradients_where": where("bad_gradients"),
        "training_where": where("training_step"),
    }


def choices() -> dict[str, Any]:
    """Values of docs/how-to-choose.md."""
    found = measured("choose")
    return {
        "solvers-1": tables.solver_table(found["forward"], 1),
        "solvers-10": tables.solver_table(found["forward"], 10),
        "adjoints": tables.adjoint_table(found["backward"]),
        "crossover": tables.crossover_table(found["crossover"]),
        "where": where("choose"),
    }


def repairs() -> dict[str, Any]:
    """Values of docs/repair.md."""
    beside = render_repair.Beside(cells("rescale"), protect_results())
    return {
        "repair": render_repair.repair_table(measured("repair")["rows"]),
        "where": where("repair"),
        "beside": beside.table(),
        "gain": beside.figures(),
        "beside where": where_of_cells("rescale"),
    }


def protects() -> dict[str, Any]:
    """Values of docs/protect.md."""
    found, causal = protect_results(), cells("protect_causal")
    files = {
        label: found.one(adapter, "files", 1.0) for label, adapter in render_protect.SHIPPED.items()
    }
    return {
        "grid": render_protect.grid_table(found),
        "adapters": render_protect.adapters_table(found),
        "methods": render_protect.methods_table(found),
        "texts": render_protect.texts_table(found),
        "causal": render_protect.causal_table(causal),
        "gains": render_protect.gains(found),
        "others": render_protect.others(found),
        "seeds": render_protect.seeds(found),
        "files": files,
        "causals": render_protect.causal_figures(causal),
        "where": where_of_cells("protect"),
        "causal where": where_of_cells("protect_causal"),
        "sides": render_sides.sides_table(found),
        "beyond": render_sides.sides_figures(found),
        "ridges": render_sides.ridges_table(found),
        "costs": render_sides.costs_table(cells("protect_cost")),
        "cost": render_sides.costs_figures(cells("protect_cost")),
        "costs where": where_of_cells("protect_cost"),
    }


def moments() -> dict[str, Any]:
    """Values of docs/moments.md."""
    ranks = measured("moments_ranks")
    return {
        "layers": render_moments.layer_table(measured("moments_layers")["rows"]),
        "ranks": ranks,
        "rank table": render_moments.rank_table(ranks),
        "texts": render_moments.text_table(measured("moments_texts")["rows"]),
        "size": render_moments.sizes_7b(),
        "where": where("moments_layers"),
    }


def protect_results() -> render_protect.Results:
    """What protecting was measured to do."""
    return render_protect.Results(cells("protect"))


def finetunes() -> dict[str, Any]:
    """Values of docs/fine-tuning.md."""
    times = measured("finetune_times")["step_ms"]
    return {
        "finetune": render_finetune.finetune_table(measured("finetune")["rows"], times),
        "rates": render_finetune.rates_line(measured("finetune_rates")["rows"]),
        "finetune where": where("finetune"),
        "monitor": measured("monitor"),
        "monitor where": where("monitor"),
        "default": measured("monitor_default"),
        "default where": where("monitor_default"),
        "early": render_early.early_warning(cells("early_warning")),
        "early where": where_of_cells("early_warning"),
        "trainers": render_integrations.trainer_table(result("integrations")),
        "trainer versions": render_integrations.versions(result("integrations")),
        "packed": measured("packed_memory"),
        "packed where": where("packed_memory"),
        "study": _study().short(),
    }


def report_page() -> dict[str, Any]:
    """Values of docs/report.md: a page in a browser."""
    page = measured("report_page_1")
    seconds = {f"{name}_s": page[f"{name}_ms"] / 1e3 for name in ("seen", "opened")}
    return {"page": page | seconds, "page where": where("report_page_1")}


def hard_certificates() -> dict[str, Any]:
    """Values of docs/certificate.md."""
    return {
        "hard certificates": render_certified.hard_table(measured("hard_certificates")),
        "hard certificates where": where("hard_certificates"),
    }


def first_table() -> dict[str, Any]:
    """Values of examples/minilm_wordnet/README.md: full fine-tuning against LoRA."""
    sys.path.append(str(EXAMPLE))
    import table

    return {"fine-tunes": table.table(json.loads((EXAMPLE / "table.json").read_text()))}


def first_counts() -> dict[str, str]:
    """New directions in the encoder, by seed, of each fine-tune of the first table."""
    rows = json.loads((EXAMPLE / "table.json").read_text())
    found: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        new = row["encoder_rotated"] + row["encoder_intruder"]
        found.setdefault(row["name"], []).append(str(new))
    return {method: ", ".join(counts) for method, counts in found.items()}


def readme() -> dict[str, Any]:
    """Values of README.md."""
    speed = measured("certified_speed")["rows"]
    (speed_row,) = (r for r in speed if (r["shape"], r["kind"]) == ([4096, 4096], "trained"))
    return {
        "counts": first_counts(),
        "hard": (hard := measured("hard_certificates")["all"])
        | {"share": 100 * hard["decided"] / hard["directions"]},
        "memory": measured("audit_memory"),
        "speed": speed_row,
        "model": measured("certified_model_1"),
        "triplet": {r["spectrum"]: r["svd_ratio"] for r in measured("triplet")["rows"]
                    if r["n"] == 2048},
        "bad": measured("bad_gradients"),
        "repair": {f"lora-r{rank}": _repaired(f"lora-r{rank}") for rank in (1, 8)},
        "protect": render_protect.gains(protect_results()),
        "finetune": render_finetune.by_method(measured("finetune")["rows"]),
        "study": _study().short(),
    }  # fmt: skip


def _repaired(adapter: str) -> dict[str, Any]:
    """What the default repair did to an adapter."""
    rows = {r["method"]: r for r in measured("repair")["rows"] if r["adapter"] == adapter}
    before, after = rows["as trained"], rows["clip"]
    return {
        "before": before["after"]["encoder"],
        "after": after["after"]["encoder"],
        "accuracy_before": 100 * before["accuracy"],
        "accuracy_after": 100 * after["accuracy"],
        "accuracy_without_pooler": 100 * rows["clip, without the pooler"]["accuracy"],
    }


def law() -> dict[str, Any]:
    """Values of docs/before-you-train.md, and of docs/errata-intruders.md."""
    found, drawn = measured("law"), measured("law_random")
    seen, aside = found["seen"], found["aside"]
    study, finetune = _study().short(), measured("finetune")["rows"]
    return {
        "study": study,
        "ranks": render_law.ranks_table(study["of"], render_finetune.by_method(finetune)),
        "used": render_law.ranks_in_use(EXAMPLE / "lora-r8"),
        "seen": seen,
        "aside": aside,
        "of": render_law.shares(aside),
        "of_seen": render_law.shares(seen),
        "aside_table": render_law.law_table(aside["predictors"], published=True),
        "seen_table": render_law.law_table(seen["predictors"]),
        "trained_error": 100 * aside["calibration"]["error"],
        "draws": drawn["draws"],
        "random_error": 100 * drawn["error"],
        "curve": render_law.curve(drawn["curve"]),
        "law_where": where("law"),
        "weaker": render_law.followed(cells("weaker")),
        "weaker_where": where_of_cells("weaker"),
    }


def random_matrices() -> dict[str, Any]:
    """Values of docs/random-matrices.md."""
    null, rows = measured("random_matrices_null"), measured("random_matrices_minilm")["rows"]
    return {
        "null": render_random.null_table(null),
        "not_white": render_random.not_white(null),
        "null where": where("random_matrices_null"),
        "ends": render_random.ends_table(rows),
        "of": render_random.ends(rows),
        "ends where": where("random_matrices_minilm"),
    }


def scale() -> dict[str, Any]:
    """Values of docs/scale.md."""
    turns, budget = measured("before_after")["rows"], measured("budget")
    dry_runs = measured("dry_run")["rows"]
    found = render_scale.Scale(cells("scale"), turns, budget, cells("protect_cost"), dry_runs)
    places = {"where": where_of_cells("scale"), "used where": where("dry_run")}
    return found.values() | places


def study() -> dict[str, Any]:
    """Values of docs/study.md."""
    return _study().values()


def _study() -> Any:
    """The analysis of the study's stored lines."""
    if str(ROOT / "studies/forgetting") not in sys.path:
        sys.path.append(str(ROOT / "studies/forgetting"))
    import analyse

    return analyse


def questions() -> dict[str, Any]:
    """Values of docs/faq.md."""
    return {"study": _study().short()}


def audits() -> dict[str, Any]:
    """Values of docs/audit.md."""
    formats = result("formats")
    asked = ("auto-round", "autoawq", "bitsandbytes", "diffusers", "mlx")
    formats["versions"] = ", ".join(f"{name} {formats[name]}" for name in asked)
    return {"several": measured("several"), "formats": formats}


FILLED: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": readme,
    "docs/audit.md": audits,
    "docs/before-you-train.md": law,
    "docs/benchmarks.md": benchmarks,
    "docs/certificate.md": hard_certificates,
    "docs/errata-intruders.md": law,
    "docs/faq.md": questions,
    "docs/fine-tuning.md": finetunes,
    "docs/how-to-choose.md": choices,
    "docs/moments.md": moments,
    "docs/protect.md": protects,
    "docs/random-matrices.md": random_matrices,
    "docs/repair.md": repairs,
    "docs/report.md": report_page,
    "docs/scale.md": scale,
    "docs/study.md": study,
    "examples/minilm_wordnet/README.md": first_table,
}
"""Pages with figures, and what has their values."""


if __name__ == "__main__":
    for name, values in FILLED.items():
        page = ROOT / name
        page.write_text(fill(page.read_text(encoding="utf-8"), values()), encoding="utf-8")
    print(f"filled {', '.join(FILLED)}")
