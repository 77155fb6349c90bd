"""The container file, checked as far as that goes without a container engine.

The steps of its first stage run here, in a temporary folder in place of / and with the files that
its COPY lines name.
"""

import shlex
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.programs import run
from tests.walls import PROJECT


def _instructions() -> list[tuple[str, str]]:
    """All instructions in order: (RUN, what to run)."""
    text = (PROJECT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def _stages() -> list[list[tuple[str, str]]]:
    stages: list[list[tuple[str, str]]] = []
    for instruction in _instructions():
        if instruction[0] == "FROM":
            stages.append([])
        stages[-1].append(instruction)
    return stages


def _copy(root: Path, workdir: Path, arguments: str) -> None:
    *sources, target = shlex.split(arguments)
    for source in sources:
        if (PROJECT / source).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(PROJECT / source, workdir / target, ignore=ignore, dirs_exist_ok=True)
        else:
            shutil.copy(PROJECT / source, workdir / target)


@pytest.mark.slow
async def test_build_stage_installs_working_programs(tmp_path: Path) -> None:
    root = tmp_path / "root"
    workdir = root
    for name, arguments in _stages()[0]:
        if name == "WORKDIR":
            workdir = root / arguments.lstrip("/")
            workdir.mkdir(parents=True)
        elif name == "COPY":
            _copy(root, workdir, arguments)
        elif name == "RUN":
            words = [word.replace("/opt/", f"{root}/opt/") for word in shlex.split(arguments)]
            words[0] = sys.executable if words[0] == "python" else words[0]
            await run(*words, cwd=workdir)
    programs = root / "opt/blockd/bin"
    assert "blockd" in await run(programs / "blockd", "--version", cwd=tmp_path)
    assert "stream" in await run(programs / "blockctl", "--help", cwd=tmp_path)
    shutil.rmtree(root)


def test_all_that_is_copied_reaches_the_builder() -> None:
    """.dockerignore lets nothing pass but what it names."""
    allowed = [
        line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    for name, arguments in _stages()[0]:
        if name == "COPY":
            for source in shlex.split(arguments)[:-1]:
                assert (PROJECT / source).exists(), f"COPY names {source}, which is not there"
                assert any(fnmatch(source, pattern.removesuffix("/**")) for pattern in allowed), source


def test_container_runs_as_nobody_special() -> None:
    final = dict(_stages()[-1])
    assert final["USER"] not in ("root", "0")
    assert final["ENTRYPOINT"] == '["blockd"]'
    assert final["VOLUME"] == final["WORKDIR"] == "/images"
