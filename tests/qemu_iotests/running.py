"""Run a test of QEMU's with blockd in QEMU's place."""

import ast
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.qemu_iotests.cases import Script, UnitTests
from tests.walls import PROJECT

TIMEOUT_S = 250
_TITLE = re.compile(r"=== (.*) ===")


@dataclass(frozen=True)
class Place:
    """QEMU's tests, and a folder for what they leave."""

    tests: Path
    folder: Path

    def run(self, command: Sequence[str | Path], name: str, **environment: str) -> str:
        """Run a program in the folder of a test and return what it says."""
        for used in ("images", "sockets"):
            (self.folder / used).mkdir(exist_ok=True)
        output = self.folder / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*map(str, command)],
                cwd=(self.tests / name).parent,
                env=os.environ | self._environment() | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(TIMEOUT_S)
            finally:
                with contextlib.suppress(ProcessLookupError):  # whatever it has left behind
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                print(output.read_text())
        return output.read_text()

    def _environment(self) -> dict[str, str]:
        """What QEMU's own runner of tests sets."""
        return {
            "PYTHONPATH": f"{self.tests}:{self.tests.parents[1] / 'python'}",
            "PYTHON": sys.executable,
            "TEST_DIR": str(self.folder / "images"),
            "SOCK_DIR": str(self.folder / "sockets"),
            "SAMPLE_IMG_DIR": str(self.tests / "sample_images"),
            "QEMU_PROG": str(self.program("machine", "tests.qemu_iotests.machine")),
            "QSD_PROG": str(self.program("daemon", "blockd.cli.daemon")),
            "QEMU_IMG_PROG": "qemu-img",
            "QEMU_IO_PROG": "qemu-io",
            "QEMU_NBD_PROG": "qemu-nbd",
            "QEMU_OPTIONS": "-nodefaults -display none -accel qtest",
            "QEMU_IO_OPTIONS": "--cache writeback --aio threads -f qcow2",
            "QEMU_IO_OPTIONS_NO_FMT": "--cache writeback --aio threads",
            "QEMU_DEFAULT_MACHINE": "none",
            "IMGFMT": "qcow2",
            "IMGPROTO": "file",
            "IMGOPTSSYNTAX": "false",
            "IMGFMT_GENERIC": "true",
            "AIOMODE": "threads",
            "CACHEMODE": "writeback",
            "CACHEMODE_IS_DEFAULT": "true",
        }

    def program(self, name: str, module: str) -> Path:
        """Write a program that runs a module of this project."""
        path = self.folder / name
        path.write_text(f'#!/bin/sh\nPYTHONPATH="{PROJECT}" exec "{sys.executable}" -m {module} "$@"\n')
        path.chmod(0o755)
        return path


# -- tests of cases -------------------------------------------------------------------------------


def cases_of(place: Place, test: UnitTests) -> list[str]:
    """The names of all cases of a test."""
    tree = ast.parse((place.tests / test.name).read_text())
    return [
        f"{group.name}.{case.name}"
        for group in tree.body
        if isinstance(group, ast.ClassDef)
        for case in group.body
        if isinstance(case, ast.FunctionDef) and case.name.startswith("test_")
    ]


def run_cases(place: Place, test: UnitTests, cases: Sequence[str]) -> dict[str, str]:
    """Run cases of a test; returns what the test says of each: `ok`, or something else."""
    output = place.run(
        [sys.executable, place.tests / test.name, "-v", *cases],
        test.name,
        IMGFMT=test.format,
        IMGPROTO=test.protocol,
        QEMU_IO_OPTIONS=f"--cache writeback --aio threads -f {test.format}",
    )
    said: dict[str, str] = {}
    for part in re.split(r"^(?=test_\w+ \()", output, flags=re.MULTILINE):
        case = re.match(r"test_\w+ \(__main__\.([\w.]+)\)", part)
        # What the machine logs may come in between.
        result = re.search(r"(?:^|\s)(ok|FAIL|ERROR|skipped .*)$", part, re.MULTILINE)
        if case and result:
            said[case[1]] = result[1]
    return {case: said.get(case, "nothing") for case in cases}


# -- tests with an output to compare --------------------------------------------------------------


def compared_sections(place: Place, test: Script) -> Iterator[tuple[str, list[str], list[str]]]:
    """Run a test; yields each section's title, what is expected, and what was said."""
    name = place.tests / test.name
    environment = {}
    if name.read_text().startswith("#!/usr/bin/env bash"):
        command: list[str | Path] = ["bash", name]
        environment["BASH_ENV"] = str(_passing_over(place.folder, test.passed_over))
    else:
        command = [sys.executable, name]
    said = _sections(place.run(command, test.name, **environment), test.not_compared)
    expected = _sections((place.tests / f"{test.name}.out").read_text(), test.not_compared)
    for title, lines in expected.items():
        if title not in test.left_out:
            yield title, lines, said.get(title, [])


def _sections(output: str, without: Mapping[str, str]) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {"": []}
    title = ""
    for line in output.splitlines():
        if match := _TITLE.fullmatch(line):
            title = match[1]
        elif line.strip() and not any(re.match(pattern, line) for pattern in without):
            sections.setdefault(title, []).append(line.rstrip())
    return sections


def _passing_over(folder: Path, commands: Mapping[str, str]) -> Path:
    """Write what bash reads before a script, so that it passes over some of its commands."""
    patterns = " | ".join(commands)
    script = folder / "before.bash"
    # The option by which a trap can pass over commands has to be set after the start of bash.
    trap = f"shopt -s extdebug; set +T; case $BASH_COMMAND in ({patterns}) false ;; esac"
    script.write_text("unset BASH_ENV\n" + (f"trap '{trap}' DEBUG\n" if commands else ""))
    return script
