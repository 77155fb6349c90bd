"""What else people do with their images: QEMU's tools and blockd take turns with one image.

After each turn of a tool the disk has to be what it was, or what the tool was to make of it, for QEMU and
for blockd; then a guest of blockd changes it, and QEMU has to find nothing wrong.
"""

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blockd.cli.image.convert import Source, convert_image
from blockd.cli.image.create import NewImage
from blockd.units import KIB, MIB
from tests import qemu_img
from tests.chains import read_all
from tests.interop.peer import commands, judge
from tests.layers import change, opened
from tests.qemu_img import qemu

SIZE = 2 * MIB + 512
# In the words of a tool: the image, and a copy that takes its place.
DISK, COPY = "DISK", "COPY"

# By name: the format, and what qemu-img is told, turn by turn.
HABITS: dict[str, tuple[str, list[str]]] = {
    "resize": ("qcow2", [f"resize DISK {3 * MIB}", f"resize --shrink DISK {MIB + 512}"]),
    "resize QED": ("qed", [f"resize DISK {3 * MIB}", f"resize DISK {5 * MIB}"]),
    "resize raw": ("raw", [f"resize -f raw DISK {3 * MIB}", f"resize -f raw --shrink DISK {MIB}"]),
    "snapshots": (
        "qcow2",
        [f"snapshot {what} DISK" for what in ("-c one", "-c two", "-a one", "-d one", "-a two", "-d two")],
    ),
    "resize with snapshots": (
        "qcow2",
        ["snapshot -c one DISK", f"resize DISK {3 * MIB}", "snapshot -c two DISK", "snapshot -a one DISK"],
    ),
    "versions": ("qcow2", ["amend -o compat=0.10 DISK", "amend -o compat=1.1 DISK"]),
    "small refcounts": ("qcow2", ["amend -o refcount_bits=1 DISK"]),
    "large refcounts": ("qcow2", ["amend -o refcount_bits=64 DISK"]),
    "lazy refcounts": (
        "qcow2",
        ["amend -o lazy_refcounts=on DISK", "check -r all DISK", "amend -o lazy_refcounts=off DISK"],
    ),
    "compressed": ("qcow2", ["convert -c -O qcow2 DISK COPY", "convert -O qcow2 DISK COPY"]),
    "compressed with zstd": (
        "qcow2",
        ["convert -c -O qcow2 -o compression_type=zstd,cluster_size=8k DISK COPY"],
    ),
    "all clusters there": (
        "qcow2",
        ["convert -O qcow2 -S 0 DISK COPY", "convert -O qcow2 -o preallocation=metadata DISK COPY"],
    ),
    "copied by blocks": ("qcow2", ["dd -O qcow2 bs=4096 if=DISK of=COPY"]),
    "other backing": (
        "qcow2",
        ["rebase -u -b same.qcow2 -F qcow2 DISK", "rebase -b base.raw -F raw DISK", "rebase -b  DISK"],
    ),
    "other backing of QED": (
        "qed",
        ["rebase -u -b same.qcow2 -F qcow2 DISK", "rebase -b base.raw -F raw DISK"],
    ),
    "commit": ("qcow2", ["commit DISK", "commit -d DISK", "commit DISK"]),
    "commit of QED": ("qed", ["commit DISK", "commit DISK"]),
    "bitmaps": ("qcow2", ["bitmap --add DISK one", "check -r leaks DISK", "bitmap --add DISK two"]),
}


@dataclass
class Shared:
    """An image that QEMU's tools and blockd use by turns, and what has to be on the disk."""

    path: Path
    image_format: str
    content: bytearray
    snapshots: dict[str, bytes] = field(default_factory=dict)

    def tool(self, line: str) -> None:
        """Let qemu-img do something, and know what the disk holds then."""
        copy = self.path.with_name("copy")
        names = {DISK: str(self.path), COPY: str(copy)}
        words = []
        for word in line.split(" "):
            option, equals, value = word.rpartition("=")
            words.append(option + equals + names.get(value, value))
        qemu("qemu-img", *words)
        if copy.exists():
            copy.replace(self.path)
        if words[0] == "resize":
            size = int(words[-1])
            self.content = self.content[:size].ljust(size, b"\0")
        elif words[:2] == ["snapshot", "-c"]:
            self.snapshots[words[2]] = bytes(self.content)
        elif words[:2] == ["snapshot", "-a"]:
            self.content = bytearray(self.snapshots[words[2]])

    async def guest(self, rng: random.Random) -> None:
        """Let a guest of blockd look at everything, and change some of it."""
        async with opened(self.path, self.image_format) as disk:
            assert await read_all(disk.node) == self.content
            await change(disk.node, self.content, rng.randrange(1, 1000), rng)


def fill(path: Path, image_format: str, rng: random.Random) -> None:
    qemu_img.write(path, *commands(rng, SIZE, 64 * KIB, count=10), image_format=image_format)


def made(folder: Path, image_format: str, rng: random.Random) -> Shared:
    """An image over another one, where its format can be; its backing has a second name."""
    path, link = folder / f"disk.{image_format}", []
    if image_format != "raw":
        base = qemu_img.create(folder / "base.qcow2", SIZE)
        fill(base, "qcow2", rng)
        os.link(base, folder / "same.qcow2")
        qemu("qemu-img", "convert", "-O", "raw", base, folder / "base.raw")
        link = ["-b", base.name, "-F", "qcow2"]
    qemu("qemu-img", "create", "-q", "-f", image_format, *link, path, str(SIZE))
    fill(path, image_format, rng)
    return Shared(path, image_format, bytearray(qemu_img.content(path, image_format)))


@pytest.mark.slow
@pytest.mark.parametrize("habit", HABITS)
async def test_tools_and_guests_take_turns(habit: str, tmp_path: Path) -> None:
    image_format, lines = HABITS[habit]
    rng = random.Random(habit)
    shared = made(tmp_path, image_format, rng)
    for line in lines:
        shared.tool(line)
        judge(shared.path, image_format, shared.content, may_leak=True)
        await shared.guest(rng)
        judge(shared.path, image_format, shared.content, may_leak=habit == "bitmaps")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", ["cluster_size=64k", "cluster_size=512", "cluster_size=2M", "refcount_bits=64"]
)
async def test_a_copy_takes_no_more_than_is_measured(options: str, tmp_path: Path) -> None:
    source = made(tmp_path, "qcow2", random.Random(1)).path
    words = ("measure", "--output=json", "-f", "qcow2", "-O", "qcow2", "-o", options)
    required = json.loads(qemu("qemu-img", *words, source))["required"]
    target = tmp_path / "copy.qcow2"
    image = NewImage("qcow2").told([options])
    await convert_image(Source(str(source), "qcow2", []), str(target), image, lambda _: None)
    assert target.stat().st_size <= required
