"""A chain that two streams share: T → N → M → B1 → B0.

T has clusters of 128 KiB, N of 4 KiB, the others of 64 KiB. A stream into T goes down to M and one into M
down to B0. What T copies is not only N's: around what N holds the data come from M and below, of each
cluster first from B0 and then from B1. What M copies is B1's alone.
"""

import random
from pathlib import Path

from blockd.units import KIB
from tests import qemu_img

CLUSTER = 64 * KIB
SIZE = 8 * CLUSTER
NAMES = ["b0.raw", "b1.qcow2", "m.qcow2", "n.qcow2", "t.qcow2"]
CLUSTER_SIZES = {"n.qcow2": 4 * KIB, "t.qcow2": 2 * CLUSTER}
# What some layers hold, in each range of so many bytes: where, and how much.
HELD = {"b1.qcow2": (2 * CLUSTER, CLUSTER, CLUSTER), "n.qcow2": (CLUSTER, 8 * KIB, 4 * KIB)}


def make_chain(folder: Path) -> bytes:
    """The images; returns what a guest of the topmost one reads."""
    rng = random.Random(1)
    content = bytearray(rng.randbytes(SIZE))
    (folder / NAMES[0]).write_bytes(content)
    for name, below in zip(NAMES[1:], NAMES, strict=False):
        options = f"cluster_size={CLUSTER_SIZES.get(name, CLUSTER)}"
        below_format = below.rpartition(".")[2]
        qemu_img.create(folder / name, SIZE, options, backing=folder / below, backing_format=below_format)
    for name, (step, where, length) in HELD.items():
        commands = []
        for offset in range(where, SIZE, step):
            pattern = rng.randrange(1, 255)
            commands.append(f"write -P {pattern} {offset} {length}")
            content[offset : offset + length] = bytes([pattern]) * length
        qemu_img.write(folder / name, *commands)
    return bytes(content)
