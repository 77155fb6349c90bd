"""Images as people leave them: overlays that a guest has written to, chains with holes in every layer.

A recipe says what was written where. It has a seed, so that every run measures the same images.
"""

import random
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench.lab import DATA_SIZE, Lab, qemu_img
from bench.peers import Image
from blockd.units import KIB, MIB


class Write(NamedTuple):
    """A range that a guest has written, or has had zeroed."""

    offset: int
    length: int
    is_zero: bool = False


# What was written to a layer of a size; its number in the chain makes layers differ.
Writes = Callable[[int, int], Iterator[Write]]


def every(step: int, length: int) -> Writes:
    """`length` bytes at each multiple of `step`."""
    return lambda size, _: (Write(offset, length) for offset in range(0, size, step))


def alternating(unit: int) -> Writes:
    """Data and zeroes by turns."""
    return lambda size, _: (Write(offset, unit, bool(offset // unit % 2)) for offset in range(0, size, unit))


def scattered(share: float, stretch: int, unit: int = 64 * KIB, seed: int = 16) -> Writes:
    """A share of all units, in stretches of one to twice `stretch` less one, wherever they fall."""

    def writes(size: int, number: int) -> Iterator[Write]:
        rng = random.Random(f"{seed} {number}")
        offset = 0
        while offset < size:
            gap = stretch * (1 - share) / share
            offset += unit * round(rng.uniform(0, 2 * gap))
            length = min(unit * rng.randrange(1, 2 * stretch), size - offset)
            if length > 0:
                yield Write(offset, length)
            offset += max(length, 0)

    return writes


@dataclass(frozen=True)
class Recipe:
    """A chain over a raw base, full of data or empty, and what was written to each of its layers."""

    name: str
    writes: Writes
    is_base_full: bool = True
    size: int = 256 * MIB
    layer_count: int = 1
    format: str = "qcow2"
    options: tuple[str, ...] = field(default=())

    def make(self, lab: Lab) -> tuple[Image, Image]:
        """Make the chain afresh; also returns what it is to read as, as QEMU reads it."""
        base = lab.folder / "used-base.raw"
        self._make_base(base, lab.raw_base.path)
        image = Image(base, "raw")
        for number in range(self.layer_count):
            image = self._layer(lab.folder / f"used{number}.{self.format}", number, image)
        expected = lab.folder / "used-expected.raw"
        qemu_img("convert", "-O", "raw", image.path, expected)
        lab.settle()
        return image, Image(expected, "raw")

    def _make_base(self, path: Path, data: Path) -> None:
        with path.open("wb") as target, data.open("rb") as source:
            for _ in range(self.size // MIB if self.is_base_full else 0):
                target.write(source.read(MIB))
            target.truncate(self.size)

    def _layer(self, path: Path, number: int, below: Image) -> Image:
        options = ("-o", ",".join(self.options)) if self.options else ()
        path.unlink(missing_ok=True)
        qemu_img("create", "-q", "-f", self.format, "-b", below.path, "-F", below.format, *options, path)
        write_all(path, self.format, self.writes(self.size, number))
        return Image(path, self.format, below)


def write_all(path: Path, image_format: str, writes: Iterable[Write]) -> None:
    """Write to an image as a guest would; what is written tells where it belongs."""
    commands = "".join(
        f"write {'-z' if write.is_zero else f'-P {1 + write.offset // 512 % 251}'} "
        f"{write.offset} {write.length}\n"
        for write in writes
    )
    command = ["qemu-io", "-t", "unsafe", "-f", image_format, str(path)]
    subprocess.run(command, input=commands, stdout=subprocess.DEVNULL, text=True, check=True)


RECIPES = [
    Recipe("every 2nd cluster, sparse base", every(128 * KIB, 64 * KIB), is_base_full=False),
    Recipe("every 2nd cluster", every(128 * KIB, 64 * KIB)),
    Recipe("4 KiB in every 2nd cluster", every(128 * KIB, 4 * KIB)),
    Recipe("4 KiB clusters, every 4th", every(16 * KIB, 4 * KIB), options=("cluster_size=4k",)),
    Recipe("a random eighth", scattered(1 / 8, 2)),
    Recipe("QED, every 2nd cluster", every(128 * KIB, 64 * KIB), format="qed"),
]
# What qemu-storage-daemon cannot do: it ends with a failed assertion.
EXTENDED_RECIPES = [
    Recipe(
        "extended L2, data and zeroes by turns",
        alternating(2 * KIB),
        size=64 * MIB,
        options=("extended_l2=on",),
    ),
]
# What guests work on, beside images that are full or empty.
USED_DISKS = [
    Recipe("used overlay", scattered(1 / 8, 2), size=DATA_SIZE),
    Recipe("used chain of 5", scattered(1 / 8, 2), size=DATA_SIZE, layer_count=5),
]
USED_QED = Recipe("used QED overlay", scattered(1 / 8, 2), size=DATA_SIZE, format="qed")
CHAIN_RECIPES = [
    Recipe(f"{count} layers, a random eighth each", scattered(1 / 8, 2), layer_count=count)
    for count in (2, 8, 32)
]
