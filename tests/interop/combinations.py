"""Which images QEMU is asked to make: combinations of the options that it has.

All that QEMU makes are enumerated; of the qcow2 ones so many are taken that each value of an option
meets each value of every other one (that it can meet), and more up to a number.
"""

import itertools
import random
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from blockd.units import KIB, MIB, SECTOR_SIZE

VERSION_2_COUNT, VERSION_3_COUNT = 50, 240

# What QEMU does beside making and filling an image.
PLAIN, COMPRESSED, SNAPSHOT, BITMAP = "plain", "compressed", "snapshot", "bitmap"
NO_BACKING = "none"
# What images stand on: shorter and longer than they are.
BACKINGS = {"raw": 3 * MIB // 2 - SECTOR_SIZE, "qcow2": 7 * MIB, "qed": 3 * MIB}

Choices = Mapping[str, tuple[str, ...]]
Values = Mapping[str, str]

RAW: Choices = {
    "preallocation": ("off", "falloc", "full"),
    "backing": (NO_BACKING,),
    "habit": (PLAIN,),
}
QED: Choices = {
    "cluster_size": ("4096", "65536", "1048576"),
    "table_size": ("2", "4", "16"),  # 1 too, says the specification; but QEMU cannot open these
    "backing": (NO_BACKING, *BACKINGS),
    "habit": (PLAIN,),
}
QCOW2_VERSION_2: Choices = {
    "compat": ("0.10",),
    "cluster_size": ("512", "2048", "16384", "65536", "2097152"),
    "preallocation": ("off", "metadata", "falloc", "full"),
    "backing": (NO_BACKING, *BACKINGS),
    "habit": (PLAIN, COMPRESSED, SNAPSHOT),
}
QCOW2_VERSION_3: Choices = {
    **QCOW2_VERSION_2,
    "compat": ("1.1",),
    "refcount_bits": ("1", "2", "4", "8", "16", "32", "64"),
    "lazy_refcounts": ("off", "on"),
    "extended_l2": ("off", "on"),
    "compression_type": ("zlib", "zstd"),
    "habit": (PLAIN, COMPRESSED, SNAPSHOT, BITMAP),
}


class Combination(NamedTuple):
    """One image: its format, what is told to `qemu-img create`, what it stands on, what is done to it."""

    image_format: str
    options: Mapping[str, str]
    backing: str
    habit: str

    def __str__(self) -> str:
        return "-".join([self.image_format, *self.options.values(), "on", self.backing, self.habit])

    @property
    def cluster_size(self) -> int:
        return int(self.options.get("cluster_size", 64 * KIB))

    @property
    def size(self) -> int:
        """Some clusters, and the last of them is not whole."""
        return (5 * MIB if self.cluster_size >= MIB else 2 * MIB) + 5 * SECTOR_SIZE


def combinations() -> Iterator[Combination]:
    """All that are tried."""
    yield from (_combination("raw", values) for values in _all(RAW))
    yield from (_combination("qed", values) for values in _all(QED))
    yield from (_combination("qcow2", values) for values in _chosen(QCOW2_VERSION_2, VERSION_2_COUNT))
    yield from (_combination("qcow2", values) for values in _chosen(QCOW2_VERSION_3, VERSION_3_COUNT))


def _all(choices: Choices) -> Iterator[Values]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _combination(image_format: str, values: Values) -> Combination:
    options = {name: value for name, value in values.items() if name not in ("backing", "habit")}
    return Combination(image_format, options, values["backing"], values["habit"])


def _chosen(choices: Choices, count: int) -> list[Values]:
    """First those in which a pair of values is new, then others."""
    candidates = [values for values in _all(choices) if _can_be(values)]
    random.Random(1).shuffle(candidates)
    chosen: list[Values] = []
    others: list[Values] = []
    seen: set[tuple[tuple[str, str], ...]] = set()
    for values in candidates:
        pairs = set(itertools.combinations(values.items(), 2))
        (others if pairs <= seen else chosen).append(values)
        seen |= pairs
    return chosen + others[: count - len(chosen)]


def _can_be(values: Values) -> bool:
    """Whether QEMU makes such a qcow2 image."""
    if values.get("extended_l2") == "on" and int(values["cluster_size"]) < 16 * KIB:
        return False
    if values["preallocation"] != "off" and values["backing"] != NO_BACKING:
        return False
    if values["preallocation"] != "off" and values["habit"] == COMPRESSED:
        return False  # for clusters that are there are not compressed any more
    # A cluster that a snapshot shares is counted twice.
    return values["habit"] != SNAPSHOT or values.get("refcount_bits") != "1"
