"""Disks of which little is data, and how much an image of one may take."""

import random
from pathlib import Path
from typing import Any, NamedTuple

from blockd.cli.image.create import NewImage
from blockd.units import KIB, MIB, align_up
from tests import qemu_img
from tests.qemu_img import qemu

SIZE = 64 * MIB
# What a filesystem itself may add to a file in `du`: blocks that tell where its blocks are.
FILESYSTEM_LENGTH = 64 * KIB


class Pattern(NamedTuple):
    """So much data at the start of every stretch of the disk; the rest is zeroes, written as data."""

    name: str
    data_length: int
    stretch_length: int

    def __str__(self) -> str:
        return self.name

    def write(self, path: Path) -> None:
        """Make a raw image."""
        rng = random.Random(1)
        content = bytearray(SIZE)
        for start in range(0, SIZE, self.stretch_length) if self.data_length else ():
            content[start : start + self.data_length] = rng.randbytes(self.data_length)
        path.write_bytes(content)

    def length(self, cluster_size: int) -> int:
        """How much of the disk is in clusters that hold data."""
        if not self.data_length:
            return 0
        each = min(align_up(self.data_length, cluster_size), self.stretch_length)
        return SIZE // max(self.stretch_length, cluster_size) * each


PATTERNS = [
    Pattern("one-MiB", MIB, SIZE),
    Pattern("zeroes", 0, SIZE),
    Pattern("64-KiB-of-each-MiB", 64 * KIB, MIB),
    Pattern("4-KiB-of-each-64-KiB", 4 * KIB, 64 * KIB),
    Pattern("every-other-MiB", MIB, 2 * MIB),
]


class Shape(NamedTuple):
    """A kind of image: its clusters, and what a map of the whole disk takes in tables."""

    name: str
    image_format: str
    cluster_size: int
    options: dict[str, object]
    table_span: int  # what one table maps
    table_length: int

    def __str__(self) -> str:
        return self.name

    @property
    def tables_length(self) -> int:
        """What the tables take if each of them is there."""
        return align_up(SIZE, self.table_span) // self.table_span * self.table_length

    def new_image(self, path: Path, backing: Path | None = None) -> NewImage:
        options = dict(self.options)
        if self.image_format == "add-cow":
            options["image_file"] = data_file(path).name
        if backing is None:
            return NewImage(self.image_format, SIZE, None, None, options)
        return NewImage(self.image_format, SIZE, str(backing), "raw", options)


SHAPES = [
    Shape("qcow2", "qcow2", 64 * KIB, {}, 512 * MIB, 64 * KIB),
    Shape("qcow2-4k", "qcow2", 4 * KIB, {"cluster_size": 4 * KIB}, 2 * MIB, 4 * KIB),
    Shape("extended-l2", "qcow2", 64 * KIB, {"extended_l2": True}, 256 * MIB, 64 * KIB),
    Shape("qed", "qed", 64 * KIB, {}, 2048 * MIB, 256 * KIB),
    Shape("qed-4k", "qed", 4 * KIB, {"cluster_size": 4 * KIB}, 8 * MIB, 16 * KIB),
    Shape("add-cow", "add-cow", 64 * KIB, {}, SIZE, 0),
]


# Has no zero clusters, so that zeroes over a backing file take space.
VERSION_2 = Shape("version-2", "qcow2", 64 * KIB, {"compat": "0.10"}, 512 * MIB, 64 * KIB)


def data_file(path: Path) -> Path:
    """The image of an add-cow file."""
    return path.with_suffix(".data")


def by_qemu(source: Path, target: Path, shape: Shape) -> int:
    """Convert with QEMU; returns how long its image is, in whole clusters."""
    words = [f"{name}={'on' if value is True else value}" for name, value in shape.options.items()]
    options = ["-o", ",".join(words)] if words else []
    qemu("qemu-img", "convert", "-f", "raw", "-O", shape.image_format, *options, source, target)
    return align_up(target.stat().st_size, shape.cluster_size)


class Space(NamedTuple):
    """What an image takes."""

    length: int
    taken: int  # as `du` counts
    end: int  # of what is in use, as QEMU sees it; 0: it does not say
    leaks: int

    @classmethod
    def of(cls, path: Path, image_format: str) -> "Space":
        """Look at an image, which may be in use."""
        status = path.stat()
        found: Any = None
        if image_format in ("qcow2", "qed"):
            found = qemu_img.check(path, is_in_use=True)
        return cls(
            status.st_size,
            status.st_blocks * 512,
            found.image_end_offset if found else 0,
            found.leaks if found else 0,
        )
