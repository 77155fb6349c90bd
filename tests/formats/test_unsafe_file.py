"""cache.no-flush: nothing is brought to the disk, as the client has asked for."""

import os
from pathlib import Path

import pytest

from blockd.drivers import NodeGraph
from tests import qemu_img


@pytest.mark.parametrize("no_flush", [False, True])
async def test_a_flush_syncs_unless_told_otherwise(
    no_flush: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = qemu_img.create(tmp_path / "disk.qcow2", 1 << 20)
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    graph = NodeGraph()
    file = {"driver": "file", "filename": str(path)}
    options = {"driver": "qcow2", "node-name": "n", "file": file, "cache": {"no-flush": no_flush}}
    image = await graph.open(options)
    await image.write(0, b"g" * 4096)
    await image.flush()
    assert bool(synced) != no_flush
    await graph.close()
    assert bool(synced) != no_flush
    qemu_img.assert_sound(path)
