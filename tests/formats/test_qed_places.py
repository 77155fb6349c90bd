"""Copies into QED images that another process makes: where they go, and that nothing is free behind them."""

import asyncio
import math
import random
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockd.block.accounting import all_guests
from blockd.block.node import FillCounts
from blockd.block.segments import SourcePlan
from blockd.extents import Range
from blockd.formats.qed.allocator import Allocator, Run
from blockd.formats.qed.create import create
from blockd.formats.qed.image import QedImage
from blockd.formats.raw.image import RawImage
from blockd.protocols import copier
from blockd.protocols import file as file_module
from blockd.protocols.copier import Copier
from blockd.protocols.file import FileNode
from blockd.protocols.new_file import new_file
from blockd.units import KIB, MIB
from tests import qemu_img
from tests.chains import read_all
from tests.recording import RecordingFile

CLUSTER = 64 * KIB
FOLIO = FileNode.folio_length
FOLIO_CLUSTERS = FOLIO // CLUSTER
SIZE = 24 * MIB
# The header and the L1 table, an L2 table.
TABLES_LENGTH = 5 * CLUSTER + 4 * CLUSTER
DATA = random.Random(1).randbytes(SIZE)

pytestmark = pytest.mark.usefixtures("without_cloning")


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A copier for the test alone, while guests are at work, and writes that are never slow."""
    one = Copier()
    monkeypatch.setattr(copier, "copier", one)
    monkeypatch.setattr(copier, "START_TIMEOUT_S", 100.0)
    monkeypatch.setattr(all_guests, "last_ns", sys.maxsize)
    monkeypatch.setattr(file_module, "SLOW_WRITE_S", math.inf)
    yield
    for lane in one._lanes:
        lane.close()  # it ends then
    if one._attendant is not None:
        one._attendant.join()


@asynccontextmanager
async def opened(folder: Path, content: bytes) -> AsyncIterator[QedImage]:
    """An empty image over a raw one."""
    (folder / "base").write_bytes(content)
    async with new_file(str(folder / "image")) as new:
        await create(new, SIZE, backing_filename="base", backing_format="raw", cluster_size=CLUSTER)
    below = await FileNode.open(str(folder / "base"), node_name="below", read_only=True)
    file = await FileNode.open(str(folder / "image"), node_name="file", read_only=False)
    image = await QedImage.open(file, node_name="image", read_only=False)
    image.backing = await RawImage.open(below, node_name="base", read_only=True)
    try:
        yield image
    finally:
        await image.close()
        await file.close()
        await below.close()


async def fill(image: QedImage, *ranges: Range) -> FillCounts:
    source = SourcePlan(ranges[0][0], await image.plan_read(ranges[0][0], ranges[-1][1] - ranges[0][0]))
    return await image.fill(ranges, source, lambda *_: True)


def require_length(folder: Path, data_length: int) -> None:
    """The image is as long as its data and tables, and sound."""
    assert (folder / "image").stat().st_size == TABLES_LENGTH + data_length
    qemu_img.assert_sound(folder / "image", "qed")


def zeroed(*ranges: Range) -> bytes:
    content = bytearray(DATA)
    for start, end in ranges:
        content[start:end] = bytes(end - start)
    return bytes(content)


# -- copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("may_start", [True, False])
@pytest.mark.parametrize("zeroes", [[], [(0, 3 * CLUSTER)], [(5 * MIB, 13 * MIB)], [(16 * MIB, SIZE)]])
async def test_an_image_is_as_long_as_its_data_however_many_copies_there_are(
    tmp_path: Path, zeroes: list[Range], may_start: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether there is a process that copies, or it turns out only then that there is none."""
    if not may_start:
        monkeypatch.setattr(Copier, "start_blocking", lambda _: False)
    content = zeroed(*zeroes)
    zero_length = sum(end - start for start, end in zeroes)
    async with opened(tmp_path, content) as image:
        assert image.copies_apart
        step = 5 * MIB + CLUSTER
        counts = await asyncio.gather(
            *(fill(image, (start, min(start + step, SIZE))) for start in range(0, SIZE, step))
        )
        assert sum(count.copied for count in counts) == SIZE - zero_length
        assert sum(count.zeroed for count in counts) == zero_length
        assert await read_all(image) == content
        await image.flush()
    require_length(tmp_path, SIZE - zero_length)
    assert qemu_img.content(tmp_path / "image", "qed") == content


class HeldCopies:
    """Copies that the process is asked for only when they may be made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.may_go_on = asyncio.Event(), asyncio.Event()
        copy = Copier.copy

        async def held(*arguments: object) -> list[int] | None:
            self.began.set()
            await self.may_go_on.wait()
            return await copy(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Copier, "copy", held)

    async def wait(self, copying: "asyncio.Task[FillCounts]") -> None:
        """Wait until the process is to be asked for a copy."""
        began = asyncio.create_task(self.began.wait())
        await asyncio.wait({copying, began}, return_when=asyncio.FIRST_COMPLETED)
        assert not copying.done(), "another process copies"


async def test_guests_write_without_waiting_beside_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To what the image has, and to new clusters; those are behind the copy, of which a part is zeroes."""
    end, new = 12 * MIB, SIZE - CLUSTER
    content = zeroed((7 * MIB, 10 * MIB))
    async with opened(tmp_path, content) as image:
        await fill(image, (0, MIB))  # by a thread: the start of what guests write to
        await fill(image, (MIB, 4 * MIB))
        held = HeldCopies(monkeypatch)
        copying = asyncio.create_task(fill(image, (4 * MIB, end)))
        await held.wait(copying)
        assert all(image.write_nowait(offset, b"guest") for offset in range(0, MIB, CLUSTER))
        assert image.write_nowait(new, bytes(CLUSTER))
        held.may_go_on.set()
        assert await copying == FillCounts(5 * MIB, 3 * MIB, 0)
        assert image.write_nowait(new, b"guest")
        for start in range(end, new, 5 * MIB):
            await fill(image, (start, min(start + 5 * MIB, new)))
        expected = bytearray(content)
        for offset in [*range(0, MIB, CLUSTER), new]:
            expected[offset : offset + CLUSTER] = b"guest" + (
                expected[offset + 5 : offset + CLUSTER] if offset < new else bytes(CLUSTER - 5)
            )
        assert await read_all(image) == expected
        await image.flush()
    require_length(tmp_path, SIZE - 3 * MIB)


async def test_a_copy_that_is_cancelled_or_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, DATA) as image:
        await fill(image, (0, 4 * MIB))
        with monkeypatch.context() as patched:
            held = HeldCopies(patched)
            copying = asyncio.create_task(fill(image, (4 * MIB, 9 * MIB)))
            await held.wait(copying)
            copying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await copying
        await image.trim()
        assert not image.metadata.allocator.free

        async def fails(*_: object) -> None:
            return None

        with monkeypatch.context() as patched:
            patched.setattr(Copier, "copy", fails)
            await fill(image, (4 * MIB, 9 * MIB))  # threads copy
        assert await read_all(image) == DATA
        await image.flush()
    require_length(tmp_path, 9 * MIB)


# -- places -----------------------------------------------------------------------------------


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    """Of a file with a few clusters."""
    monkeypatch.setattr(RecordingFile, "folio_length", FOLIO)
    return Allocator(RecordingFile(bytes(3 * CLUSTER)), CLUSTER)


def test_places_are_one_behind_the_other_from_a_folio_on(allocator: Allocator) -> None:
    passed_over = allocator.take_passed_over(16 * MIB)
    assert passed_over == [Run(3 * CLUSTER, FOLIO_CLUSTERS - 3, is_fresh=True)]
    used_count = 5 * FOLIO_CLUSTERS + 1
    place = allocator.take_place(used_count * CLUSTER)
    assert place == Run(FOLIO, 6 * FOLIO_CLUSTERS, is_fresh=True)
    allocator.finish_place(place, used_count, is_rest_fresh=True)
    assert allocator.take_passed_over(16 * MIB) == []
    end = FOLIO + used_count * CLUSTER
    assert allocator.take_place(4 * FOLIO) == Run(end, 5 * FOLIO_CLUSTERS - 1, is_fresh=True)


def test_what_guests_write_is_not_in_the_folios_of_a_place(allocator: Allocator) -> None:
    allocator.take_passed_over(16 * MIB)
    place = allocator.take_place(4 * FOLIO + CLUSTER)
    guest = allocator.allocate(1)
    assert guest == Run(6 * FOLIO, 1, is_fresh=True)
    allocator.finish_place(place, 4 * FOLIO_CLUSTERS + 1, is_rest_fresh=True)
    # The rest of the place, which is amid others, and what the next one passes over.
    assert allocator.take_passed_over(16 * MIB) == [
        Run(5 * FOLIO + CLUSTER, FOLIO_CLUSTERS - 1),
        Run(6 * FOLIO + CLUSTER, FOLIO_CLUSTERS - 1, is_fresh=True),
    ]
    assert allocator.take_place(FOLIO).host_offset == 7 * FOLIO


def test_a_table_may_be_right_behind_a_copy(allocator: Allocator) -> None:
    allocator.take_passed_over(16 * MIB)
    place = allocator.take_place(FOLIO + CLUSTER)
    allocator.finish_place(place, FOLIO_CLUSTERS + 1, is_rest_fresh=True)
    assert allocator.allocate_fresh(4).host_offset == 2 * FOLIO + CLUSTER
    assert allocator.take_passed_over(16 * MIB) == []
    assert allocator.take_place(FOLIO).host_offset == 2 * FOLIO + 5 * CLUSTER


def test_nothing_is_passed_over_for_less_than_a_folio(allocator: Allocator) -> None:
    passed_over = FOLIO - 3 * CLUSTER
    assert allocator.take_passed_over(passed_over + FOLIO - CLUSTER) is None
    assert allocator.used_end() == 3 * CLUSTER
    assert allocator.take_passed_over(passed_over + FOLIO) is not None


def test_where_a_copy_has_failed_is_not_taken_for_fresh(allocator: Allocator) -> None:
    allocator.take_passed_over(16 * MIB)
    place = allocator.take_place(4 * FOLIO)
    allocator.finish_place(place, 0, is_rest_fresh=False)
    assert allocator.allocate_fresh(4).host_offset == 5 * FOLIO
    assert allocator.allocate(8 * FOLIO_CLUSTERS) == Run(FOLIO, 4 * FOLIO_CLUSTERS)
