"""A file that was made stays what was made, when it is opened again and when it is removed."""

from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path

import pytest

from blockd.block.image_paths import ImagePaths
from blockd.cli.image.convert import Source, convert_image
from blockd.cli.image.create import NewImage
from blockd.devices.changes import make_changes
from blockd.devices.device import Devices
from blockd.devices.overlays import SnapshotInFile
from blockd.devices.streams import Streams
from blockd.drivers import NodeGraph
from blockd.errors import BlockdError
from blockd.jobs.manager import JobManager
from blockd.protocols.new_file import MadeFile, NewFile
from blockd.units import MIB
from tests.descriptors import open_files
from tests.streaming import Observer

PRECIOUS = b"precious" * 1000
FORMATS = ["qcow2", "qed", "add-cow"]

Work = Callable[[Path, Path, str], Coroutine[object, object, None]]


class Ended(RuntimeError):
    """What ends the work in the midst of it."""


@pytest.fixture
def swap(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Whoever owns the folder puts other files in the place of those that were made, once they are there."""
    real = NewFile.made_blocking

    def swap(folder: Path) -> None:
        def made(file: NewFile) -> list[MadeFile]:
            found = real(file)
            for path in folder.iterdir():
                path.rename(path.with_name(f"away-{path.name}"))
                path.write_bytes(PRECIOUS)
            return found

        monkeypatch.setattr(NewFile, "made_blocking", made)

    return swap


def assert_untouched(folder: Path) -> None:
    """What was put there is there, and holds what it held."""
    put = [path for path in folder.iterdir() if not path.name.startswith("away-")]
    assert put
    assert all(path.read_bytes() == PRECIOUS for path in put)


async def snapshot(base: Path, target: Path, image_format: str) -> None:
    graph = NodeGraph(ImagePaths())
    try:
        devices = Devices(graph)
        devices.add("vda", await graph.open_image(str(base), "raw", read_only=False))
        async with JobManager(Observer()) as jobs:
            change = SnapshotInFile(
                devices,
                Streams(devices, jobs),
                device="vda",
                node_name=None,
                filename=str(target),
                overlay_name=None,
                format_name=image_format,
                is_existing=False,
            )
            await make_changes(devices, [change])
            top = devices.get("vda").root.top
            await top.write(0, b"guest")
            await top.flush()
    finally:
        await graph.close()


async def convert_to(base: Path, target: Path, image_format: str) -> None:
    await convert_image(
        Source(str(base), "raw", []), str(target), NewImage(image_format, None), lambda _: None
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(b"base" * (MIB // 4))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of somebody else."""
    path = tmp_path / "folder"
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("work", "image_format"),
    [*((snapshot, name) for name in FORMATS), *((convert_to, name) for name in [*FORMATS, "raw"])],
)
async def test_what_was_made_is_what_is_used(
    base: Path, folder: Path, swap: Callable[[Path], None], work: Work, image_format: str
) -> None:
    """blockd goes on in what it made, or refuses; what is in its place by now stays untouched."""
    swap(folder)
    with suppress(BlockdError, ExceptionGroup):  # the image of an add-cow file is looked for by its name
        await work(base, folder / f"made.{image_format}", image_format)
    assert_untouched(folder)
    assert base.read_bytes() == b"base" * (MIB // 4)


@pytest.mark.parametrize("work", [snapshot, convert_to])
@pytest.mark.parametrize("image_format", FORMATS)
async def test_what_was_made_is_removed_when_nothing_comes_of_it(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, work: Work, image_format: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Ended

    monkeypatch.setattr(NodeGraph, "open_overlay", fail)
    before = open_files()
    with pytest.raises((Ended, ExceptionGroup)):
        await work(base, folder / f"made.{image_format}", image_format)
    assert list(folder.iterdir()) == []
    assert open_files() <= before
