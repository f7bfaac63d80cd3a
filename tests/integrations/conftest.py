"""These tests are collected where ``make test-integrations`` asks for them, and nowhere else."""

import json
import os
from pathlib import Path

import pytest

ASKED_FOR = "BULKEDGE_INTEGRATIONS"
collect_ignore_glob = [] if os.environ.get(ASKED_FOR) else ["test_*.py"]
FILE = Path(__file__).parents[2] / "benchmarks/results/integrations.json"


class Cells(dict):
    """The cells of the table by name; each is in the file as soon as it is known."""

    def __setitem__(self, name, cell):
        super().__setitem__(name, cell)
        known = json.loads(FILE.read_text())["cells"] if FILE.exists() else {}
        found = {"versions": _versions(), "cells": known | self}
        FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


@pytest.fixture(scope="session")
def cells():
    """The cells of this run; they take the place of those of an earlier one."""
    found = Cells()
    yield found
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
    pins = Path(__file__).with_name("llama-factory.txt").read_text().splitlines()
    return found | dict(pin.split("==") for pin in pins if pin.startswith("llamafactory=="))
