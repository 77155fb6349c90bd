"""The same scenario on qemu-storage-daemon and on blockd, and what each said, line for line.

A scenario is a list of steps: a request to send and have answered, or an event to wait for. What is read
meanwhile is the transcript. Masked are times, versions, generated names, the folder, sizes on the disk,
and how far a job is that is not at its end.
"""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockd.cli.options import parse_command_line
from blockd.daemon import Daemon
from tests.qsd import qsd

TIMEOUT_S = 100
LINE_MAX = 16 << 20
# Stands in requests for the folder that each of the two has for itself.
FOLDER = "FOLDER"
IMAGES = "images"
THE_END = "the connection ended"

Json = Any


@dataclass(frozen=True)
class Send:
    """Send a request as it is and read up to its reply."""

    request: str


@dataclass(frozen=True)
class Wait:
    """Read until there is an event that was not waited for yet."""

    event: str
    data: Mapping[str, Json]


@dataclass(frozen=True)
class UnderWay:
    """Ask, off the record, until a job has done its first piece: a slow one then waits for its rate."""

    job_id: str


Step = Send | Wait | UnderWay


def call(command: str, **arguments: Json) -> Send:
    """A request; dashes are written as underscores, and names with underscores end in one more."""
    names = {name: name[:-1] if name.endswith("_") else name.replace("_", "-") for name in arguments}
    given = {names[name]: value for name, value in arguments.items()}
    return Send(json.dumps({"execute": command} | ({"arguments": given} if given else {})))


def wait(event: str, **data: Json) -> Wait:
    return Wait(event, data)


@dataclass(frozen=True)
class Scenario:
    """What is done to both daemons, fresh ones, in a copy of the folder of images."""

    name: str
    steps: Sequence[Step]
    # Whether it is compared how far jobs are that are not at their end.
    compares_progress: bool = False

    @property
    def exchange_count(self) -> int:
        return sum(isinstance(step, Send) for step in self.steps)


@dataclass
class Talk:
    """One QMP session and all its lines."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    folder: Path
    compares_progress: bool
    lines: list[str] = field(default_factory=list)
    unseen: list[Json] = field(default_factory=list)
    last: Json = None

    async def run(self, steps: Sequence[Step]) -> list[str]:
        """Do all steps and return the transcript, masked; the end of the connection is its last line then."""
        await self.reader.readline()
        for step in [call("qmp_capabilities"), *steps]:
            match step:
                case Send(request):
                    self.writer.write(request.replace(FOLDER, str(self.folder)).encode())
                    alive = await self._until_reply()
                case Wait(event, data):
                    alive = await self._until_event(event, data)
                case UnderWay(job_id):
                    alive = await self._until_under_way(job_id)
            if not alive:
                self.lines.append(THE_END)
                break
        return self.lines

    async def _until_reply(self) -> bool:
        while message := await self._read():
            if "event" not in message:
                return True
        return False

    async def _until_event(self, name: str, data: Mapping[str, Json]) -> bool:
        while True:
            for event in self.unseen:
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    self.unseen.remove(event)
                    return True
            if not await self._read():
                return False

    async def _until_under_way(self, job_id: str) -> bool:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                self.writer.write(call("query-jobs").request.encode())
                if not await self._until_reply():
                    return False
                self.lines.pop()
                if any(job["id"] == job_id and job["current-progress"] for job in self.last["return"]):
                    return True
                await asyncio.sleep(0.01)

    async def _read(self) -> Json:
        async with asyncio.timeout(TIMEOUT_S):
            try:
                line = await self.reader.readline()
            except ConnectionError:
                line = b""
        if not line:
            return None
        self.last = message = json.loads(line)
        # Members have no order; QEMU's is that of a hash.
        self.lines.append(json.dumps(self._masked(message), sort_keys=True, ensure_ascii=False))
        if "event" in message:
            self.unseen.append(message)
        return message

    def _masked(self, message: Json) -> Json:
        shown = masked(message, self.folder)
        return shown if self.compares_progress else without_progress(shown)


_MASKED_MEMBERS = {"timestamp", "micro", "package", "actual-size"}
# What blockd says besides, and QEMU does not.
_MORE_MEMBERS = {"x-detail"}
# How far a job is, and where it ends.
_PROGRESS = {"offset": "len", "current-progress": "total-progress"}


def masked(value: Json, folder: Path) -> Json:
    """Take out what differs from run to run."""
    match value:
        case dict():
            members = {name: masked(value[name], folder) for name in value.keys() - _MORE_MEMBERS}
            return members | dict.fromkeys(value.keys() & _MASKED_MEMBERS, "…")
        case list():
            return [masked(element, folder) for element in value]
        case str():
            return re.sub(r"#block\d+", "#block…", value.replace(str(folder), FOLDER))
    return value


def without_progress(value: Json) -> Json:
    """Take out how far jobs are that are not at their end: with real files it is never twice the same."""
    match value:
        case dict():
            members = {name: without_progress(member) for name, member in value.items()}
            for name, end in _PROGRESS.items():
                if isinstance(value.get(end), int) and value[name] < value[end]:
                    members[name] = "…"
            return members
        case list():
            return [without_progress(element) for element in value]
    return value


@asynccontextmanager
async def blockd(folder: Path) -> AsyncIterator[Path]:
    """Run blockd in this process and yield the path of its QMP socket."""
    path = folder / "blockd.qmp"
    words = ["--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "c"]
    daemon, ready = Daemon(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(daemon.run(parse_command_line(words).config, lambda _: ready.set()))
        async with asyncio.timeout(TIMEOUT_S):
            await ready.wait()
        try:
            yield path
        finally:
            daemon.stop()


async def transcript(
    daemon: AbstractAsyncContextManager[Path], folder: Path, scenario: Scenario
) -> list[str]:
    """Run a scenario on one daemon."""
    async with daemon as path:
        reader, writer = await asyncio.open_unix_connection(path, limit=LINE_MAX)
        lines = await Talk(reader, writer, folder, scenario.compares_progress).run(scenario.steps)
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
        return lines


async def transcripts(scenario: Scenario, folder: Path) -> tuple[list[str], list[str]]:
    """Run a scenario on both, each with its own copy of the images in `folder`; theirs first."""
    theirs, ours = (copied(folder / IMAGES, folder / name) for name in ("theirs", "blockd"))
    return (
        await transcript(qsd(theirs), theirs, scenario),
        await transcript(blockd(ours), ours, scenario),
    )


def copied(images: Path, folder: Path) -> Path:
    """Copy a folder of images whose backing files are recorded by their whole path."""
    old, new = str(images).encode(), str(folder).encode()
    assert len(old) == len(new), "the paths stand in images and must be equally long"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(images, folder)
    for image in folder.glob("*.qcow2"):
        image.write_bytes(image.read_bytes().replace(old, new))
    return folder
