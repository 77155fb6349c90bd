"""A program that is not installed is told by its name: by a skip, and in CI by a failure."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from tests.missing import found_in_groups, require_listening
from tests.programs import run

OUTCOMES = {"": pytest.skip.Exception, "true": pytest.fail.Exception}


@pytest.mark.parametrize("ci", OUTCOMES)
async def test_a_program_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ci: str
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OUTCOMES[ci], match="no-such-program is not installed"):
        await run("no-such-program", "--version")
    with pytest.raises(OUTCOMES[ci], match="no-such-program is not installed"):
        await asyncio.to_thread(subprocess.run, ["no-such-program"], check=False)
    with pytest.raises(OUTCOMES[ci], match="no-such-program is not installed"), found_in_groups():
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(run("no-such-program"))


def test_they_are_looked_for_where_they_are_run_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="true is not installed"):
        subprocess.run(["true"], env={"PATH": str(tmp_path)}, check=True)
    subprocess.run(["true"], check=True)


@pytest.mark.parametrize("ci", OUTCOMES)
def test_an_address_that_is_nobodys_here(monkeypatch: pytest.MonkeyPatch, ci: str) -> None:
    monkeypatch.setenv("CI", ci)
    require_listening("127.0.0.1")
    with pytest.raises(OUTCOMES[ci], match=r"nothing can listen on '192\.0\.2\.1' here: Cannot assign"):
        require_listening("192.0.2.1")
