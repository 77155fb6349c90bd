"""qcow2 images with every feature, made by QEMU: read equal, written and streamed here, sound in QEMU."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zstandard

from blockd.block.node import BlockNode
from blockd.block.root import Root
from blockd.errors import ImageError, RequestError
from blockd.formats.qcow2 import header as headers
from blockd.formats.qcow2.compressed import CompressedCluster
from blockd.formats.qcow2.header import Header
from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.raw.image import RawImage
from blockd.protocols.file import FileNode
from blockd.units import KIB, MIB
from tests import qemu_img
from tests.chains import Chain, assert_same_in_qemu, opened, read_all
from tests.guest import churn
from tests.model import ModelDisk, stamp
from tests.recording import RecordingFile
from tests.streaming import streaming

pytestmark = pytest.mark.slow

SIZE = 3 * MIB

FEATURES: dict[str, tuple[str, ...]] = {
    "version 2": ("compat=0.10",),
    "version 2, 512-byte clusters": ("compat=0.10", "cluster_size=512"),
    **{f"{bits}-bit refcounts": (f"refcount_bits={bits}",) for bits in (1, 2, 4, 8, 32, 64)},
    "1-bit refcounts, 512-byte clusters": ("refcount_bits=1", "cluster_size=512"),
    "64-bit refcounts, 512-byte clusters": ("refcount_bits=64", "cluster_size=512"),
    "lazy refcounts": ("lazy_refcounts=on",),
    "preallocated metadata": ("preallocation=metadata",),
    "extended L2": ("extended_l2=on",),
    "extended L2, 16 KiB clusters": ("extended_l2=on", "cluster_size=16k"),
    "extended L2, preallocated": ("extended_l2=on", "preallocation=metadata"),
    "preallocated": ("preallocation=falloc",),
    "preallocated in full": ("preallocation=full",),
    "preallocated version 2": ("preallocation=metadata", "compat=0.10"),
}
# Features that QEMU does not make together with a backing file.
ALONE = [name for name in FEATURES if name.startswith("preallocated")]
# Tried in `make test-fast`, too.
FAST = ("version 2", "1-bit refcounts", "extended L2", "zlib", "zstd")


def marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if name in FAST else (pytest.mark.slow,)


features = pytest.mark.parametrize(
    "options", [pytest.param(options, id=name, marks=marks(name)) for name, options in FEATURES.items()]
)


def chain_of(path: Path, content: bytes) -> Chain:
    return Chain([path], ["qcow2"], 64 * KIB, content)


def assert_no_leaks(path: Path) -> None:
    verdict = qemu_img.check(path)
    assert verdict is not None
    assert (verdict.corruptions, verdict.leaks) == (0, 0)


async def churn_image(path: Path, model: ModelDisk, seed: int, *, step_count: int = 150) -> None:
    """Guests use the image, which is closed and opened between; then QEMU has to read the same."""
    rng = random.Random(seed)
    for _ in range(2):
        async with opened(chain_of(path, bytes(model.content))) as image:
            assert await read_all(image) == model.content
            await churn(Root(image), model, rng, step_count=step_count, guest_count=3)
    assert_same_in_qemu(chain_of(path, b""), bytes(model.content))


@features
async def test_image_is_read_and_written(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", SIZE, *options)
    qemu_img.write(path, "write -P 1 1M 1M", "write -z 1500k 200k", "write -z -u 2M 256k", "discard 1M 128k")

    await churn_image(path, ModelDisk(qemu_img.content(path)), seed=7)
    assert_no_leaks(path)


@asynccontextmanager
async def overlay_of(path: Path, base: Path) -> AsyncIterator[Qcow2Image]:
    below = await FileNode.open(str(base), node_name="base-file", read_only=True)
    file = await FileNode.open(str(path), node_name="file", read_only=False)
    image = await Qcow2Image.open(file, node_name="i", read_only=False)
    image.backing = await RawImage.open(below, node_name="base", read_only=True)
    yield image
    await image.close()
    await file.close()
    await below.close()


async def stream_under_guests(image: Qcow2Image, base: BlockNode | None, model: ModelDisk) -> None:
    async with streaming(image) as disk:
        job = await disk.start(base)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(job.wait_ended())
            tasks.create_task(churn(disk.root, model, random.Random(5), step_count=60, guest_count=2))
        assert job.error is None


@pytest.mark.parametrize(
    "base_size",
    [
        pytest.param(SIZE, id="same"),
        pytest.param(SIZE // 2, id="shorter", marks=pytest.mark.slow),
        pytest.param(2 * SIZE, id="longer", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks(name)) for name in FEATURES if name not in ALONE]
)
async def test_overlay_is_streamed_into(tmp_path: Path, name: str, base_size: int) -> None:
    """Zeroes of the base and of the guest, too, and what a longer base has behind the end stays unseen."""
    base = tmp_path / "base.raw"
    base.write_bytes(stamp(9, 0, base_size // 2) + bytes(base_size // 4) + stamp(8, 0, base_size // 4))
    path = qemu_img.create(tmp_path / "i.qcow2", SIZE, *FEATURES[name], backing=base, backing_format="raw")
    qemu_img.write(path, "write -P 1 1M 300k", "write -z 100k 200k", "discard 1M 64k")
    model = ModelDisk(qemu_img.content(path))

    async with overlay_of(path, base) as image:
        await image.resize(SIZE + 300 * KIB)
        model.begin_resize(SIZE + 300 * KIB)
        model.finish_resize()
        await stream_under_guests(image, None, model)
        assert image.backing is None
        assert await read_all(image) == model.content
    base.unlink()
    assert_same_in_qemu(chain_of(path, b""), bytes(model.content))
    assert_no_leaks(path)


# -- compressed clusters ------------------------------------------------------------------------------


def compressed(folder: Path, *options: str) -> tuple[Path, bytes]:
    """An image whose clusters are compressed, many to a host cluster, and its content."""
    content = b"".join(random.Random(offset).randbytes(200) * 320 for offset in range(40)) + bytes(MIB)
    content = content.ljust(4 * MIB, b"\1")
    raw, path = folder / "i.raw", folder / "i.qcow2"
    raw.write_bytes(content)
    words = [word for option in options for word in ("-o", option)]
    qemu_img.qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *words, raw, path)
    return path, content


COMPRESSIONS = {
    "zlib": (),
    "zstd": ("compression_type=zstd",),
    "zlib, small clusters": ("cluster_size=4k",),
    "zstd, large clusters": ("compression_type=zstd", "cluster_size=2M"),
    "zlib, version 2": ("compat=0.10",),
    "extended L2": ("extended_l2=on",),
}


@pytest.mark.parametrize(
    "options", [pytest.param(options, id=name, marks=marks(name)) for name, options in COMPRESSIONS.items()]
)
async def test_compressed_clusters_are_read_and_rewritten(tmp_path: Path, options: tuple[str, ...]) -> None:
    path, content = compressed(tmp_path, *options)
    await churn_image(path, ModelDisk(content), seed=3, step_count=90)
    assert_no_leaks(path)


async def test_host_cluster_lives_until_its_last_compressed_cluster_is_gone(tmp_path: Path) -> None:
    path, content = compressed(tmp_path)
    used = path.stat().st_size
    async with opened(chain_of(path, content)) as image:
        for offset in range(0, image.size, 3 * 64 * KIB):
            await image.discard(offset, 64 * KIB)
            await image.flush()
        await image.write(0, stamp(1, 0, 64 * KIB))
    assert_no_leaks(path)

    async with opened(chain_of(path, content)) as image:
        await image.discard(0, image.size)
        await image.flush()
        for offset in range(0, used - 64 * KIB, 64 * KIB):
            await image.write(offset, stamp(2, offset, 64 * KIB))
    assert_no_leaks(path)
    assert path.stat().st_size < 2 * used


def zstd_cluster(stored: bytes) -> CompressedCluster:
    header = Header(
        version=3,
        cluster_bits=16,
        size=MIB,
        l1_entry_count=1,
        l1_offset=0,
        refcount_table_offset=0,
        refcount_table_clusters=1,
        compression_type=headers.COMPRESSION_ZSTD,
    )
    return CompressedCluster(RecordingFile(stored), 0, len(stored), header)


async def test_bomb_gives_one_cluster_and_no_more() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 * MIB))
    assert len(bomb) < 16 * KIB
    content = bytearray(b"x" * 64 * KIB)
    zstd_cluster(bomb).readinto_blocking(0, memoryview(content))
    assert content == bytes(64 * KIB)


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (b"not zstd at all", "damaged"),
        (zstandard.ZstdCompressor().compress(bytes(64 * KIB))[:-5], "damaged"),
        (zstandard.ZstdCompressor().compress(bytes(60 * KIB)), "only 61440 bytes"),
        # Its window, which the decoder would have to keep in memory, is 128 MiB.
        (b"\x28\xb5\x2f\xfd\x00\x88\x01\x00\x00", "damaged"),
    ],
    ids=["no frame", "cut off", "too short", "huge window"],
)
async def test_damaged_zstd_cluster_is_an_error_of_the_image(stored: bytes, said: str) -> None:
    content = bytearray(64 * KIB)
    with pytest.raises(ImageError, match=said):
        zstd_cluster(stored).readinto_blocking(0, memoryview(content))


async def test_several_zstd_frames_make_a_cluster() -> None:
    halves = stamp(1, 0, 32 * KIB), stamp(2, 0, 32 * KIB)
    stored = b"".join(zstandard.ZstdCompressor().compress(half) for half in halves) + b"what follows"
    content = bytearray(64 * KIB)
    zstd_cluster(stored).readinto_blocking(0, memoryview(content))
    assert content == b"".join(halves)


# -- snapshots ----------------------------------------------------------------------------------------

SNAPSHOT_OPTIONS = {
    "default": ("cluster_size=64k",),
    "512-byte clusters": ("cluster_size=512",),
    "4-bit refcounts": ("refcount_bits=4", "cluster_size=4k"),
    "version 2": ("compat=0.10", "cluster_size=4k"),
    "extended L2": ("extended_l2=on", "cluster_size=16k"),
}


def take_snapshot(path: Path, name: str) -> bytes:
    """Let QEMU take an internal snapshot; returns what it holds."""
    qemu_img.qemu("qemu-img", "snapshot", "-c", name, path)
    return snapshot_content(path, name)


def snapshot_content(path: Path, name: str) -> bytes:
    raw = path.with_name("snapshot.raw")
    words = ("convert", "-f", "qcow2", "-O", "raw", "-l", f"snapshot.name={name}")
    qemu_img.qemu("qemu-img", *words, path, raw)
    return raw.read_bytes()


@pytest.mark.parametrize(
    "options",
    [pytest.param(options, id=name, marks=marks(name)) for name, options in SNAPSHOT_OPTIONS.items()],
)
async def test_snapshots_stay_as_they_are(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", SIZE, *options)
    qemu_img.write(path, "write -P 1 0 1500k", "write -z 100k 200k")
    first = take_snapshot(path, "first")
    qemu_img.write(path, "write -P 2 1M 1M", "discard 0 64k")
    model = ModelDisk(qemu_img.content(path))
    second = take_snapshot(path, "second")

    await churn_image(path, model, seed=11)
    assert_no_leaks(path)
    assert snapshot_content(path, "first") == first
    assert snapshot_content(path, "second") == second

    qemu_img.qemu("qemu-img", "snapshot", "-a", "first", path)
    assert qemu_img.content(path) == first
    await churn_image(path, ModelDisk(first), seed=12, step_count=60)
    assert snapshot_content(path, "second") == second
    for name in ("first", "second"):
        qemu_img.qemu("qemu-img", "snapshot", "-d", name, path)
    assert_no_leaks(path)


async def test_compressed_clusters_of_a_snapshot_stay(tmp_path: Path) -> None:
    path, content = compressed(tmp_path)
    take_snapshot(path, "s")
    await churn_image(path, ModelDisk(content), seed=13, step_count=90)
    assert snapshot_content(path, "s") == content
    assert_no_leaks(path)


async def test_overlay_with_a_snapshot_is_written_and_grows(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(stamp(9, 0, SIZE))
    path = qemu_img.create(tmp_path / "i.qcow2", SIZE, "cluster_size=4k", backing=base, backing_format="raw")
    qemu_img.write(path, "write -P 1 1M 300k", "write -z 100k 200k")
    taken = take_snapshot(path, "s")
    model = ModelDisk(taken)

    async with overlay_of(path, base) as image:
        await image.resize(40 * MIB)
        model.begin_resize(40 * MIB)
        model.finish_resize()
        await churn(Root(image), model, random.Random(1), step_count=100, guest_count=3)
        # A snapshot reads its backing as the disk does, so a stream that ends without it would spoil both.
        with pytest.raises(RequestError, match="internal snapshots"):
            image.require_streamable()
    assert_same_in_qemu(chain_of(path, b""), bytes(model.content))
    assert_no_leaks(path)
    qemu_img.qemu("qemu-img", "snapshot", "-a", "s", path)
    assert qemu_img.content(path) == taken


async def test_version_2_with_a_snapshot_that_has_no_size_does_not_grow(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", SIZE, "compat=0.10")
    take_snapshot(path, "s")
    spoiled = bytearray(path.read_bytes())
    start = headers.parse(bytes(spoiled), "i").snapshots_offset
    extra = int.from_bytes(spoiled[start + 36 : start + 40])
    rest = spoiled[start + 40 + extra : start + 40 + extra + 16]
    spoiled[start + 36 : start + 40] = bytes(4)
    spoiled[start + 40 : start + 56] = rest
    path.write_bytes(spoiled)

    async with opened(chain_of(path, b"")) as image:
        with pytest.raises(RequestError, match="snapshots that do not record their size"):
            await image.resize(2 * SIZE)
        assert image.size == SIZE
