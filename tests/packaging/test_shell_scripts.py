"""Shell scripts parse and can be run."""

import os
from pathlib import Path

import pytest

from tests.programs import run
from tests.walls import PROJECT

SCRIPTS = [
    PROJECT / ".ci/run",
    PROJECT / "tests/qemu_iotests/fetch",
    *sorted((PROJECT / "examples").glob("*.sh")),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
async def test_script_parses_and_is_executable(script: Path) -> None:
    shell = script.read_text().partition("\n")[0].rpartition("/")[2].split()[-1]
    await run(shell, "-n", script)
    assert os.access(script, os.X_OK)
