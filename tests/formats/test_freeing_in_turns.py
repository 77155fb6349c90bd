"""Freeing many clusters keeps nobody waiting: others have a turn of the event loop after some of them."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockd.drivers import NodeGraph
from blockd.formats.qcow2.allocator import DROPS_A_TURN, FREED_AT_ONCE_MAX, Allocator
from blockd.formats.qcow2.image import Qcow2Image
from blockd.protocols.file import FileNode
from blockd.units import GIB, KIB, MIB
from tests import qemu_img
from tests.many.steps import counted

# How many clusters are freed between two turns of another task.
MOST = (DROPS_A_TURN + 1) * FREED_AT_ONCE_MAX


class Steps:
    """Counts clusters, and how many there were at most between two turns of a task that always wants one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.total = self.most = self._count = 0

    def count(self, name: str, weight: Callable[..., int]) -> None:
        real = getattr(Allocator, name)

        def counting(*arguments: Any) -> Any:
            result = real(*arguments)
            self.total += (steps := weight(result, *arguments))
            self._count += steps
            self.most = max(self.most, self._count)
            return result

        self._monkeypatch.setattr(Allocator, name, counting)

    async def take_turns(self) -> None:
        while True:
            self._count = 0
            await asyncio.sleep(0)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    found = Steps(monkeypatch)
    found.count("free", lambda _, allocator, run: run.cluster_count)
    found.count("_drop_part", lambda cluster_count, *_: cluster_count)
    return found


@pytest.mark.parametrize("how", ["discard", "write_zeroes", "close"])
@pytest.mark.parametrize("extended", ["off", "on"])
async def test_a_discard_of_much_leaves_turns_to_others(
    tmp_path: Path, steps: Steps, how: str, extended: str
) -> None:
    options = "preallocation=metadata", f"extended_l2={extended}", "cluster_size=16k"
    path = qemu_img.create(tmp_path / "disk.qcow2", GIB // 8, *options)
    cluster_count = GIB // 8 // (16 * KIB)
    graph = NodeGraph()
    image = await graph.open_image(str(path), "qcow2", read_only=False)
    others = asyncio.create_task(steps.take_turns())
    if how == "write_zeroes":
        await image.write_zeroes(0, image.size)
    else:
        await image.discard(0, image.size)
    if how != "close":
        await image.flush()
    await graph.close()
    others.cancel()
    assert steps.total == 2 * cluster_count, "each is taken from the map and from the refcounts"
    assert steps.most <= MOST < cluster_count
    qemu_img.assert_sound(path)
    assert path.stat().st_blocks * 512 < MIB


@pytest.mark.parametrize("cluster_bits", [12, 16])
async def test_what_is_freed_together_is_punched_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster_bits: int
) -> None:
    """A call for each few clusters takes the filesystem a minute for what it does at once in a moment."""
    size = 16384 << cluster_bits
    options = "preallocation=metadata", f"cluster_size={1 << cluster_bits}"
    path = qemu_img.create(tmp_path / "disk.qcow2", size, *options)
    graph = NodeGraph()
    image = await graph.open_image(str(path), "qcow2", read_only=False)
    punched: list[int] = []
    real = FileNode.punch_hole_blocking

    def punch(file: FileNode, offset: int, length: int) -> None:
        punched.append(length)
        real(file, offset, length)

    monkeypatch.setattr(FileNode, "punch_hole_blocking", punch)
    await image.discard(0, size)
    await image.flush()
    assert sum(punched) == size
    assert len(punched) <= 64, "as many as there are tables in between"
    await graph.close()
    qemu_img.assert_sound(path)


@pytest.mark.parametrize("refcount_bits", [1, 4, 16, 64])
async def test_what_a_read_may_have_planned_is_withheld_in_memory_only(
    tmp_path: Path, refcount_bits: int
) -> None:
    path = qemu_img.create(tmp_path / "disk.qcow2", MIB, f"refcount_bits={refcount_bits}", "cluster_size=4k")
    graph = NodeGraph()
    image = await graph.open_image(str(path), "qcow2", read_only=False)
    assert isinstance(image, Qcow2Image)
    allocator = image.metadata.allocator
    await image.write(0, b"1" * 64 * KIB)
    await image.flush()
    with allocator.plan():
        await image.discard(16 * KIB, 32 * KIB)
        await image.flush()
        verdict = qemu_img.check(path, is_in_use=True)
        assert verdict is not None
        assert (verdict.corruptions, verdict.leaks, verdict.allocated_clusters) == (0, 0, 8)
        allocator.cache.tables.clear()  # as if others had taken its place
        await image.write(512 * KIB, b"2" * 64 * KIB)
        assert await image.read(0, 16 * KIB) == b"1" * 16 * KIB
        end = path.stat().st_size
    await image.flush()
    await image.write(128 * KIB, b"3" * 32 * KIB)
    assert path.stat().st_size == end, "what was withheld is used again"
    assert await image.read(512 * KIB, 64 * KIB) == b"2" * 64 * KIB
    await graph.close()
    qemu_img.assert_sound(path)


@pytest.mark.parametrize("cluster_count", [1, 3, 40])
async def test_neighbours_are_found_in_a_full_image_without_a_look_at_each_cluster(
    tmp_path: Path, cluster_count: int
) -> None:
    steps_of = {}
    for size in (64 * MIB, 256 * MIB):
        options = "preallocation=metadata", "cluster_size=4k"
        path = qemu_img.create(tmp_path / f"{size}.qcow2", size, *options)
        graph = NodeGraph()
        image = await graph.open_image(str(path), "qcow2", read_only=False)
        assert isinstance(image, Qcow2Image)
        with counted() as steps:
            run = await image.metadata.allocator.allocate_contiguous(cluster_count)
        steps_of[size] = steps.count
        assert run is not None
        assert run.host_offset >= size
        await graph.close()
    assert steps_of[256 * MIB] < steps_of[64 * MIB] + 192 * MIB // (4 * KIB) // 4
