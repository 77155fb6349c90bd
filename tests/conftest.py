"""Fixtures that all tests share."""

import errno
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from blockd.protocols import reflink
from tests.daemon_process import DaemonProcess
from tests.filesystems import Place, mounted

# Whose tests all run daemons or QEMU's programs.
SLOW_ROOMS = {"badinput", "differential", "examples", "interop", "iotests_ideas", "kill", "locks", "state"}

StartDaemon = Callable[..., Awaitable[DaemonProcess]]

# A shell lets what it starts in the background ignore Ctrl-C, which programs under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


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

    async def start(*arguments: str | Path, own_sockets: bool = True) -> DaemonProcess:
        folder = tmp_path / f"daemon{len(started)}"
        folder.mkdir()
        daemon = DaemonProcess(folder, *arguments, own_sockets=own_sockets)
        started.append(daemon)
        return await daemon.start()

    yield start
    for daemon in started:
        if daemon.is_running:
            await daemon.stop()
        assert "Traceback" not in daemon.stderr, daemon.stderr


@pytest.fixture(params=["xfs", "btrfs"])
def reflink_place(
    request: pytest.FixtureRequest, tmp_path: Path, record_property: Callable[[str, object], None]
) -> Iterator[Place]:
    """A filesystem where files can share blocks, if it can be mounted; the report says so."""
    with mounted(request.param, tmp_path) as place:
        record_property("is_mounted", place.is_mounted)
        yield place


@pytest.fixture
def without_cloning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are made on any filesystem, and looked at for zeroes."""
    monkeypatch.setattr(reflink, "_clone_range", lambda *_: errno.EOPNOTSUPP)
