"""An output that is in use is refused with options that the command has."""

import re

import pytest
from click.testing import CliRunner

from bulkedge.auditing import JOURNAL_NAME
from bulkedge.cli import cli
from helpers import save, save_adapter, some, weights

FAILURE = 2
EXISTS = " exists"
# the arguments of each command with an output, and whether that is a file
COMMANDS = {
    "audit": (["audit", "base.safetensors", "a"], False),
    "audit of several": (["audit", "base.safetensors", "a", "b"], False),
    "budget": (["budget", "base.safetensors"], False),
    "settings": (["budget", "base.safetensors", "-r2", "--alpha=4", "--peft", "used"], True),
    "merge": (["merge", "part1", "part2"], False),
    "repair": (["repair", "base.safetensors", "a"], False),
    "simulate": (["simulate", "rank"], False),
    "report": (["report", "record.json", "--format", "html"], True),
    "moments": (["moments", "base.safetensors", "texts"], True),
    "csv": (["audit", "base.safetensors", "a", "--csv", "used"], True),
}
RESUMED = {
    "audit": JOURNAL_NAME,
    "audit of several": f"a/{JOURNAL_NAME}",
    "budget": JOURNAL_NAME,
}
"""What a folder holds where a command can resume."""


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A base and two adapters, in the folder where commands run."""
    save(tmp_path / "base.safetensors", {"q.weight": weights(16, 14)})
    for name in ("a", "b"):
        factors = {"q.lora_A.weight": weights(2, 14), "q.lora_B.weight": weights(16, 2)}
        save_adapter(tmp_path / name, factors)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("held", [None, JOURNAL_NAME, f"a/{JOURNAL_NAME}"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_message_advises_only_options_of_its_command(name, held, inputs):
    arguments, is_file = COMMANDS[name]
    used = inputs / "used"
    if is_file:
        used.touch()
    else:
        for file in (used / "rank.json", used / (held or "notes")):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    given = arguments if "used" in arguments else [*arguments, "-o", str(used)]
    ended = CliRunner().invoke(cli, given)
    said = ended.stderr + str(ended.exception)
    assert ended.exit_code != 0
    assert EXISTS in said
    assert used.name in said
    command = cli.commands[arguments[0]]
    own = {option for parameter in command.params for option in parameter.opts}
    advised = some(re.findall(r"--[a-z-]+", said)) if name != "repair" else []
    assert set(advised) <= own
    assert ("--resume" in advised) is (RESUMED.get(name, "") == held)
