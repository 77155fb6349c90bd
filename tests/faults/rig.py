"""A guest and a stream on files that fail: the N-th operation of one kind, once or from then on."""

import errno
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from blockd.block.file_events import FileEvent
from blockd.block.node import BlockNode, OverlayNode
from blockd.block.root import Root
from blockd.errors import StorageError
from blockd.filters.fault_rules import Fault, FaultRules, IoType, Rule, StateRule
from blockd.filters.faults import FaultsNode
from blockd.formats.raw.image import RawImage
from blockd.jobs.job import OnError
from blockd.jobs.manager import JobManager
from blockd.jobs.stream import StreamJob
from tests.chains import read_all
from tests.guest import Guest, RootDisk
from tests.model import ModelDisk, drawn
from tests.recording import RecordingFile
from tests.streaming import Observer, Streaming, check, open_overlay, overlay

CLUSTER = 512


@dataclass(frozen=True)
class Site:
    """A kind of operation that can fail, in one of the two files."""

    event: FileEvent
    io_type: IoType
    file: str = "active"

    def __str__(self) -> str:
        return f"{self.io_type} at {self.event} of the {self.file}"


class CountingRules(FaultRules):
    """Counts the faults that were met."""

    fault_count = 0

    def take(self, io_type: IoType, offset: int = 0, length: int = 0) -> Fault:
        fault = super().take(io_type, offset, length)
        self.fault_count += fault.errno != 0
        return fault


class NthRules(CountingRules):
    """Fail the `number`-th operation of a kind."""

    def __init__(self, site: Site, number: int, code: int, *, once: bool) -> None:
        rule = Rule(site.event, Fault(code), state=number, io_types=frozenset({site.io_type}), once=once)
        counting = [StateRule(site.event, state + 1, state) for state in range(1, number)]
        super().__init__([rule], states=counting)


def nth(site: Site, number: int, code: int = errno.EIO, *, once: bool = True) -> dict[str, object]:
    """The same as options of the driver."""
    error = {"event": site.event, "iotype": site.io_type, "state": number, "errno": code, "once": once}
    counting = [{"event": site.event, "state": state, "new_state": state + 1} for state in range(1, number)]
    return {"inject-error": [error], "set-state": counting}


@dataclass
class Rig:
    """One disk with a guest, whose files fail by `rules`."""

    disk: Streaming
    rules: CountingRules
    observer: Observer
    model: ModelDisk
    base: BlockNode
    recording: RecordingFile
    faults: FaultsNode
    base_faults: FaultsNode
    cluster_size: int = CLUSTER
    guest: Guest = field(init=False)
    errors: list[StorageError] = field(default_factory=list)

    def __post_init__(self) -> None:
        disk = RootDisk(self.disk.root)
        self.guest = Guest(disk, self.model, random.Random(0), cluster_size=self.cluster_size)

    # -- what a guest does, which may fail ------------------------------------------------------

    async def write(self, first: float, count: float) -> None:
        await self._attempt(self.guest.write, first, count)

    async def zero(self, first: float, count: float) -> None:
        await self._attempt(self.guest.zero, first, count)

    async def discard(self, first: float, count: float) -> None:
        await self._attempt(self.guest.discard, first, count)

    async def _attempt(
        self, change: Callable[[int, int], Awaitable[None]], first: float, count: float
    ) -> None:
        offset, length = int(first * self.cluster_size), int(count * self.cluster_size)
        try:
            await self.guest.read(offset, length)  # settles what an earlier failure left open
            await change(offset, length)
        except StorageError as error:
            self.errors.append(error)

    async def read(self, first: float, count: float) -> None:
        try:
            await self.guest.read(int(first * self.cluster_size), int(count * self.cluster_size))
        except StorageError as error:
            self.errors.append(error)

    async def flush(self) -> None:
        try:
            await self.guest.flush()
        except StorageError as error:
            self.errors.append(error)

    async def resize(self, cluster_count: int) -> None:
        """Grow, a second time if it fails once."""
        self.model.begin_resize(cluster_count * self.cluster_size)
        for _ in range(2):
            try:
                async with self.disk.root.request() as node:
                    await node.resize(cluster_count * self.cluster_size)
                break
            except StorageError as error:
                self.errors.append(error)
        self.model.finish_resize()

    # -- streams ----------------------------------------------------------------------------------

    async def start(self, on_error: OnError) -> StreamJob:
        return await self.disk.start(None, on_error=on_error)

    @property
    def job_errors(self) -> list[str]:
        return [told for told in self.observer.told if " error: " in told]

    @property
    def has_failed_job(self) -> bool:
        return "failed" in self.observer.told

    # -- looking ----------------------------------------------------------------------------------

    def mend(self) -> None:
        """The fault is gone."""
        self.faults.rules = FaultRules()
        self.base_faults.rules = FaultRules()

    async def assert_valid(self) -> None:
        """The file as it is now, after a SIGKILL say, is an image without corruption."""
        report = await check(self.recording.again())
        assert report.corruptions == 0, report.findings[:5]

    async def assert_durable(self) -> None:
        """After a flush the file alone, opened again, holds what the guest wrote."""
        again = await self.open_again(read_only=True)
        assert await read_all(again) == self.model.content

    async def open_again(self, *, read_only: bool) -> OverlayNode:
        """Open the file as it is on the disk, in a new life."""
        image = await open_overlay(self.recording.again(), None, read_only=read_only)
        image.backing = self.base if image.backing_filename else None
        return image


@asynccontextmanager
async def rig(
    site: Site,
    number: int,
    code: int,
    *,
    once: bool,
    cluster_count: int,
    image_format: str = "qcow2",
    cluster_size: int = CLUSTER,
    options: Mapping[str, Any] | None = None,
) -> AsyncIterator[Rig]:
    """An image that was used and closed before, on which a kind of operation is going to fail.

    `cluster_size` is what is allocated at a time, `options` may say otherwise of clusters.
    """
    content = drawn(["B" * cluster_count], cluster_size)
    recording = RecordingFile()
    base_file = RecordingFile(content, "base.raw")
    plain_base = await RawImage.open(base_file, node_name="base", read_only=True)
    made_with = {"cluster_size": cluster_size, "image_format": image_format, **(options or {})}
    image = await overlay(recording, plain_base, len(content), **made_with)
    model = ModelDisk(content)
    used = Guest(RootDisk(Root(image)), model, random.Random(0), cluster_size=cluster_size)
    await used.write(5 * cluster_size, 2 * cluster_size)
    await used.write(cluster_size * cluster_count // 2, cluster_size)
    await used.flush()
    await image.close()

    faults = FaultsNode(recording, FaultRules(), node_name="f")
    base_faults = FaultsNode(base_file, FaultRules(), node_name="b")
    base = await RawImage.open(base_faults, node_name="base", read_only=True)
    observer = Observer()
    async with JobManager(observer) as jobs:
        disk = Streaming(await open_overlay(faults, base), jobs)
        rules = NthRules(site, number, code, once=once)
        (faults if site.file == "active" else base_faults).rules = rules
        yield Rig(disk, rules, observer, model, base, recording, faults, base_faults, cluster_size)
