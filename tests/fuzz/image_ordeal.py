"""What a hostile image goes through: checked, repaired, looked at, read, written, streamed into.

Whatever happens has to be one of blockd's own errors, which names the file and what in it is wrong; and no
answer may take long.
"""

import asyncio
import logging
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from blockd.block.node import BlockNode, OverlayNode
from blockd.drivers import FORMATS, NodeGraph
from blockd.errors import BlockdError
from blockd.formats.check_report import Repair
from blockd.jobs.states import JobStatus
from blockd.protocols.file import FileNode
from blockd.units import KIB, MIB, SECTOR_SIZE, align_up
from tests.descriptors import open_files
from tests.fuzz.image_arena import Arena
from tests.fuzz.image_seeds import BASE
from tests.streaming import streaming

T = TypeVar("T")

_ENDED = (JobStatus.CONCLUDED, JobStatus.NULL)

MAP_COUNT, READ_LENGTH, READ_COUNT = 64, 128 * KIB, 24
# So often the loop goes round for a stream; what is not done then is cancelled.
STREAM_ROUNDS = 400
MESSAGE_LENGTH_MAX = 8 * KIB
# What the image may take of the disk, wherever its tables lead.
SPACE_MAX = 256 * MIB
_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")
_NAMES = re.compile(r"'[^']*'")
# Fields and structures of images, at least one of which every error names.
_FIELDS = re.compile(
    r"header|version|feature|encrypt|cluster|refcount|table|snapshot|bitmap|compression|the map|metadata"
    r"|image size|image file|image format|backing|marked corrupt|is not an? \S+ (image|file)"
)


@dataclass
class Figures:
    """What was seen."""

    images: int = 0
    answers: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest: str = ""


class Ordeal:
    """One image after the other."""

    def __init__(self, arena: Arena, figures: Figures) -> None:
        self._arena = arena
        self._figures = figures
        self._logged = _Logged()
        logging.getLogger("blockd").addHandler(self._logged)
        logging.getLogger("asyncio").addHandler(self._logged)
        logging.getLogger("blockd").propagate = False

    async def survive(
        self, image_format: str, content: bytes, length: int, random: Random, told: str
    ) -> None:
        """Put an image through everything.

        Raises:   Exception: something that must not happen, whatever the image.
        """
        self._told = told
        before = open_files()
        is_as_put = False
        for step, changes in _STEPS:
            if not is_as_put:
                self._arena.put(content, length)
            try:
                await step(self, image_format, random)
            except BlockdError as error:
                self._judge(error)
            assert self._arena.disk.stat().st_blocks * 512 < SPACE_MAX, f"{step.__name__} fills the disk"
            is_as_put = not changes
            assert changes or self._is_as_put(content, length), f"{step.__name__} changed the image"
        assert open_files() <= before, "a file stayed open"
        assert not self._logged.errors, self._logged.errors
        self._figures.images += 1

    def _is_as_put(self, content: bytes, length: int) -> bool:
        with self._arena.disk.open("rb") as file:
            return file.read(len(content)) == content and file.seek(0, os.SEEK_END) == length

    def _judge(self, error: BlockdError) -> None:
        """Is it an error that helps?"""
        message = error.message
        assert any(name in message for name in (str(self._arena.disk), BASE)), f"names no file: {message}"
        assert _FIELDS.search(_NAMES.sub("", message)), f"names no field: {message}"
        assert message.isprintable() and len(message) < MESSAGE_LENGTH_MAX, message
        self._figures.errors[_NAMES.sub("'…'", _NUMBERS.sub("#", message))[:120]] += 1

    async def answer(self, awaitable: Awaitable[T]) -> T:
        """Wait for one answer, and keep the time."""
        began = time.process_time()
        try:
            return await awaitable
        finally:
            self._took(time.process_time() - began)

    def _took(self, seconds: float) -> None:
        self._figures.answers += 1
        if seconds > self._figures.slowest_s:
            self._figures.slowest_s, self._figures.slowest = seconds, self._told

    # -- steps --------------------------------------------------------------------------------

    @asynccontextmanager
    async def _file(self, *, read_only: bool) -> AsyncIterator[FileNode]:
        file = await FileNode.open(str(self._arena.disk), node_name="file", read_only=read_only)
        try:
            yield file
        finally:
            await file.close()

    @asynccontextmanager
    async def _image(self, image_format: str, *, read_only: bool) -> AsyncIterator[BlockNode]:
        graph = NodeGraph()
        path = str(self._arena.disk)
        try:
            yield await self.answer(graph.open_image(path, image_format, read_only=read_only))
        finally:
            await self.answer(graph.close())

    async def check(self, image_format: str, random: Random) -> None:
        check = FORMATS[image_format].check
        if check is not None:
            async with self._file(read_only=True) as file:
                report = await self.answer(check(file))
            assert all(str(finding).isprintable() for finding in report.findings)

    async def repair(self, image_format: str, random: Random) -> None:
        repair = FORMATS[image_format].repair
        if repair is not None and not random.randrange(4):  # one costs as much as all else
            async with self._file(read_only=False) as file:
                await self.answer(repair(file, random.choice([Repair.LEAKS, Repair.ALL, Repair.ALL])))

    async def read(self, image_format: str, random: Random) -> None:
        async with self._image(image_format, read_only=True) as image:
            info = FORMATS[image_format].info
            if info is not None:
                info(image)
            wanted = [0, max(0, image.size - READ_LENGTH)]
            offset = 0
            for _ in range(MAP_COUNT):
                if offset >= image.size:
                    break
                for extent in await self.answer(image.map(offset, image.size - offset)):
                    wanted.append(extent.offset)
                    offset = extent.offset + extent.length
            for start in wanted[:READ_COUNT]:
                await self._read(image, start, min(READ_LENGTH, image.size - start))

    async def _read(self, image: BlockNode, offset: int, length: int) -> None:
        if length <= 0:
            return
        try:
            if image.read_nowait(offset, length) is None:
                data = await self.answer(image.read(offset, length))
                assert len(data) == length
        except BlockdError as error:
            self._judge(error)

    async def write(self, image_format: str, random: Random) -> None:
        async with self._image(image_format, read_only=False) as image:
            for _ in range(12):
                offset = random.randrange(
                    max(1, min(image.size, random.choice([4 * KIB, 256 * KIB, 1 << 62])))
                )
                length = min(random.choice([1, 512, 5000, 64 * KIB]), image.size - offset)
                if length > 0:
                    await self._change(image, offset, length, random.randrange(8))
            await self._change(image, align_up(image.size + 64 * KIB, SECTOR_SIZE), 0, 8)

    async def _change(self, image: BlockNode, offset: int, length: int, what: int) -> None:
        try:
            if what < 4:
                data = b"w" * length
                if not image.write_nowait(offset, data):
                    await self.answer(image.write(offset, data))
            elif what < 6:
                await self.answer(image.write_zeroes(offset, length, unmap=what == 4))
            elif what < 7:
                await self.answer(image.discard(offset, length))
            elif what < 8:
                await self.answer(image.flush())
            else:
                await self.answer(image.resize(offset))
        except BlockdError as error:
            self._judge(error)

    async def stream(self, image_format: str, random: Random) -> None:
        """A stream to nothing, with a guest beside it; cancelled when it takes long."""
        async with self._image(image_format, read_only=False) as image:
            if not isinstance(image, OverlayNode):
                return
            async with streaming(image) as disk:
                job = await disk.start()
                for turn in range(STREAM_ROUNDS):
                    if job.status in _ENDED:
                        break
                    if turn % 50 == 10 and image.size:
                        await self._read(disk.root.node, 0, min(image.size, 4 * KIB))
                    await self.answer(asyncio.sleep(0))
            if isinstance(job.error, BlockdError):
                self._judge(job.error)


_Step = Callable[[Ordeal, str, Random], Awaitable[None]]
# And whether the image may be another one afterwards.
_STEPS: list[tuple[_Step, bool]] = [
    (Ordeal.check, False),
    (Ordeal.read, False),
    (Ordeal.write, True),
    (Ordeal.stream, True),
    (Ordeal.repair, True),
]


class _Logged(logging.Handler):
    """What was logged with a traceback: exceptions that nobody has expected."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []
        self.setFormatter(logging.Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.errors.append(self.format(record))
