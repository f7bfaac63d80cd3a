"""These tests are collected where ``make test-integrations`` asks for them, and nowhere else."""

import json
import os
from pathlib import Path

import pytest

ASKED_FOR = "BULKEDGE_INTEGRATIONS"
collect_ignore_glob = [] if os.environ.get(ASKED_FOR) else ["test_*.py"]
FILE = Path(__file__).parents[2] / "benchmarks/results/integrations.json"


@pytest.fixture(scope="session")
def cells():
    """The cells of the table; those of this run replace their own in the file."""
    found = {}
    yield found
    known = json.loads(FILE.read_text())["cells"] if FILE.exists() else {}
    versions = _versions()
    text = json.dumps({"versions": versions, "cells": known | found}, indent=1, sort_keys=True)
    FILE.write_text(text + "\n")
    print()
    for name, cell in sorted(found.items()):
        print(f"{name:60s} {cell}")


def _versions():
    from importlib.metadata import PackageNotFoundError, version

    names = ("torch", "transformers", "peft", "accelerate", "trl", "lightning")
    found = {}
    for name in (*names, "bitsandbytes", "schedulefree"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
