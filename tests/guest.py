"""A guest that does random things to a disk and never believes what it reads."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from blockd.block.node import Buffer
from blockd.block.root import Root
from blockd.units import SECTOR_SIZE
from tests.model import ModelDisk


class Disk(Protocol):
    """What a guest sees."""

    async def read(self, offset: int, length: int) -> bytes: ...
    async def write(self, offset: int, data: bytes) -> None: ...
    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None: ...
    async def discard(self, offset: int, length: int) -> None: ...
    async def flush(self) -> None: ...


class RootDisk:
    """A disk on a root, used as an export uses it: at once if that can be, else as a request."""

    def __init__(self, root: Root) -> None:
        self.root = root

    async def read(self, offset: int, length: int) -> bytes:
        data: Buffer | None = self.root.node.read_nowait(offset, length)
        if data is None:
            async with self.root.request() as node:
                data = await node.read(offset, length)
        return bytes(data)

    async def write(self, offset: int, data: bytes) -> None:
        if not self.root.node.write_nowait(offset, data):
            async with self.root.request() as node:
                await node.write(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        async with self.root.request() as node:
            await node.write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        async with self.root.request() as node:
            await node.discard(offset, length)

    async def flush(self) -> None:
        async with self.root.request() as node:
            await node.flush()
        self.root.lost_writes.report(self)


class Guest:
    """Random operations on one disk, each checked against the model.

    Several may run at the same time on one model: no two of them ever touch the same sector at once,
    as a file system would not, but they do meet in clusters.
    """

    def __init__(self, disk: Disk, model: ModelDisk, rng: random.Random, *, cluster_size: int) -> None:
        self.disk = disk
        self.model = model
        self.rng = rng
        self.cluster_size = cluster_size

    async def step(self) -> str:
        """Do one random thing; returns what, for the message of a failure."""
        kind = self.rng.choices(["read", "write", "zero", "discard", "flush"], weights=[8, 8, 3, 2, 1])[0]
        if kind == "flush":
            await self.flush()
            return kind
        offset, length = self._pick(aligned=kind != "write" or self.rng.random() < 0.7)
        if length == 0:
            return f"no room for a {kind}"
        self.model.busy.append((offset, offset + length))
        try:
            await getattr(self, kind)(offset, length)
        finally:
            self.model.busy.remove((offset, offset + length))
        return f"{kind} {offset:#x}+{length:#x}"

    def _pick(self, *, aligned: bool) -> tuple[int, int]:
        """A range that nobody else uses: whole clusters, a part of one, or across several."""
        size, cluster_size = self.model.size, self.cluster_size
        cluster_count = self.rng.choice([1, 1, 1, 2, 3])
        unit = cluster_size if self.rng.random() < 0.4 else SECTOR_SIZE
        offset = self.rng.randrange(0, size, unit)
        limit = min(cluster_count * cluster_size, size - offset)
        length = limit if unit == cluster_size else self.rng.randrange(0, limit, SECTOR_SIZE) + SECTOR_SIZE
        if not aligned and length > SECTOR_SIZE and not self.model.is_unsettled(offset, length):
            offset, length = offset + self.rng.randrange(1, SECTOR_SIZE), length - SECTOR_SIZE
        low, high = offset - offset % SECTOR_SIZE, offset + length
        high += -high % SECTOR_SIZE
        taken = any(start < high and low < end for start, end in self.model.busy)
        return (0, 0) if taken else (offset, length)

    async def read(self, offset: int, length: int) -> None:
        self.model.check_read(offset, await self.disk.read(offset, length))

    async def write(self, offset: int, length: int) -> None:
        data = self.model.new_data(offset, length)
        with self._changing(offset, data):
            await self.disk.write(offset, data)
        self.model.finish_write(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        data = bytes(length)
        with self._changing(offset, data):
            await self.disk.write_zeroes(offset, length, unmap=self.rng.random() < 0.7)
        self.model.finish_write(offset, data)

    async def discard(self, offset: int, length: int) -> None:
        with self._changing(offset, bytes(length)):
            await self.disk.discard(offset, length)
        self.model.finish_discard(offset, length)

    @contextmanager
    def _changing(self, offset: int, data: bytes) -> Iterator[None]:
        """Without an acknowledgement it may have been done, or not."""
        self.model.begin_write(offset, data)
        try:
            yield
        except BaseException:
            self.model.fail_write(offset, data)
            raise

    async def flush(self) -> None:
        durable = self.model.begin_flush()
        await self.disk.flush()
        self.model.finish_flush(durable)

    async def read_all(self) -> None:
        """Compare the whole disk."""
        step = 1 << 20
        for offset in range(0, self.model.size, step):
            await self.read(offset, min(step, self.model.size - offset))


async def churn(
    root: Root, model: ModelDisk, rng: random.Random, *, step_count: int, guest_count: int
) -> None:
    """Several guests at once do random things, then everything is compared."""
    disk, cluster_size = RootDisk(root), root.top.cluster_size

    async def live(seed: int) -> None:
        guest = Guest(disk, model, random.Random(seed), cluster_size=cluster_size)
        for _ in range(step_count // guest_count):
            await guest.step()

    async with asyncio.TaskGroup() as guests:
        for _ in range(guest_count):
            guests.create_task(live(rng.getrandbits(32)))
    await Guest(disk, model, rng, cluster_size=cluster_size).read_all()
