"""Sound images of every format in `FORMATS`, small ones, for a mutator to spoil.

Each has data, holes, zeroes and a backing file where its format can have them. Every format is also made by
its own `create`, so that a new one joins by itself.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from blockd.drivers import FORMATS, NodeGraph
from blockd.protocols.new_file import new_file
from blockd.units import KIB
from tests.qemu_img import qemu

SIZE = 256 * KIB
BASE = "base.raw"


class Seed(NamedTuple):
    """One sound image."""

    name: str
    image_format: str
    content: bytes


class Variant(NamedTuple):
    """How QEMU makes an image: options of `create`, commands for qemu-io, and what is done in the end."""

    name: str
    options: str = ""
    has_backing: bool = True
    finish: Callable[[Path], object] = lambda path: None
    convert: Sequence[str] = ()


def _snapshot(path: Path) -> None:
    qemu("qemu-img", "snapshot", "-c", "one", path)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 12k", path)
    qemu("qemu-img", "snapshot", "-c", "two", path)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 8 8k 40k", path)


def _bitmap(path: Path) -> None:
    for name in ("daily", "hourly"):
        qemu("qemu-img", "bitmap", "--add", "-g", "4096", path, name)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 12k", path)


def _set_bit(offset: int, bit: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[offset] |= bit
        path.write_bytes(data)

    return change


# QEMU cannot be asked to leave an image as a crash would: these flags are set by hand.
_QCOW2_DIRTY, _QED_NEED_CHECK = _set_bit(79, 1), _set_bit(16, 2)

VARIANTS: dict[str, list[Variant]] = {
    "qcow2": [
        Variant("v3", "cluster_size=4k"),
        Variant("v2", "cluster_size=1k,compat=0.10"),
        Variant("small clusters", "cluster_size=512"),
        Variant("no backing", "cluster_size=4k,preallocation=metadata", has_backing=False),
        Variant("dirty", "cluster_size=4k,lazy_refcounts=on", finish=_QCOW2_DIRTY),
        Variant("narrow refcounts", "cluster_size=2k,refcount_bits=1"),
        Variant("wide refcounts", "cluster_size=2k,refcount_bits=64"),
        Variant("snapshots", "cluster_size=4k", finish=_snapshot),
        Variant("bitmaps", "cluster_size=4k", finish=_bitmap),
        Variant("subclusters", "cluster_size=16k,extended_l2=on"),
        Variant("zlib", "cluster_size=4k", has_backing=False, convert=["-c"]),
        Variant("zstd", "cluster_size=4k,compression_type=zstd", has_backing=False, convert=["-c"]),
    ],
    "qed": [
        Variant("small tables", "cluster_size=4k,table_size=2"),
        Variant("larger tables", "cluster_size=4k,table_size=4", has_backing=False),
        Variant("need check", "cluster_size=4k,table_size=2", finish=_QED_NEED_CHECK),
    ],
}


def make_seeds(folder: Path) -> list[Seed]:
    """Make all of them; `base.raw` is left in the folder, where they name it."""
    (folder / BASE).write_bytes(b"".join(bytes([65 + number % 26]) * 4096 for number in range(60)))
    seeds = []
    for image_format in FORMATS:
        path = folder / f"seed-{image_format}.{image_format}"
        for variant in VARIANTS.get(image_format, []):
            _make_with_qemu(path, image_format, variant)
            seeds.append(Seed(f"{image_format}, {variant.name}", image_format, path.read_bytes()))
            path.unlink()
        asyncio.run(_make_with_blockd(path, image_format))
        seeds.append(Seed(f"{image_format}, made by blockd", image_format, path.read_bytes()))
        path.unlink()
    return seeds


def _make_with_qemu(path: Path, image_format: str, variant: Variant) -> None:
    link = ["-b", BASE, "-F", "raw"] if variant.has_backing else []
    options = ["-o", variant.options]
    make = ["qemu-img", "create", "-q", "-f", image_format, *options, *link, path.name, str(SIZE)]
    _in_folder(path, make)
    write = ["write -P 1 0 20k", "write -P 2 100k 9k", "write -z 40k 16k", "write -P 3 200k 5k"]
    commands = [word for command in write for word in ("-c", command)]
    _in_folder(path, ["qemu-io", "-t", "unsafe", "-f", image_format, *commands, path.name])
    if variant.convert:
        plain = path.rename(path.with_name("plain"))
        _in_folder(
            path,
            [
                *("qemu-img", "convert", *variant.convert, *options, "-f", image_format, "-O", image_format),
                *(plain.name, path.name),
            ],
        )
        plain.unlink()
    variant.finish(path)


def _in_folder(path: Path, command: list[str]) -> None:
    """Run a program where the image is, so that the image names its backing file by its mere name."""
    qemu("env", "-C", str(path.parent), *command)


async def _make_with_blockd(path: Path, image_format: str) -> None:
    entry = FORMATS[image_format]
    link = {"backing_filename": BASE, "backing_format": "raw"} if entry.has_backing else {}
    async with new_file(str(path)) as file:
        await entry.create(file, SIZE, **link)
    graph = NodeGraph()
    image = await graph.open_image(str(path), image_format, read_only=False)
    await image.write(1000, b"x" * 20000)
    await image.write_zeroes(64 * KIB, 16 * KIB)
    await image.flush()
    await graph.close()
