"""Images as people leave them, made quickly: fragmented, or full of clusters that hold nothing."""

import shutil
from pathlib import Path

from blockd.units import GIB, KIB, MIB
from tests import qemu_img

SIZE = 32 * MIB
FULL_SIZE = 2 * GIB
# By name: its format, its options, and of how many bytes every other piece is written.
FRAGMENTED = {
    "clusters-4k": ("qcow2", "cluster_size=4k", 4 * KIB),
    "clusters-64k": ("qcow2", "cluster_size=64k", 4 * KIB),
    "clusters-2m": ("qcow2", "cluster_size=2M", 4 * MIB),
    "extended": ("qcow2", "extended_l2=on", 2 * KIB),
    "qed": ("qed", "cluster_size=4k", 4 * KIB),
}
FULL = {"full-4k": "cluster_size=4k", "full-64k": "cluster_size=64k"}


def make_all(folder: Path) -> dict[str, str]:
    """Make all of them in a folder; returns their formats by name, which is that of the file too.

    Those that are fragmented are overlays of `base`, which is full.
    """
    base = folder / "base"
    base.write_bytes(bytes([7]) * SIZE)
    for name, (image_format, option, piece) in FRAGMENTED.items():
        _fragmented(folder / name, image_format, option, piece)
    for name, option in FULL.items():
        qemu_img.create(folder / name, FULL_SIZE, "preallocation=metadata", option)
    return {name: row[0] for name, row in FRAGMENTED.items()} | dict.fromkeys(FULL, "qcow2")


def _fragmented(path: Path, image_format: str, option: str, piece: int) -> None:
    content = path.with_name("content")
    content.write_bytes((bytes([9]) * piece + bytes(piece)) * (SIZE // (2 * piece)))
    words = ["-q", "-S", "2k", "-t", "unsafe", "-f", "raw", "-O", image_format, "-o", option]
    qemu_img.qemu("qemu-img", "convert", *words, content, path)
    qemu_img.qemu(
        "qemu-img", "rebase", "-q", "-u", "-t", "unsafe", "-f", image_format, "-b", "base", "-F", "raw", path
    )


def make_small(folder: Path, count: int) -> list[str]:
    """Make many small overlays of `base`."""
    first = folder / "first"
    qemu_img.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "base", "-F", "raw", first, "1M")
    names = [f"disk{number}" for number in range(count)]
    for name in names:
        shutil.copyfile(first, folder / name)
    return names
