"""What needs PEFT or transformers says so; the rest does without."""

import subprocess
import sys

import pytest

BLOCK = "import sys; sys.modules.update(peft=None, transformers=None); "


def run(code):
    command = [sys.executable, "-c", BLOCK + code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_holding_and_watching_need_neither():
    ended = run(
        "import torch; from bulkedge.tune import AdaptedMatrix, SpikeClip, Monitor; "
        "W0, A, B = torch.randn(40, 30), torch.randn(2, 30), torch.randn(40, 2); "
        "m = [AdaptedMatrix('w', W0, A, B)]; SpikeClip(m).step(); Monitor(m, every=1).step()"
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("what", ["import bulkedge.tune.peft", "from bulkedge.tune import Hold"])
def test_the_others_name_the_remedy(what):
    ended = run(what)
    assert ended.returncode == 1
    assert "MissingExtraError" in ended.stderr
    assert "pip install 'bulkedge[hf]'" in ended.stderr


def test_a_model_without_adapters_is_refused():
    ended = run(
        "import torch; from bulkedge.tune import SpikeClip; SpikeClip(torch.nn.Linear(3, 4))"
    )
    assert ended.returncode == 1
    assert "expected adapted layers, found none" in ended.stderr
