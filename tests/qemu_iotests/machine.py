"""The program that QEMU's tests start in QEMU's place: blockd, and around it what they want of a machine.

Its disks are blockd's: the options of nodes and objects are blockd's own, and a drive is a node and a
device of it. QMP goes to blockd and back as it is. Only what is the machine's is answered here: devices of
a guest come, go and are reset without anybody noticing; ``qemu-io`` of the human monitor reads and writes a
node through an NBD export; and when blockd has ended, SHUTDOWN is told, as QEMU does.
"""

import asyncio
import ctypes
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockd.cli.keyval import parse_flat, parse_keyval
from blockd.wire.qmp import ParseError
from blockd.wire.qmp.reader import JsonReader
from tests.qemu_iotests.drives import drive
from tests.qmp_client import QmpClient, QmpError

LINE_MAX = 64 << 20
GUEST_DEVICES = ("virtio-blk", "virtio-scsi", "virtio-scsi-pci", "scsi-hd")
# Options of the machine around the disks, and how many values each has.
_IGNORED = {"-display": 1, "-vga": 1, "-machine": 1, "-accel": 1, "-serial": 1, "-monitor": 1}
_IGNORED |= {"-nodefaults": 0, "-nographic": 0, "-S": 0}
# Nodes that blockd has no driver for; what is asked of them is left out.
_LACKING = "null-co,"
_EXPORT = "of-the-machine"

Json = Any


@dataclass
class Options:
    """QEMU's command line, as far as it concerns blockd."""

    blockd: list[str] = field(default_factory=list)
    # Where the client of QMP listens; without, it is whoever started this program.
    monitor: str | None = None
    qtest: str | None = None

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Options":
        options, rest, drives = cls(), iter(words), 0
        for word in rest:
            name = word if not word.startswith("--") else word[1:]
            if name in _IGNORED:
                for _ in range(_IGNORED[name]):
                    next(rest)
                continue
            value = next(rest)
            match name:
                case "-blockdev" if value.startswith(_LACKING):
                    pass
                case "-object" | "-blockdev":
                    options.blockd += [f"-{name}", value]
                case "-drive":
                    options._add_drive(value, drives)
                    drives += 1
                case "-device":
                    options._add_device(value)
                case "-chardev":
                    options.monitor = str(parse_flat(value, "backend")["path"])
                case "-qtest":
                    options.qtest = value.removeprefix("unix:path=")
                case "-mon" | "-qmp":
                    pass
                case _:
                    raise SystemExit(f"{word}: no option of this stand-in for QEMU")
        return options

    def _add_drive(self, text: str, count: int) -> None:
        read = drive(text, count)
        self.blockd += ["--blockdev", json.dumps(read.node)]
        self.blockd += ["--device", f"id={read.device},node-name={read.node['node-name']}"]

    def _add_device(self, text: str) -> None:
        """A guest's disk on a node is a device of blockd; what has no disk is nothing to it."""
        options = parse_keyval(text, "driver")
        if node := options.get("drive"):
            self.blockd += ["--device", f"id={options.get('id', f'guest-{node}')},node-name={node}"]


class Machine:
    """One run: blockd, the client, and a QMP session of the machine's own."""

    def __init__(self, options: Options, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._say_line: Callable[[bytes], object]
        self._own: QmpClient | None = None
        self._is_serving_nbd = False
        self._has_quit = False
        # Where the tests had NBD servers listen: QEMU leaves the sockets behind, and they remove them.
        self._sockets: list[Path] = []

    async def run(self) -> int:
        """Run until blockd has ended, and return its exit status."""
        socket = self._folder / "qmp"
        blockd = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "blockd.cli.daemon", "--qmp", str(socket), *self._options.blockd),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            preexec_fn=_end_with_parent,
        )
        while (session := await _connected(socket)) is None:
            if blockd.returncode is not None:
                return blockd.returncode
            await asyncio.sleep(0.005)
        replies, daemon = session
        commands, self._say_line = await self._connect_client()
        if self._options.qtest:
            await asyncio.open_unix_connection(self._options.qtest)
        async with asyncio.TaskGroup() as tasks:
            forwarding = tasks.create_task(self._forward(commands, daemon, socket))
            await self._return(replies)
            forwarding.cancel()
        status = await blockd.wait()
        for left in self._sockets:
            left.touch()
        return status

    async def _connect_client(self) -> tuple[asyncio.StreamReader, Callable[[bytes], object]]:
        """Where commands come from, and what sends the client a line."""
        if self._options.monitor:
            commands, client = await asyncio.open_unix_connection(self._options.monitor)
            return commands, client.write
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        return reader, _say_on_stdout

    async def _forward(
        self, commands: asyncio.StreamReader, daemon: asyncio.StreamWriter, socket: Path
    ) -> None:
        """Bring commands to blockd, but for the machine's."""
        json_reader = JsonReader()
        while data := await commands.read(1 << 16):
            for message in json_reader.feed(data):
                assert isinstance(message, dict) and not isinstance(message, ParseError), message
                answer = await self._answer(message, socket)
                if answer is None:
                    self._has_quit |= message.get("execute") == "quit"
                    daemon.write(json.dumps(message).encode() + b"\n")
                    continue
                own_id = {"id": message["id"]} if "id" in message else {}
                self._say({**answer, **own_id})

    async def _return(self, replies: asyncio.StreamReader) -> None:
        """Bring what blockd says to the client, but for what the machine's own export causes."""
        while line := await replies.readline():
            message = json.loads(line)
            if message.get("data", {}).get("id") != _EXPORT:
                self._say_line(line)
        if self._has_quit:
            self._tell("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})

    def _say(self, message: Json) -> None:
        self._say_line(json.dumps(message).encode() + b"\r\n")

    def _tell(self, event: str, data: Json) -> None:
        seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        stamp = {"seconds": seconds, "microseconds": microseconds}
        self._say({"timestamp": stamp, "event": event, "data": data})

    # -- what is the machine's ----------------------------------------------------------------

    async def _answer(self, message: dict[str, Json], socket: Path) -> Json | None:
        """The reply to a command that is none of blockd's; None for others."""
        arguments = message.get("arguments", {})
        match message.get("execute"):
            case "nbd-server-start":
                self._sockets.append(Path(arguments["addr"]["data"]["path"]))
            case "device_add" | "system_reset":
                return {"return": {}}
            case "device_del":
                name = arguments["id"]
                self._tell("DEVICE_DELETED", {"device": name, "path": f"/machine/peripheral/{name}"})
                return {"return": {}}
            case "human-monitor-command":
                if self._own is None:
                    self._own = await QmpClient.connect(socket)
                return await self._qemu_io(self._own, arguments["command-line"])
        return None

    async def _qemu_io(self, own: QmpClient, line: str) -> Json:
        """`qemu-io NODE "command"`: what it says goes where this program's output goes, as QEMU's does."""
        _, node, command = line.split(" ", 2)
        nbd = self._folder / "nbd"
        if not self._is_serving_nbd:
            await own.command("nbd-server-start", addr={"type": "unix", "data": {"path": str(nbd)}})
            self._is_serving_nbd = True
        is_writable = not command.strip('"').startswith("read")
        try:
            await own.command(
                "block-export-add",
                {"id": _EXPORT, "type": "nbd", "node-name": node, "name": "disk", "writable": is_writable},
            )
        except QmpError as error:
            return {"return": f"Error: {error.description}\r\n"}
        words = ("qemu-io", "-f", "raw", *(() if is_writable else ("-r",)), "-c", command.strip('"'))
        process = await asyncio.create_subprocess_exec(*words, f"nbd+unix:///disk?socket={nbd}")
        await process.wait()
        await own.command("block-export-del", id=_EXPORT, mode="hard")
        await own.event("BLOCK_EXPORT_DELETED")
        return {"return": ""}


async def _connected(socket: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    try:
        return await asyncio.open_unix_connection(socket, limit=LINE_MAX)
    except OSError:  # it is not there yet, or nobody listens on it yet
        return None


def _say_on_stdout(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _end_with_parent() -> None:
    """blockd ends when the machine is killed, as it would if it were a part of it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(words: Sequence[str]) -> int:
    if "format=help" in words:
        from blockd.drivers.table import DRIVERS  # noqa: PLC0415  (it takes a while, and a machine has no use for it)

        names = " ".join(sorted(DRIVERS))
        print(f"Supported formats: {names}\nSupported formats (read-only): {names}")
        return 0
    if "help" in words:
        print("\n".join(GUEST_DEVICES))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(Machine(Options.parse(words), Path(folder)).run())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
