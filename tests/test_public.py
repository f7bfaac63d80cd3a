"""The surface of the package, and what importing it costs."""

import inspect
import pkgutil
import subprocess
import sys

import bulkedge

PUBLIC = {
    "AdapterError", "BudgetRecord", "BulkedgeError", "CheckpointError", "Clip", "ConvergenceError",
    "DegenerateWarning", "FrontierRecord", "InputError", "LocalEngine", "MissingExtraError",
    "Moments", "NothingAuditedError", "OutputError", "Project", "Protect", "RayEngine", "Recipe",
    "RecipeError", "Record", "RepairRecord", "Rescale", "Scale", "Shard", "Shrink", "__version__",
    "audit", "auditing", "budget", "budgeting", "checkpoint", "collect_moments", "comparison",
    "frontier", "intruder", "lora_config", "merge_shards", "moments", "project_spectral_ball",
    "records", "repair", "repairing", "report", "rmt", "simulate", "singular_triplet", "spectral",
    "spectral_cap", "spectral_norm", "tradeoff", "triplet", "truncate", "tune", "update",
}  # fmt: skip


def test_public_names():
    assert set(bulkedge.__all__) == set(dir(bulkedge)) == PUBLIC
    for name in PUBLIC:
        assert getattr(bulkedge, name) is not None


def test_unknown_names_are_attribute_errors():
    assert not hasattr(bulkedge, "nothing_of_the_kind")


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, bulkedge; assert 'torch' not in sys.modules\n"
        "bulkedge.audit, bulkedge.triplet\n"
        "heavy = {'transformers', 'peft', 'ray', 'matplotlib', 'pandas', 'scipy', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "import bulkedge.spectral\n"
        "heavy |= {'torch._dynamo', 'torch._inductor'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


ALONE = """
import os, sys
import torch, torch.nn.utils.parametrize, pydantic, numpy  # theirs is not what is tried
assert "bulkedge" not in sys.modules
for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        import bulkedge
        os._exit(getattr(bulkedge, name).__name__ != f"bulkedge.{name}")
    assert os.waitpid(child, 0)[1] == 0, name
"""


def test_every_public_module_is_an_attribute_after_a_plain_import():
    """One process each: what one has imported, the next would find."""
    public = {
        module.name
        for module in pkgutil.iter_modules(bulkedge.__path__)
        if module.name[0] != "_" and module.name != "cli"
    }
    assert (
        {"tune", "report"}
        <= public
        == {n for n in PUBLIC if inspect.ismodule(getattr(bulkedge, n))}
    )
    subprocess.run([sys.executable, "-c", ALONE, *public], check=True)


def test_audit_stays_a_function_after_its_parts_are_imported():
    import bulkedge.auditing.run

    assert callable(bulkedge.audit)


def test_errors_are_also_the_builtins_that_people_catch():
    for name, builtin in {
        "InputError": ValueError,
        "RecipeError": ValueError,
        "CheckpointError": ValueError,
        "AdapterError": bulkedge.CheckpointError,
        "NothingAuditedError": ValueError,
        "OutputError": OSError,
        "MissingExtraError": ImportError,
        "ConvergenceError": RuntimeError,
    }.items():
        assert issubclass(getattr(bulkedge, name), (builtin, bulkedge.BulkedgeError))
        assert issubclass(getattr(bulkedge, name), builtin)
