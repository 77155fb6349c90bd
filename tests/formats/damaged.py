"""Qcow2 images whose tables a test can spoil."""

import random
from collections.abc import Callable
from pathlib import Path

COPIED = 1 << 63
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00


class Image:
    """An image file with its first tables; every change goes to the file at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())
        self.version = self.get(4, 4)
        self.cluster_bits = self.get(20, 4)
        self.cluster_size = 1 << self.cluster_bits
        self.l1 = self.get(40)
        self.l2 = self.get(self.l1) & OFFSET_MASK
        self.entry_size = 16 if self.version > 2 and self.get(72) & 1 << 4 else 8
        self.refcount_table = self.get(48)
        self.refcount_block = self.get(self.refcount_table)
        self.refcount_bits = 1 << self.get(96, 4) if self.version > 2 else 16

    def get(self, offset: int, width: int = 8) -> int:
        return int.from_bytes(self.data[offset : offset + width], "big")

    def put(self, offset: int, value: int, width: int = 8) -> None:
        self.data[offset : offset + width] = value.to_bytes(width, "big")
        self.path.write_bytes(self.data)

    def change(self, offset: int, change: Callable[[int], int]) -> None:
        self.put(offset, change(self.get(offset)))

    def refcount_at(self, cluster_offset: int) -> int:
        """Where the refcount of a cluster stands (16 bits)."""
        return self.refcount_block + 2 * (cluster_offset >> self.cluster_bits)

    def append_cluster(self, refcount: int) -> None:
        self.data.extend(bytes(2 * self.cluster_size))
        self.put(self.refcount_at(len(self.data) - 1), refcount, 2)

    def data_cluster(self, index: int) -> int:
        return self.get(self.l2 + self.entry_size * index) & ~COPIED

    def refcount_blocks(self) -> list[int]:
        """Where all refcount blocks are."""
        clusters = self.get(56, 4)
        table = range(self.refcount_table, self.refcount_table + clusters * self.cluster_size, 8)
        return [block for entry in table if (block := self.get(entry))]

    def spoil_refcounts(self, rng: random.Random, share: float) -> None:
        """Change a share of the bytes of the refcounts, at least one."""
        cluster_count = len(self.data) >> self.cluster_bits
        used = -(-cluster_count * self.refcount_bits // 8)
        for block in self.refcount_blocks():
            places = range(block, block + min(used, self.cluster_size))
            for offset in rng.sample(places, max(1, int(len(places) * share))):
                self.data[offset] ^= rng.randrange(1, 256)
        self.path.write_bytes(self.data)

    def fill(self, offset: int, byte: int) -> None:
        """Put one byte over a whole cluster."""
        self.data[offset : offset + self.cluster_size] = bytes([byte]) * self.cluster_size
        self.path.write_bytes(self.data)
