"""Every kind of image that QEMU makes: read here, written here, streamed here, and QEMU is content with it.

Each combination goes the whole way. QEMU makes the image and fills it, and blockd has to read the same.
blockd writes to it and streams it, into itself if it has a backing file, else into a new one that blockd
makes with the same options; QEMU has to find nothing wrong, read the same, and go on writing.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.cli.image.convert import Source, convert_image
from blockd.cli.image.create import NewImage
from tests import qemu_img
from tests.chains import read_all
from tests.interop.combinations import (
    BACKINGS,
    BITMAP,
    COMPRESSED,
    NO_BACKING,
    SNAPSHOT,
    Combination,
    combinations,
)
from tests.interop.peer import commands, judge, kind_of
from tests.layers import change, opened
from tests.qemu_img import qemu

# One in so many is tried in `make test-fast`, too.
FAST_EVERY = 40

ALL = list(combinations())


def _parameters() -> Iterator[object]:
    for number, combination in enumerate(ALL):
        marks = () if number % FAST_EVERY == 0 else pytest.mark.slow
        yield pytest.param(combination, id=str(combination), marks=marks)


@pytest.fixture(scope="module")
def backings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The images that others stand on, made and filled by QEMU."""
    folder = tmp_path_factory.mktemp("backings")
    paths = {name: folder / f"base.{name}" for name in BACKINGS}
    for name, path in paths.items():
        qemu("qemu-img", "create", "-q", "-f", name, path, str(BACKINGS[name]))
        rng = random.Random(name)
        qemu_img.write(path, *commands(rng, BACKINGS[name], 65536, count=12), image_format=name)
    return paths


def make_with_qemu(combination: Combination, path: Path, backing: Path | None) -> None:
    image_format, size, cluster_size = combination.image_format, combination.size, combination.cluster_size
    link = ["-b", backing.name, "-F", combination.backing] if backing else []
    options = [word for name, value in combination.options.items() for word in ("-o", f"{name}={value}")]
    qemu("qemu-img", "create", "-q", "-f", image_format, *options, *link, path, str(size))
    rng = random.Random(str(combination))
    if combination.habit == COMPRESSED:
        clusters = rng.sample(range(size // cluster_size), 2)
        qemu_img.write(
            path, *(f"write -c -P 99 {cluster * cluster_size} {cluster_size}" for cluster in clusters)
        )
    elif combination.habit == BITMAP:
        qemu("qemu-img", "bitmap", "--add", path, "bitmap")
    elif combination.habit == SNAPSHOT:
        qemu_img.write(path, *commands(rng, size, cluster_size, count=4))
        qemu("qemu-img", "snapshot", "-c", SNAPSHOT, path)
    qemu_img.write(path, *commands(rng, size, cluster_size, count=6), image_format=image_format)


@pytest.mark.parametrize("combination", list(_parameters()))
async def test_image_of_qemu(combination: Combination, tmp_path: Path, backings: dict[str, Path]) -> None:
    image_format, rng = combination.image_format, random.Random(str(combination))
    path, backing = tmp_path / f"disk.{image_format}", None
    if combination.backing != NO_BACKING:
        backing = tmp_path / backings[combination.backing].name
        os.link(backings[combination.backing], backing)
    make_with_qemu(combination, path, backing)
    before = qemu_img.content(path, snapshot=SNAPSHOT) if combination.habit == SNAPSHOT else None
    content = bytearray(qemu_img.content(path, image_format))
    async with opened(path, image_format, read_only=True) as disk:
        assert await read_all(disk.node) == content
    async with opened(path, image_format) as disk:
        await change(disk.node, content, 1, rng)
        assert await read_all(disk.node) == content
        if backing and before is None:
            await disk.stream(None)
    if backing and before is None:
        backing.unlink()
    # A bitmap does not know of what was written here. It is dropped, as the specification says; a check
    # finds the clusters that it had.
    judge(path, image_format, content, may_leak=combination.habit == BITMAP)
    assert before is None or qemu_img.content(path, snapshot=SNAPSHOT) == before
    if backing is None or before is not None:
        path = await copied(combination, path)
        judge(path, image_format, content)
    qemu_img.write(path, "write -P 7 1000k 70k", "read -P 7 1000k 70k", image_format=image_format)


async def copied(combination: Combination, path: Path) -> Path:
    """Stream an image into a new one, which blockd makes with the same options."""
    target = path.with_name("copy")
    options = [f"{name}={value}" for name, value in combination.options.items() if name != "preallocation"]
    image = NewImage(combination.image_format).told(options)
    await convert_image(Source(str(path), combination.image_format, []), str(target), image, lambda _: None)
    assert kind_of(target, combination.image_format) == kind_of(path, combination.image_format)
    return target


def test_there_are_enough_of_them() -> None:
    assert len({str(combination) for combination in ALL}) > 300
