"""The owner of a folder swaps links while an image in it is opened: at every step, and as fast as it can.

Whatever it does, only files that were allowed are ever opened, and what is open stays the file that it was.
"""

import ctypes
import errno
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

from blockd import filenames, found_files
from blockd.block.chain import chain
from blockd.block.node import BlockNode
from blockd.cli.image.create import NewImage, create_image
from blockd.drivers import NodeGraph
from blockd.drivers.sharing import file_of, files_of
from blockd.errors import BlockdError
from blockd.protocols import new_file, opening
from blockd.protocols.file_status import status_of_name
from tests.descriptors import open_files
from tests.inline_threads import use_inline_threads

SIZE = 64 * 1024
SECRET = b"secret!!" * (SIZE // 8)
# More steps than any opening has.
STEP_COUNT_MAX = 1000
RACE_COUNT = 150


class Swap(Protocol):
    """Puts the innocent file in the place of a name, or the other one, in one step."""

    def __call__(self, *, is_swapped: bool) -> None: ...


class Scene(NamedTuple):
    """What is opened, and what the attacker can do."""

    image: Path
    image_format: str
    read_only: bool
    swap: Swap


def link_to(link: Path, innocent: Path, other: Path) -> Swap:
    """A link that leads to one or the other."""

    def put(*, is_swapped: bool) -> None:
        new = link.with_name(f"{link.name}.new")
        new.symlink_to(other if is_swapped else innocent)
        new.replace(link)

    put(is_swapped=False)
    return put


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that no image may name."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("base.raw", "secret.raw"):
        (folder / name).write_bytes(SECRET)
    return folder / "secret.raw"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the attacker."""
    folder = tmp_path / "folder"
    (folder / "real").mkdir(parents=True)
    (folder / "real" / "base.raw").write_bytes(b"base" * (SIZE // 4))
    return folder


async def linked_base(folder: Path, secret: Path) -> Scene:
    swap = link_to(folder / "link.raw", folder / "real" / "base.raw", secret)
    await create_image(str(folder / "top.qcow2"), NewImage("qcow2", SIZE, "link.raw", "raw"))
    return Scene(folder / "top.qcow2", "qcow2", True, swap)


async def linked_folder(folder: Path, secret: Path) -> Scene:
    swap = link_to(folder / "sub", folder / "real", secret.parent)
    await create_image(str(folder / "top.qcow2"), NewImage("qcow2", SIZE, "sub/base.raw", "raw"))
    return Scene(folder / "top.qcow2", "qcow2", True, swap)


async def own_folder(folder: Path, secret: Path) -> Scene:
    """The folder that a user has named the image through."""
    swap = link_to(folder / "vm", folder / "real", secret.parent)
    await create_image(str(folder / "real" / "top.qcow2"), NewImage("qcow2", SIZE, "base.raw", "raw"))
    return Scene(folder / "vm" / "top.qcow2", "qcow2", True, swap)


async def farm_of_links(folder: Path, secret: Path) -> Scene:
    """A folder outside where anybody may put a link, back to an image inside: its names count from there."""
    (secret.parent / "mid.qcow2").symlink_to(folder / "real" / "mid.qcow2")
    swap = link_to(folder / "sub", folder / "real", secret.parent)
    await create_image(str(folder / "real" / "mid.qcow2"), NewImage("qcow2", SIZE, "base.raw", "raw"))
    await create_image(str(folder / "top.qcow2"), NewImage("qcow2", SIZE, "sub/mid.qcow2", "qcow2"))
    return Scene(folder / "top.qcow2", "qcow2", True, swap)


async def fifo(folder: Path, secret: Path) -> Scene:
    os.mkfifo(folder / "fifo")
    swap = link_to(folder / "link.raw", folder / "real" / "base.raw", folder / "fifo")
    await create_image(str(folder / "top.qcow2"), NewImage("qcow2", SIZE, "link.raw", "raw"))
    return Scene(folder / "top.qcow2", "qcow2", True, swap)


async def add_cow_image(folder: Path, secret: Path) -> Scene:
    """It is opened to be written."""
    new = NewImage("add-cow", SIZE, options={"image_file": "real/image.raw"})
    await create_image(str(folder / "top.add-cow"), new)
    (folder / "real" / "image.raw").rename(folder / "image.raw")
    swap = link_to(folder / "real" / "image.raw", folder / "image.raw", secret)
    return Scene(folder / "top.add-cow", "add-cow", False, swap)


MakeScene = Callable[[Path, Path], Awaitable[Scene]]
SCENES: list[MakeScene] = [linked_base, linked_folder, own_folder, farm_of_links, fifo, add_cow_image]


class Steps:
    """The system calls of finding and opening files, as steps: before step `swap_at` the attacker swaps."""

    def __init__(self, swap_at: int, swap: Callable[[], None]) -> None:
        self.count = 0
        # Which files were really opened, if only for a moment.
        self.opened: list[os.stat_result] = []
        self._swap_at = swap_at
        self._swap = swap

    def __getattr__(self, name: str) -> object:
        found = getattr(os, name)
        return self._stepping(found, is_open=name == "open") if callable(found) else found

    def _stepping(self, call: Callable[..., object], *, is_open: bool) -> Callable[..., object]:
        def stepping(*arguments: object, **more: object) -> object:
            self.step()
            result = call(*arguments, **more)
            if is_open and not int(str(arguments[1])) & os.O_PATH:
                self.opened.append(os.fstat(int(str(result))))
            return result

        return stepping

    def step(self) -> None:
        self.count += 1
        if self.count == self._swap_at:
            self._swap()


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, steps: Steps, *, has_openat2: bool) -> Iterator[None]:
    syscall = found_files._syscall

    def stepping(*arguments: object) -> int:
        steps.step()
        if not has_openat2:
            ctypes.set_errno(errno.ENOSYS)
            return -1
        return int(syscall(*arguments))

    with monkeypatch.context() as patch:
        for module in (filenames, found_files, opening, new_file):
            patch.setattr(module, "os", steps)
        patch.setattr(found_files, "_syscall", stepping)
        yield


def identities(top: BlockNode) -> set[tuple[int, int]]:
    return {file.identity() for node in chain(top) for file in files_of(node)}


def forbidden(secret: Path) -> set[tuple[int, int]]:
    return {status_of_name(str(path)).identity for path in secret.parent.glob("*.raw")}


def schedules(scene: Scene) -> Iterator[Steps]:
    """All of them: a swap before every step there is, either way."""
    for is_swapped in (True, False):
        for swap_at in range(1, STEP_COUNT_MAX):
            scene.swap(is_swapped=not is_swapped)
            yield (steps := Steps(swap_at, partial(scene.swap, is_swapped=is_swapped)))
            if steps.count < swap_at:
                break


@pytest.mark.parametrize("has_openat2", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", SCENES)
async def test_at_every_step(
    folder: Path, secret: Path, monkeypatch: pytest.MonkeyPatch, make: MakeScene, has_openat2: bool
) -> None:
    scene = await make(folder, secret)
    use_inline_threads()
    outcomes = set()
    for steps in schedules(scene):
        before = open_files()
        graph = NodeGraph()
        with watched(monkeypatch, steps, has_openat2=has_openat2):
            try:
                top = await graph.open_image(str(scene.image), scene.image_format, read_only=scene.read_only)
                assert not identities(top) & forbidden(secret)
                outcomes.add("opened")
            except BlockdError:
                outcomes.add("refused")
            await graph.close()
        assert not {(status.st_dev, status.st_ino) for status in steps.opened} & forbidden(secret)
        assert open_files() <= before
    assert outcomes == {"opened", "refused"}
    assert {path.read_bytes() for path in secret.parent.glob("*.raw")} == {SECRET}


async def test_only_what_was_opened_is_allowed(
    folder: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user names `disk.qcow2`, for a moment a link to the secret; a later image names the secret."""
    swap = link_to(folder / "disk.qcow2", folder / "real" / "top.qcow2", secret)
    await create_image(str(folder / "real" / "top.qcow2"), NewImage("qcow2", SIZE, str(secret), "raw"))
    scene = Scene(folder / "disk.qcow2", "qcow2", True, swap)
    use_inline_threads()
    for steps in schedules(scene):
        graph = NodeGraph()
        with watched(monkeypatch, steps, has_openat2=True), pytest.raises(BlockdError):
            await graph.open_image(str(scene.image), "qcow2", read_only=True)
        swap(is_swapped=False)
        with pytest.raises(BlockdError, match="outside the folder of the image"):
            await graph.open_image(str(scene.image), "qcow2", read_only=True)
        assert graph.image_paths.allowed_files == []


async def test_what_is_open_stays_the_same_file(folder: Path, secret: Path) -> None:
    """Opened again to be written, locked, synced and measured: all without its name."""
    path = folder / "real" / "base.raw"
    swap = link_to(folder / "disk.raw", path, secret)
    graph = NodeGraph()
    disk = await graph.open_image(str(folder / "disk.raw"), "raw", read_only=True)
    swap(is_swapped=True)
    await graph.set_read_only(disk, False)
    await disk.write(0, b"guest")
    await disk.flush()
    file = file_of(disk)
    assert file is not None
    assert await file.disk_usage() == path.stat().st_blocks * 512
    await graph.close()
    assert path.read_bytes()[:5] == b"guest"
    assert secret.read_bytes() == SECRET


async def test_new_file_is_removed_from_where_it_was_made(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "new.qcow2").write_bytes(b"precious")
    swap = link_to(folder / "sub", folder / "real", other)
    with pytest.raises(ZeroDivisionError):
        async with new_file.new_file(str(folder / "sub" / "new.qcow2")):
            swap(is_swapped=True)
            raise ZeroDivisionError
    assert (other / "new.qcow2").read_bytes() == b"precious"
    assert not (folder / "real" / "new.qcow2").exists()


@pytest.mark.slow
@pytest.mark.parametrize("make", SCENES)
async def test_as_fast_as_it_can(folder: Path, secret: Path, make: MakeScene) -> None:
    """A race that is no schedule: it is lost within ten openings where check and open are two steps."""
    scene = await make(folder, secret)
    is_over = threading.Event()
    swaps = 0

    def swap() -> None:
        nonlocal swaps
        while not is_over.is_set():
            scene.swap(is_swapped=bool(swaps % 2))
            swaps += 1

    attacker = threading.Thread(target=swap)
    attacker.start()
    try:
        for opening_count in count():
            if opening_count >= RACE_COUNT and swaps >= RACE_COUNT:
                break
            graph = NodeGraph()
            with suppress(BlockdError):
                top = await graph.open_image(str(scene.image), scene.image_format, read_only=scene.read_only)
                assert not identities(top) & forbidden(secret)
            await graph.close()
    finally:
        is_over.set()
        attacker.join()
    assert {path.read_bytes() for path in secret.parent.glob("*.raw")} == {SECRET}
