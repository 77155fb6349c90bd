"""One disk over files that are not in the page cache, under several guests at once, compared with a model.

Caches hold two tables, threads finish in any order, and some requests are cancelled at any moment. Guests use
a few windows of the disk, each across the border of two tables, so that every request is about
tables that others want as well. Everything follows from the seed.
"""

import asyncio
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockd.block.housekeeping import Housekeeping
from blockd.block.node import BlockNode, OverlayNode
from blockd.extents import Kind
from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.raw.image import RawImage
from blockd.jobs.states import JobStatus
from blockd.jobs.stream import StreamJob
from blockd.units import KIB, MIB
from tests import qemu_img
from tests.cold_file import ColdFile, coldness, hold_few_tables
from tests.crash.scene import small_pieces
from tests.crash.variants import past_disk
from tests.inline_threads import steps
from tests.model_oracle import Oracle
from tests.planted_leaks import plant_leaks, searched_in_small_steps
from tests.scheduled_threads import RandomThreads, scheduled
from tests.streaming import Streaming, check, open_overlay, overlay, streaming

GUEST_COUNT = 6
# How long a window is, in clusters or subclusters, on each side of a border.
WINDOW_UNITS = 12


@dataclass(frozen=True)
class Shape:
    """What images of a kind are made with, and how much of the disk one of their tables maps."""

    image_format: str
    unit: int
    table_span: int
    options: dict[str, Any] = field(default_factory=dict)


SHAPES: dict[str, Shape] = {
    "qcow2": Shape("qcow2", 512, 32 * KIB, {"cluster_size": 512}),
    "qcow2 of 4 KiB": Shape("qcow2", 4 * KIB, 2 * MIB, {"cluster_size": 4 * KIB}),
    "version 2": Shape("qcow2", 512, 32 * KIB, {"cluster_size": 512, "compat": "0.10"}),
    "64-bit refcounts": Shape("qcow2", 512, 32 * KIB, {"cluster_size": 512, "refcount_bits": 64}),
    "extended L2": Shape("qcow2", 512, 16 * MIB, {"cluster_size": 16 * KIB, "extended_l2": True}),
    # QEMU opens no image with a table size of 1.
    "QED": Shape("qed", 4 * KIB, 4 * MIB, {"cluster_size": 4 * KIB, "table_size": 2}),
    "add-cow": Shape("add-cow", 4 * KIB, 128 * MIB, {"cluster_size": 4 * KIB}),
}
TABLE_COUNT = 4
# How many images may be below the active one.
LAYER_COUNT_MAX = 4


class ModelLife:
    """One image from its making to its end."""

    def __init__(
        self,
        seed: int,
        shape_name: str,
        *,
        cold_share: float,
        has_backing: bool = False,
        has_snapshot: bool = False,
        has_leaks: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.shape = SHAPES[shape_name]
        self.unit = self.shape.unit
        self.size = TABLE_COUNT * self.shape.table_span
        reach = self.reach = min(WINDOW_UNITS * self.unit, self.shape.table_span // 2)
        borders = range(self.shape.table_span, self.size, self.shape.table_span)
        windows = [range(border - reach, border + reach) for border in borders]
        self.oracle = Oracle([*windows, range(self.size - reach, self.size)])
        self.has_backing = has_backing
        self.has_snapshot = has_snapshot
        # Whether each round begins with leaks, which are looked for beside the guests.
        self.has_leaks = has_leaks
        # What the internal snapshot holds, by window.
        self.snapshot: dict[int, bytes] = {}
        self.would_wait = coldness(random.Random(seed), cold_share)
        self.counts: Counter[str] = Counter()
        self.base: BlockNode | None = None
        # The backing while it is away.
        self.attached: BlockNode | None = None
        self.file: ColdFile
        self.disk: Streaming
        self.job: StreamJob | None = None
        self.left = 0
        # What active images record, and what is open for it; the images below the active one never change.
        self.below: dict[str | None, BlockNode] = {}
        self.files_below: list[ColdFile] = []

    async def live(self, operation_count: int) -> None:
        """Let guests and an operator do so much; then everything is compared.

        Raises:   AssertionError: something is not as it should be; says the seed.
        """
        with ExitStack() as stack:
            stack.enter_context(scheduled(RandomThreads(self.rng)))
            stack.enter_context(small_pieces(4 * self.unit))
            if self.has_leaks:
                stack.enter_context(searched_in_small_steps())
            await self._build()
            if self.has_snapshot:
                await self._take_snapshot()
            while operation_count > 0:
                self.left = min(operation_count, 400)
                operation_count -= self.left
                await self._round()
        self.counts["lives"] += 1

    # -- building -----------------------------------------------------------------------------

    async def _build(self) -> None:
        if self.has_backing:
            base = ColdFile("base.raw", self.would_wait)
            for start, content in self.oracle.content.items():
                content[:] = self.rng.randbytes(len(content))
                if self.rng.random() < 0.5:
                    content[: len(content) // 4] = bytes(len(content) // 4)
                base.write_blocking(start, content)
            if self.rng.random() < 0.5:  # longer than the disk: what is behind its end never shows
                base.write_blocking(self.size, self.rng.randbytes(2 * self.reach))
            self.files_below.append(base)
            self.base = await RawImage.open(base, node_name="base", read_only=True)
            self.below["base.raw"] = self.base
        self.file = self._new_file("active")
        image_format = self.shape.image_format
        await overlay(self.file, self.base, self.size, image_format=image_format, **self.shape.options)

    def _new_file(self, name: str) -> ColdFile:
        file = ColdFile(name, self.would_wait)
        if self.shape.image_format == "add-cow":
            file.beside = ColdFile(f"{name}.data", self.would_wait)
        return file

    async def _take_snapshot(self) -> None:
        """Have QEMU take an internal snapshot of what a first round has left."""
        self.left = 60
        await self._round()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "i.qcow2"
            path.write_bytes(self.file.content)
            for file in self.files_below:
                path.with_name(file.filename).write_bytes(file.content)
            qemu_img.qemu("qemu-img", "snapshot", "-c", "s", path)
            self.file = ColdFile("active", self.would_wait, path.read_bytes())
        self.snapshot = {start: bytes(content) for start, content in self.oracle.content.items()}

    async def _open(self, file: ColdFile, *, read_only: bool = False) -> OverlayNode:
        image = await open_overlay(file, None, read_only=read_only)
        image.backing = self.below.get(image.backing_filename)
        hold_few_tables(image)
        return image

    # -- a round: open, use, close, compare -----------------------------------------------------

    async def _round(self) -> None:
        if self.has_leaks:
            self.counts["leaks"] += plant_leaks(self.file, self.rng)
        active = await self._open(self.file)
        search = active.begin_housekeeping() if isinstance(active, Housekeeping) else None
        searching = None if search is None else asyncio.ensure_future(search())
        async with streaming(active) as self.disk:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(GUEST_COUNT):
                    tasks.create_task(self._guest(random.Random(self.rng.getrandbits(32))))
                tasks.create_task(self._operator(random.Random(self.rng.getrandbits(32))))
            await self._end_stream()
            await self._attach()
            await self._compare(self.disk.root.top, self.oracle)
            if is_cut_short := searching is not None and self.rng.random() < 0.2:
                self.counts["searches cut short"] += 1
            elif searching is not None:
                await searching
        await self.disk.active.close()
        # Free clusters inside a QED file are leaks: it has no list of them.
        may_leak = is_cut_short or self.shape.image_format == "qed" or self._is_suspect()
        await self._check(self.file, leaks=None if may_leak else 0)
        await self._compare(await self._open(self.file.again(), read_only=True), self.oracle)
        self.counts["reopened"] += 1

    def _is_suspect(self) -> bool:
        """Whether guests have overwritten what a snapshot shares too often for its leaks to be told."""
        active = self.disk.active
        is_suspect = isinstance(active, Qcow2Image) and active.metadata.is_suspect
        self.counts["suspect"] += is_suspect
        assert self.has_snapshot or not is_suspect
        return is_suspect

    async def _compare(self, node: BlockNode, oracle: Oracle) -> None:
        for start, content in oracle.content.items():
            found = bytearray(await node.read(start, len(content)))
            for low, high in oracle.busy:
                if start <= low < start + len(content):
                    found[low - start : high - start] = content[low - start : high - start]
            oracle.compare(start, start, bytes(found))

    async def _check(self, file: ColdFile, *, leaks: int | None = None) -> None:
        report = await check(file.again())
        assert not report.corruptions, report.findings
        assert leaks is None or report.leaks <= leaks, report.findings
        if self.snapshot:
            past = ColdFile("past", self.would_wait, past_disk(file.content))
            image = await self._open(past, read_only=True)
            for start, content in self.snapshot.items():
                assert bytes(await image.read(start, len(content))) == content, "the snapshot has changed"

    # -- guests -------------------------------------------------------------------------------

    async def _guest(self, rng: random.Random) -> None:
        while self.left > 0:
            kind = rng.choices(KINDS, cum_weights=KIND_WEIGHTS)[0]
            if await REQUESTS[kind](self, rng):
                self.left -= 1
                self.counts[kind] += 1
            else:
                await asyncio.sleep(0)  # others were there: they have to come to their end

    async def _read(self, rng: random.Random) -> bool:
        window, offset, length = self.oracle.pick(rng, self.unit)
        if not length:
            return False
        data = self.disk.root.node.read_nowait(offset, length)
        if data is None:
            self.oracle.busy.append((offset, offset + length))
            async with self.disk.root.request() as node:
                data = await node.read(offset, length)
            self.oracle.busy.remove((offset, offset + length))
        self.oracle.compare(window, offset, bytes(data))
        return True

    async def _write(self, rng: random.Random) -> bool:
        window, offset, length = self.oracle.pick(rng, self.unit)
        data = rng.randbytes(length)
        if length and self.disk.root.node.write_nowait(offset, data):
            self.oracle.settle(window, offset, data)
        elif length:
            await self._change(rng, window, offset, data, lambda node: node.write(offset, data))
        return bool(length)

    async def _zero(self, rng: random.Random) -> bool:
        window, offset, length = self.oracle.pick(rng, self.unit)
        if length:
            unmap = rng.random() < 0.6
            await self._change(
                rng,
                window,
                offset,
                bytes(length),
                lambda node: node.write_zeroes(offset, length, unmap=unmap),
            )
        return bool(length)

    async def _discard(self, rng: random.Random) -> bool:
        window, offset, length = self.oracle.pick(rng, self.unit)
        if length:
            await self._change(
                rng, window, offset, bytes(length), lambda node: node.discard(offset, length), is_sure=False
            )
        return bool(length)

    async def _change(
        self,
        rng: random.Random,
        window: int,
        offset: int,
        data: bytes,
        call: Callable[[BlockNode], Any],
        *,
        is_sure: bool = True,
    ) -> None:
        """Have a request made, and now and then cancel it at any moment."""
        taken = (offset, offset + len(data))
        self.oracle.busy.append(taken)
        try:
            if rng.random() < 0.05:
                is_sure = await self._cancelled(rng, call) and is_sure
            else:
                async with self.disk.root.request() as node:
                    await call(node)
            if is_sure:
                self.oracle.settle(window, offset, data)
            else:
                self.oracle.unsettle(offset, data)
        finally:
            self.oracle.busy.remove(taken)

    async def _cancelled(self, rng: random.Random, call: Callable[[BlockNode], Any]) -> bool:
        """Cancel a request after some turns of the loop; tells whether it was done before."""

        async def request() -> None:
            async with self.disk.root.request() as node:
                await call(node)

        task = asyncio.create_task(request())
        await steps(int(rng.random() * 40))
        task.cancel()
        await asyncio.wait([task])
        self.counts["cancelled"] += task.cancelled()
        if not task.cancelled():
            task.result()
        return not task.cancelled()

    async def _flush(self, rng: random.Random) -> bool:
        if rng.random() < 0.2:
            await self._cancelled(rng, lambda node: node.flush())
        else:
            async with self.disk.root.request() as node:
                await node.flush()
        return True

    # -- the operator -------------------------------------------------------------------------

    async def _operator(self, rng: random.Random) -> None:
        while self.left > 0:
            await steps(int(rng.random() * 60))
            choice = rng.random()
            if self.job is not None and self.job.status is JobStatus.NULL:
                self.job = None
            can_stream = self.disk.active.backing is not None and not self.has_snapshot
            if choice < 0.1 and self.job is None and can_stream:
                self.job = await self.disk.start(None)
                self.counts["streams"] += 1
            elif choice < 0.13 and self.job is not None and self.job.can_be_cancelled:
                self.job.cancel()
            elif choice < 0.16:
                await self._look_from_outside()
            elif choice < 0.26 and self.job is None and self.disk.root.top is self.disk.active:
                await self._change_disk(rng)

    async def _change_disk(self, rng: random.Random) -> None:
        """Do what the operator does to the disk itself, under its guests."""
        if self.oracle.hidden is not None:
            await self._attach()
        elif (choice := rng.random()) < 0.3:
            await self._grow()
        elif choice < 0.6 and self.disk.active.backing is not None:
            await self._detach()
        elif not self.has_snapshot and len(self.below) < LAYER_COUNT_MAX:
            await self._switch()

    async def _grow(self) -> None:
        if self.disk.active.size >= 2 * self.size:
            return
        async with self.disk.root.drained():
            before = self.disk.active.size
            size = before + self.shape.table_span
            await self.disk.active.resize(size)
            self.oracle.grow([range(before, before + self.reach), range(size - self.reach, size)])
        self.counts["grown"] += 1

    async def _switch(self) -> None:
        """Go on in a new overlay."""
        old, file = self.disk.active, self._new_file(f"active{self.counts['switched']}")
        options = {
            "image_format": self.shape.image_format,
            "backing_format": old.driver,
            **self.shape.options,
        }
        fresh = await overlay(file, old, old.size, **options)
        hold_few_tables(fresh)
        self.below[self.file.filename] = old
        self.files_below.append(self.file)
        await self.disk.switch(fresh)
        self.file = file
        self.counts["switched"] += 1

    async def _detach(self) -> None:
        """Take the backing away, as blockdev-reopen does: what is not in the image reads as zeroes."""
        async with self.disk.root.drained():
            active = self.disk.active
            for window in self.oracle.windows:
                self.oracle.find_out(window, bytes(await active.read(window.start, len(window))))
            self.oracle.detach()
            for window in self.oracle.windows:
                offset = window.start
                while offset < window.stop:
                    for extent in await active.map(offset, window.stop - offset):
                        if extent.kind is Kind.UNALLOCATED:
                            self.oracle.hide(window.start, extent.offset, extent.length)
                        offset = extent.end
            self.attached, active.backing = active.backing, None
        self.counts["detached"] += 1

    async def _attach(self) -> None:
        if self.oracle.hidden is not None:
            async with self.disk.root.drained():
                self.disk.active.backing = self.attached
                self.oracle.attach()

    async def _end_stream(self) -> None:
        if self.job is not None:
            if self.rng.random() < 0.7 and self.job.can_be_cancelled:
                self.job.cancel()
            await self.job.wait_ended()
            assert self.job.error is None, self.job.error
            self.job = None

    async def _look_from_outside(self) -> None:
        """What a kill would leave, right after a flush with nothing in flight, is what guests wrote."""
        async with self.disk.root.drained():
            await self.disk.root.top.flush()
            file, oracle, is_detached = self.file.again(), self.oracle.copy(), self.oracle.hidden is not None
        await self._check(file)
        image = await self._open(file, read_only=True)
        if is_detached:
            image.backing = None
        await self._compare(image, oracle)
        self.counts["killed"] += 1


REQUESTS = {
    "read": ModelLife._read,
    "write": ModelLife._write,
    "zero": ModelLife._zero,
    "discard": ModelLife._discard,
    "flush": ModelLife._flush,
}
KINDS = list(REQUESTS)
KIND_WEIGHTS = [45, 83, 91, 96, 100]
