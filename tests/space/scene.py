"""Disks of every pattern, images over them, and a daemon that serves these."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from blockd.cli.image.create import create_image
from blockd.units import MIB
from tests.daemon_process import DaemonProcess
from tests.qemu_img import assert_same
from tests.qmp_client import QmpClient
from tests.space.drawing import (
    FILESYSTEM_LENGTH,
    PATTERNS,
    SIZE,
    Pattern,
    Shape,
    Space,
    by_qemu,
    data_file,
)

DIRECT, CACHED = ("-m", "blockd.cli.daemon"), ("-m", "tests.space.cached_daemon")
# Slow enough to be cut off in the middle.
SPEED = 32 * MIB


class Case(NamedTuple):
    """What kind of image is made, where, and by which program."""

    shape: Shape
    place: str
    program: tuple[str, str]

    def __str__(self) -> str:
        return f"{self.shape}-{self.place}-{'direct' if self.program is DIRECT else 'cached'}"


class Disk:
    """A source, and an image over it; not on the same filesystem, where zeroes might be shared."""

    def __init__(self, name: str, source: Path, folder: Path, pattern: Pattern, shape: Shape) -> None:
        self.name = name
        self.pattern = pattern
        self.shape = shape
        self.source, self.image = source, folder / f"{name}.{shape.image_format}"
        pattern.write(source)

    async def make_image(self) -> None:
        if self.shape.image_format == "add-cow":
            data_file(self.image).touch()
            data_file(self.image).open("r+b").truncate(SIZE)
        await create_image(str(self.image), self.shape.new_image(self.image, self.source))

    def require_small(self, *, tables_length: int | None = None, gap_length: int = 0) -> None:
        """The image takes what it needs: data, what QEMU has besides, and `tables_length` of tables.

        Its file may be longer by `gap_length`, which takes no space.
        """
        shape = self.shape
        if shape.image_format == "add-cow":
            taken = Space.of(data_file(self.image), "raw").taken
            assert taken <= self.pattern.length(shape.cluster_size) + FILESYSTEM_LENGTH
            return
        other = self.image.with_suffix(".qemu")
        limit = by_qemu(self.source, other, shape)
        limit += shape.tables_length if tables_length is None else tables_length
        other.unlink()
        space = Space.of(self.image, shape.image_format)
        assert space.leaks == 0, self.pattern
        length = max(space.length, space.end) - gap_length
        assert max(length, space.taken - FILESYSTEM_LENGTH) <= limit, (
            f"{self.pattern}: {space}: more than {limit} bytes"
        )

    def require_same_content(self) -> None:
        if self.shape.image_format == "add-cow":
            assert data_file(self.image).read_bytes() == self.source.read_bytes()
        else:
            assert_same(self.source, "raw", self.image, self.shape.image_format)


class Scene:
    """A disk of every pattern, and a daemon that serves them."""

    def __init__(self, sources: Path, folder: Path, case: Case) -> None:
        self.folder = folder
        self.case = case
        self.disks = [
            Disk(f"vd{number}", sources / f"source{number}.raw", folder, pattern, case.shape)
            for number, pattern in enumerate(PATTERNS)
        ]

    async def make_images(self) -> None:
        for disk in self.disks:
            await disk.make_image()

    def daemon(self, *options: str, on_sources: bool = False) -> DaemonProcess:
        images = {disk.name: disk.source if on_sources else disk.image for disk in self.disks}
        devices = [word for name, image in images.items() for word in ("--device", f"{name}={image}")]
        paths = [word for disk in self.disks for word in ("--image-paths", disk.source.parent)]
        return DaemonProcess(self.folder, *devices, *paths, *options, program=self.case.program)

    def require_small(self, *, gap_length: int = 0) -> None:
        for disk in self.disks:
            disk.require_small(gap_length=gap_length)

    def require_same_content(self) -> None:
        for disk in self.disks:
            disk.require_same_content()

    # -- with a daemon ------------------------------------------------------------------------

    async def stream_to_end(self, client: QmpClient) -> None:
        for disk in self.disks:
            await client.command("block_stream", device=disk.name)
        for disk in self.disks:
            await client.event("BLOCK_STREAM_COMPLETED", device=disk.name)

    async def stream_half(self, client: QmpClient) -> list[str]:
        """Stream until some of each is copied, and more is not; tells which have not ended yet."""
        for disk in self.disks:
            await client.command("block_stream", device=disk.name, speed=SPEED)
        while True:
            running = await client.command("block_stream_status")
            assert running, "what is copied slowly takes a while"
            if min(status["offset"] for status in running) > SIZE // 8:
                return [status["device"] for status in running]


@asynccontextmanager
async def connected(daemon: DaemonProcess) -> AsyncIterator[QmpClient]:
    async with daemon, await daemon.qmp() as client:
        yield client
