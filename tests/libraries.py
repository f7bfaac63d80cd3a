"""Libraries that own a format: those of [dev], and those that ``make test-formats`` installs."""

import importlib
import os
import sys
import warnings

import pytest

NEEDS_PYTHON_3_11 = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="compressed-tensors has no release for Python 3.10"
)


def library(name):
    """One that is no part of [dev]; a test that asks for it is skipped where it is not installed.

    Under ``make test-formats`` nothing is skipped: what is missing there is an error.
    """
    if os.environ.get("BULKEDGE_FORMATS"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"no {name}: `make test-formats` installs it")
