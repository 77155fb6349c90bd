"""blockdev-reopen of a part of a raw file: guests see another part, and none of them another size."""

from pathlib import Path

from blockd.units import KIB
from tests.control.running import refusal, running
from tests.iotests_ideas.nodes import Options, add, export, file, reopen

SIZE = 64 * KIB


async def test_guests_see_another_part(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"a" * SIZE + b"b" * SIZE)
    node: Options = {"driver": "raw", "node-name": "n", "file": file(path), "offset": 0, "size": SIZE}
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, node)
        await export(client, "n")
        guest = await daemon.guest("n")
        assert await guest.read(0, SIZE) == b"a" * SIZE
        await reopen(client, {**node, "offset": SIZE})
        assert await guest.read(0, SIZE) == b"b" * SIZE
        await guest.write(0, b"c" * 512)
        for changed in ({"size": SIZE - 512}, {"size": SIZE + 512}, {"offset": 512, "size": 512}):
            found = await refusal(client, "blockdev-reopen", options=[{**node, **changed}])
            assert found[1].startswith(
                "Permission conflict on node 'n': permissions 'resize' are both required"
            )
            assert await guest.read(0, SIZE) == b"c" * 512 + b"b" * (SIZE - 512)
    assert path.read_bytes() == b"a" * SIZE + b"c" * 512 + b"b" * (SIZE - 512)
