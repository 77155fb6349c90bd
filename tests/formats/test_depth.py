"""In which layer of a chain data is, however many parts are told at once."""

from pathlib import Path

import pytest

from blockd.block import depth
from blockd.block.node import BlockNode
from blockd.drivers import NodeGraph
from blockd.units import KIB, MIB
from tests import qemu_img

CLUSTER = 64 * KIB


async def all_depths(node: BlockNode) -> list[int]:
    """The layer of each cluster."""
    found: list[int] = []
    while (offset := len(found) * CLUSTER) < node.size:
        parts = await depth.depths(node, offset, node.size - offset)
        assert all(length > 0 and length % CLUSTER == 0 for length, _ in parts)
        found += [layer for length, layer in parts for _ in range(length // CLUSTER)]
    assert len(found) * CLUSTER == node.size
    return found


@pytest.mark.parametrize("part_count_max", [1, 2, 3, 5, 1024])
async def test_layers_of_a_chain(
    part_count_max: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depth, "PART_COUNT_MAX", part_count_max)
    sizes = {"base.qcow2": MIB, "mid.qcow2": MIB // 2, "top.qcow2": MIB}
    below = None
    for number, (name, size) in enumerate(sizes.items()):
        below = qemu_img.create(tmp_path / name, size, backing=below)
        writes = [f"write {start * CLUSTER} 64k" for start in range(number, size // CLUSTER, number + 2)]
        qemu_img.write(below, *writes)
    graph = NodeGraph()
    node = await graph.open_image(str(tmp_path / "top.qcow2"), None, read_only=True)
    top = set(range(2, 16, 4))
    middle, base = set(range(1, 8, 3)), set(range(0, 16, 2))
    assert await all_depths(node) == [
        1 if number in top else 2 if number in middle or number >= 8 else 3 if number in base else 0
        for number in range(16)
    ]
    await graph.close()
