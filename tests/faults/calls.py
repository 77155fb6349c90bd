"""A program whose calls of the C library are looked at, or fail, or hang: what `calls.c` does."""

import functools
import os
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_suffix(".c")


class Call(NamedTuple):
    """One call: of which thread ("main", "other", or of another process "child"), its name, and on what."""

    thread: str
    name: str
    target: str


@functools.cache
def library() -> Path:
    """Compile `calls.c`; it goes with the temporary files of this machine."""
    path = Path(tempfile.mkdtemp(prefix="blockd-calls-")) / "calls.so"
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *options, "-o", path, SOURCE, "-ldl"], check=True)
    return path


def environment(
    under: Path, *, log: Path | None = None, fail: str | None = None, hang: Path | None = None
) -> dict[str, str]:
    """The environment of a program whose calls on what is under a folder are looked at; see `calls.c`."""
    wanted = {"LD_PRELOAD": library(), "CALLS_UNDER": under, "CALLS_LOG": log, "CALLS_FAIL": fail}
    wanted["CALLS_HANG"] = hang
    return {**os.environ, **{name: str(value) for name, value in wanted.items() if value is not None}}


def logged(log: Path) -> list[Call]:
    """The calls that were made, in order."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [Call(*line.split(" ", 2)) for line in lines]
