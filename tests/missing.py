"""What a test needs and the machine lacks: a skip that says what, and a failure where all is installed."""

import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import pytest


def skip_without(what: str) -> NoReturn:
    """End a test for want of something; CI has everything, so there it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI has to have it: {what}")
    pytest.skip(what)


def require_programs(*names: str, path: str | None = None) -> None:
    """End a test for want of a program; `path`: where programs are, if not where the environment says."""
    for name in names:
        if shutil.which(name, path=path) is None:
            skip_without(f"{name} is not installed")


def require_listening(host: str) -> None:
    """End a test that listens where this cannot be: without IPv6, or a file that tells who `localhost` is."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.bind(address)
    except OSError as error:
        skip_without(f"nothing can listen on '{host}' here: {error.strerror}")


def watch_for_missing_programs() -> None:
    """From now on a test that runs a program which is not installed ends as with `require_programs`."""

    def check(event: str, arguments: tuple[object, ...]) -> None:
        if event == "subprocess.Popen":
            name, _, _, environment = arguments
            name = os.fsdecode(name)  # type: ignore[arg-type]  # a name of some kind
            path = environment.get("PATH") if isinstance(environment, Mapping) else None
            if "/" not in name:  # others are the tests' own
                require_programs(name, path=path)

    sys.addaudithook(check)


@contextmanager
def found_in_groups() -> Iterator[None]:
    """Let the end of a test for want of something count that a task group has wrapped."""
    try:
        yield
    except BaseExceptionGroup as group:
        for outcome in (pytest.fail.Exception, pytest.skip.Exception):
            found: BaseException | None = group.subgroup(outcome)
            while isinstance(found, BaseExceptionGroup):
                found = found.exceptions[0]
            if found is not None:
                raise found from group
        raise
