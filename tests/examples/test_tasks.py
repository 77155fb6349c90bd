"""What docs/tasks.md tells people to type exists: commands, options, and the arguments they take."""

import json
import re
import shlex

import pytest

from blockd.cli.blockctl import main
from blockd.cli.options import parse_command_line
from blockd.commands.table import COMMANDS
from blockd.qmp.models import Arguments
from tests.walls import PROJECT

TASKS = (PROJECT / "docs" / "tasks.md").read_text().replace("\\\n", " ")
LINES = [
    shlex.split(line)
    for block in re.findall(r"```sh\n(.*?)```", TASKS, re.DOTALL)
    for line in re.findall(r"^block(?:d|ctl) (?:'[^']*'|.)*", block, re.MULTILINE)
]


def test_daemons_can_be_started_so() -> None:
    started = [words[1:] for words in LINES if words[0] == "blockd"]
    unit = re.search(r"^ExecStart=\S+ (.*)$", TASKS, re.MULTILINE)
    assert len(started) == 2 and unit is not None
    for words in [*started, shlex.split(unit[1])]:
        assert parse_command_line(words).config.options


def test_requests_have_arguments_that_the_commands_take() -> None:
    requests = [json.loads(words[2]) for words in LINES if words[:2] == ["blockctl", "raw"]]
    assert len(requests) == 6
    for request in requests:
        command = COMMANDS.get(request["execute"])
        assert command is not None, request
        (command.arguments or Arguments).from_wire(request["arguments"])


def test_blockctl_has_these_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in LINES:
        if words[0] == "blockctl" and words[1] != "raw":
            with pytest.raises(SystemExit) as ended:
                main([*words[1:], "--help"])
            assert ended.value.code == 0, (words, capsys.readouterr().err)
