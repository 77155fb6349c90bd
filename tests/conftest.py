"""Fixtures that all tests share."""

import errno
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import settings

from blockd.protocols import reflink
from tests.daemon_process import DaemonProcess
from tests.filesystems import FOLDER, Place, mounted
from tests.missing import found_in_groups, watch_for_missing_programs

# Whose tests all run daemons or QEMU's programs.
SLOW_ROOMS = {
    "badinput",
    "differential",
    "examples",
    "interop",
    "qemu_iotests",
    "iotests_ideas",
    "kill",
    "locks",
    "state",
}

StartDaemon = Callable[..., Awaitable[DaemonProcess]]

# A shell lets what it starts in the background ignore Ctrl-C, which programs under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# On a loaded machine an example may take any time: a deadline in wall-clock time fails tests of sound code.
settings.register_profile("no-deadline", settings(), deadline=None)
settings.load_profile("no-deadline")


def pytest_configure() -> None:
    watch_for_missing_programs()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    with found_in_groups():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    with found_in_groups():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in SLOW_ROOMS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
async def start_daemon(tmp_path: Path) -> AsyncIterator[StartDaemon]:
    """Start daemons in processes of their own: `daemon = await start_daemon("--device", f"vda={image}")`.

    At the end those still running are stopped, and none may have printed a traceback.
    """
    started: list[DaemonProcess] = []

    async def start(
        *arguments: str | Path, own_sockets: bool = True, environment: Mapping[str, str] = os.environ
    ) -> DaemonProcess:
        folder = tmp_path / f"daemon{len(started)}"
        folder.mkdir()
        daemon = DaemonProcess(folder, *arguments, own_sockets=own_sockets, environment=environment)
        started.append(daemon)
        return await daemon.start()

    yield start
    for daemon in started:
        if daemon.is_running:
            await daemon.stop()
        assert "Traceback" not in daemon.stderr, daemon.stderr


@pytest.fixture(params=[FOLDER, "xfs", "btrfs"])
def reflink_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """The filesystem of all tests, and those where files can share blocks."""
    with mounted(request.param, tmp_path) as place:
        yield place


@pytest.fixture
def without_cloning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are made on any filesystem, and looked at for zeroes."""
    monkeypatch.setattr(reflink, "_clone_range", lambda *_: errno.EOPNOTSUPP)
