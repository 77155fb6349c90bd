"""Sweeps beside the scene's: raw images, FUA over NBD, what a stream copies twice, the names of new files."""

import os
import random
import tempfile
from array import array
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from blockd.extents import Kind
from blockd.filters.blkstream import BlkStream
from blockd.formats.qcow2 import checkpoint
from blockd.formats.qcow2.create import create
from blockd.formats.qcow2.mapping import TableWrite, pack_entries
from blockd.formats.qcow2.refcount_changes import RefcountChanges
from blockd.formats.raw.create import create as create_raw
from blockd.formats.raw.image import RawImage
from blockd.protocols.nbd_client import NbdClient
from blockd.protocols.new_file import new_file
from tests.chains import make, read_all
from tests.control.running import running
from tests.crash.judge import in_force
from tests.crash.repairing import sweep_repair
from tests.crash.scene import CHECKPOINT_CLUSTER_COUNT, Scene
from tests.inline_threads import immediate_threads, use_inline_threads
from tests.model import AfterCrash, ModelDisk
from tests.nbd.serving import serving
from tests.recording import RecordingFile, Timeline
from tests.streaming import open_overlay, overlay

Sweep = Callable[[], Awaitable[None]]

CLUSTER = 512


class Recorded:
    """A file and a model beside it; every crash from now on can be judged."""

    def __init__(self, content: bytes, model: ModelDisk) -> None:
        self.file = RecordingFile(content)
        self.model = model
        self._moments: list[tuple[int, AfterCrash]] = []
        self.file.on_entry = model.on_change = self._note
        self._note()

    def _note(self) -> None:
        self._moments.append((len(self.file.log), self.model.after_crash()))

    async def judge(self, content_of: Callable[[RecordingFile], Awaitable[bytes]]) -> None:
        """Raises:   AssertionError: some crash leaves what it may not."""
        with immediate_threads():
            for position, what, [disk] in Timeline([self.file]).states(random.Random(1), subset_count=4):
                content = await content_of(RecordingFile(disk))
                for index in in_force((start for start, _ in self._moments), position):
                    problems = list(self._moments[index][1].problems(content))
                    assert not problems, f"crash after entry {position}; {what}: {problems[:5]}"


async def sweep_raw() -> None:
    """Raw images: what was there at a flush, when the image was closed or made read-only, and its length."""
    use_inline_threads()
    made = RecordingFile()
    await create_raw(made, 16 * CLUSTER)
    *_, (_, _, [disk]) = Timeline([made]).states(random.Random(1), subset_count=0)
    assert len(disk) == 16 * CLUSTER, "what was created is not durable"
    recorded = Recorded(disk, ModelDisk(disk))
    image = await RawImage.open(recorded.file, node_name="raw", read_only=False)
    for number, settle in enumerate((image.flush, lambda: image.reopen(read_only=True), image.close)):
        await image.reopen(read_only=False)
        await _write(image, recorded.model, 2 * number * CLUSTER, 3 * CLUSTER)
        durable = recorded.model.begin_flush()
        await settle()
        recorded.model.finish_flush(durable)
    await recorded.judge(_raw_content)


async def _write(image: RawImage, model: ModelDisk, offset: int, length: int) -> None:
    data = model.new_data(offset, length)
    model.begin_write(offset, data)
    await image.write(offset, data)
    model.finish_write(offset, data)


async def _raw_content(file: RecordingFile) -> bytes:
    return await read_all(await RawImage.open(file, node_name="raw", read_only=True))


async def sweep_refcounts() -> None:
    """The refcount table never names a block that is not there yet."""
    entries = array("H", [1] * (CLUSTER // 2))
    block, place = TableWrite(2 * CLUSTER, entries), TableWrite(0, array("Q", [2 * CLUSTER]))
    file = RecordingFile(bytes(4 * CLUSTER))
    checkpoint.write_refcounts(file, RefcountChanges([block], [place], [0], [0]))
    for _, what, [disk] in Timeline([file]).states(random.Random(1), subset_count=4):
        is_named = disk[:8] == pack_entries(place.entries)
        is_there = disk[2 * CLUSTER : 3 * CLUSTER] == pack_entries(entries)
        assert is_there or not is_named, what


async def sweep_nbd() -> None:
    """A write with FUA is durable when it is acknowledged, and any write when a flush after it is."""
    use_inline_threads()
    made = RecordingFile()
    await (await overlay(made, None, 16 * CLUSTER, cluster_size=CLUSTER)).close()
    recorded = Recorded(bytes(made.disk), ModelDisk(bytes(16 * CLUSTER)))
    image = await open_overlay(recorded.file, None)
    with tempfile.TemporaryDirectory() as folder:
        async with serving(image, Path(folder)) as server, await server.client() as client:
            await _use(client, recorded.model)
    await recorded.judge(_qcow2_content)


async def _use(client: NbdClient, model: ModelDisk) -> None:
    for number in range(3):
        offset = (3 * number + 1) * CLUSTER
        data = model.new_data(offset, 2 * CLUSTER)
        model.begin_write(offset, data)
        await client.write(offset, data, fua=True)
        model.finish_durable_write(offset, data)
        data = model.new_data(0, CLUSTER)
        model.begin_write(0, data)
        await client.write(0, data)
        model.finish_write(0, data)
    durable = model.begin_flush()
    await client.flush()
    model.finish_flush(durable)


async def _qcow2_content(file: RecordingFile) -> bytes:
    return await read_all(await open_overlay(file, None, read_only=True))


async def sweep_copied_twice() -> None:
    """A stream started again after a crash copies at most what two checkpoint intervals took (promise 5)."""
    scene = Scene(CLUSTER, 96)
    copied_at: dict[int, int] = {}

    def note() -> None:
        scene.note_moment()
        copied_at[scene.position] = scene.job.counters.copied if scene.job is not None else 0

    async with scene.running():
        missing_at_first = await _missing(scene, scene.files[0].initial)
        scene.files[0].on_entry = note
        await scene.complete()
    limit = 2 * CHECKPOINT_CLUSTER_COUNT * CLUSTER
    for position, what, [disk] in Timeline(scene.files, scene.tape).states(random.Random(1), subset_count=0):
        if position in copied_at and what in ("all so far", "up to the last sync"):
            durable = missing_at_first - await _missing(scene, disk)
            copied_twice = copied_at[position] - durable
            assert copied_twice <= limit, f"crash after entry {position}; {what}: {copied_twice} bytes again"


async def _missing(scene: Scene, disk: bytes) -> int:
    """How many bytes a stream of this disk would copy."""
    image = await open_overlay(RecordingFile(disk), scene.nodes["middle.qcow2"], read_only=True)
    if image.backing_filename is None:
        return 0
    stream = BlkStream(image, None, "#missing")
    offset = count = 0
    while offset < image.size:
        for extent in await stream.missing(offset, image.size - offset):
            offset = extent.end
            count += extent.length if extent.kind is Kind.DATA else 0
    return count


# -- names ------------------------------------------------------------------------------------------


@contextmanager
def recorded_syncs() -> Iterator[list[str]]:
    """Inside, the list has the path of every file and folder that was synced, in order."""
    synced: list[str] = []

    def recording(sync: Callable[[int], None]) -> Callable[[int], None]:
        def call(fd: int) -> None:
            sync(fd)
            synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))

        return call

    with patch("os.fsync", recording(os.fsync)), patch("os.fdatasync", recording(os.fdatasync)):
        yield synced


async def sweep_new_file() -> None:
    """A new file is durable when it is said to be there, and so is its name."""
    with tempfile.TemporaryDirectory() as folder, recorded_syncs() as synced:
        path = str(Path(folder) / "new.qcow2")
        async with new_file(path) as file:
            file.write_blocking(0, b"content")
        assert synced == [path, folder]


async def sweep_switch() -> None:
    """Before a switch to a new overlay is told, the overlay, its name and the old image are durable."""
    with tempfile.TemporaryDirectory() as folder:
        chain = await make(Path(folder), ["AB", "-C"])
        copy = chain.active.with_name("copy.qcow2")
        async with new_file(str(copy)) as file:
            await create(file, 2 * 65536, backing_filename=str(chain.active), backing_format="qcow2")
        async with running(Path(folder), "--device", f"vda={chain.active}") as daemon:
            client = await daemon.qmp()
            with recorded_syncs() as synced:
                await client.command("block_switch", device="vda", filename=str(copy))
        assert {str(copy), folder, str(chain.active)} <= set(synced), synced


SWEEPS: list[Sweep] = [
    sweep_refcounts,
    sweep_repair,
    sweep_raw,
    sweep_nbd,
    sweep_copied_twice,
    sweep_new_file,
    sweep_switch,
]
