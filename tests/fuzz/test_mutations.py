"""Ten thousand damaged inputs: an error of ours or an answer, no crash, no hang, bounded memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from fuzz.drive import SECONDS
from fuzz.mutate import mutate
from fuzz.victims import VICTIMS

DRIVER = Path(__file__).with_name("drive.py")
CASES, CHUNK, QUICK = 10_000, 990, 100


def drive(start, count, timeout):
    """A crash takes the driver with it, not the tests."""
    command = [sys.executable, str(DRIVER), str(start), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def judge(found):
    assert not found["faults"], json.dumps(found["faults"][:3], indent=1)
    assert found["slowest"] < SECONDS
    reached = found["reached"]
    assert sum(reached.values()) == found["cases"]
    # damage that is always refused at the door would try nothing behind it
    assert reached["audited"] > 0.15 * found["cases"]
    assert reached["refused"] > 0.4 * found["cases"]


def test_damaged_inputs():
    judge(drive(0, QUICK, timeout=120))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(QUICK, CASES, CHUNK))
def test_more_damaged_inputs(start):
    judge(drive(start, min(CHUNK, CASES - start), timeout=290))


def test_a_case_is_its_number():
    files = {name: make().files for name, make in VICTIMS.items()}
    for number in range(60):
        name = sorted(files)[number % len(files)]
        once, again = (mutate(files[name], Random(number)) for _ in range(2))  # noqa: S311
        assert once == again
        assert files[name] == VICTIMS[name]().files


PLANTED = """
import json, sys
import fuzz.drive as drive, fuzz.mutate as mutate, fuzz.victims as victims
for name in sorted(victims.VICTIMS)[1:]: del victims.VICTIMS[name]  # one is enough to be damaged
def fault(*_): raise KeyError(1)
def hang(*_):
    while True: pass
def leak(*_): return bytearray(2**20 * 2 * drive.MEGABYTES)
drive.SECONDS = 1
seen = []
for mutate.mutate in (fault, hang, leak):
    seen += [fault["error"] for fault in drive.main(0, 1)["faults"]]
print(json.dumps(seen))
"""


def test_the_driver_sees_what_it_is_there_to_see():
    command = [sys.executable, "-c", PLANTED]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(DRIVER.parents[1])])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == ["KeyError", "Hang", "MemoryError"]
