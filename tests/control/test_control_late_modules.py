"""What a daemon loads after its start: it is there before it is needed, and if it cannot be, guests go on."""

import ast
import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.protocols.nbd_client import NbdClient
from tests.daemon_process import DaemonProcess
from tests.qmp_client import QmpClient, QmpError
from tests.walls import PROJECT

# A daemon whose `module` cannot be loaded the first `count` times, for a reason.
WITHOUT_A_MODULE = """
import errno, os, sys

class Short:
    def __init__(self, module, count, reason):
        self.module, self.count, self.reason = module, count, reason

    def find_spec(self, name, path=None, target=None):
        if name == self.module and self.count:
            self.count -= 1
            raise eval(self.reason)

sys.meta_path.insert(0, Short(sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)))
from blockd.cli.daemon import main
sys.exit(main())
"""
# These run only while the command line is read and done.
NOT_OF_A_RUNNING_DAEMON = {"cli", "web"}


OUT_OF_DESCRIPTORS = "OSError(errno.EMFILE, os.strerror(errno.EMFILE), name)"
# Why a module cannot be loaded, as Python and as blockd says it. An upgrade that is half done may lead to
# anything: what the file of one edition expects of that of another is not there, or its code is cut off.
REASONS = {
    OUT_OF_DESCRIPTORS: "blockd[.]commands[.]table: Too many open files",
    "EOFError('marshal data too short')": "marshal data too short",
    "AttributeError('no attribute of that name')": "AttributeError: no attribute of that name",
    "TypeError('too many arguments')": "TypeError: too many arguments",
    "MemoryError()": "out of memory",
}


def short_of(tmp_path: Path, module: str, count: int, reason: str = OUT_OF_DESCRIPTORS) -> DaemonProcess:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"disk" * 1024)
    program = ("-c", WITHOUT_A_MODULE, module, str(count), reason)
    return DaemonProcess(tmp_path, "--device", f"vda={disk}", program=program)


@pytest.mark.parametrize("reason", REASONS)
async def test_commands_that_cannot_be_loaded_end_no_daemon(tmp_path: Path, reason: str) -> None:
    daemon = short_of(tmp_path, "blockd.commands.table", 3, reason)
    await daemon.start()
    guest = await NbdClient.connect_unix(str(daemon.nbd_path), "vda")
    client = await QmpClient.connect(str(daemon.qmp_path), negotiate=False)
    try:
        for _ in range(2):
            with pytest.raises(QmpError, match=f"Could not load the commands: {REASONS[reason]}"):
                await client.command("qmp_capabilities")
        await client.command("qmp_capabilities")
        assert [block["device"] for block in await client.command("query-block")] == ["vda"]
        assert await guest.read(0, 4) == b"disk"
    finally:
        await client.close()
        await guest.disconnect()
        assert await daemon.stop() == 0
    assert "Could not load the commands" in daemon.stderr
    assert ("Traceback" in daemon.stderr) == (reason[:4] in ("Attr", "Type")), "what nobody expects is told"


async def test_a_client_whose_requests_cannot_be_parsed_is_let_go(tmp_path: Path) -> None:
    daemon = short_of(tmp_path, "blockd.wire.qmp.reader", 1)
    await daemon.start()
    try:
        reader, writer = await asyncio.open_unix_connection(str(daemon.qmp_path))
        assert (await reader.readline()).startswith(b'{"QMP"')
        assert await reader.read() == b""
        writer.close()
        client = await daemon.qmp()
        assert (await client.command("query-version"))["package"]
        await client.close()
    finally:
        assert await daemon.stop() == 0
    assert "error=Could not load the JSON reader" in daemon.stderr
    assert "Traceback" not in daemon.stderr


def late_imports() -> Iterator[str]:
    """Each module that some function imports, of those that a running daemon may call."""
    for path in (PROJECT / "blockd").rglob("*.py"):
        if path.relative_to(PROJECT / "blockd").parts[0] in NOT_OF_A_RUNNING_DAEMON:
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    yield node.module
                elif isinstance(node, ast.Import):
                    yield from (name.name for name in node.names)


def test_all_that_may_be_needed_is_loaded_after_the_start() -> None:
    program = (
        "import sys\n"
        "from unittest.mock import MagicMock\n"
        "import blockd.qmp.session_commands, blockd.wire.qmp.reader\n"
        "from blockd.daemon.daemon import Daemon\n"
        "Daemon._load_commands(MagicMock())\n"
        "print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    missing = set(late_imports()) - set(run.stdout.split())
    # HTTP is served from the start or never.
    assert missing == {"blockd.web.server", "blockd.web.status"}
