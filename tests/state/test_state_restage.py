"""A restart with an image that cannot take what was kept of its guests' writes: it is left out alone."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chains import Chain, make
from tests.slow_source import speed_up, with_parts
from tests.state.restarts import Restarts
from tests.state.test_state_staged import disk, kept_files, stopped_with_staged_writes

_L1_TABLE_OFFSET = 40  # of the field in a qcow2 header
_NOWHERE = struct.pack(">Q", 1 << 40)


async def stopped(folder: Path) -> tuple[Chain, Chain, Restarts]:
    """A disk with staged writes that are kept, and another one."""
    chain, daemon = await disk(folder)
    (folder / "other").mkdir()
    other = await make(folder / "other", ["AB", "-X"])
    daemon.arguments += ["--device", f"vdb={other.active}"]
    await stopped_with_staged_writes(daemon, cancelled=True)
    return chain, other, daemon


def spoil(image: Path) -> Callable[[], int]:
    """Let an L2 table lie far behind the end of an image, which opens all the same; returns what mends it."""
    content = image.read_bytes()
    (table,) = struct.unpack_from(">Q", content, _L1_TABLE_OFFSET)
    image.write_bytes(content[:table] + _NOWHERE + content[table + len(_NOWHERE) :])
    return lambda: image.write_bytes(content)


async def test_disk_that_cannot_take_its_kept_writes_is_left_out(
    tmp_path: Path,
) -> None:
    chain, other, daemon = await stopped(tmp_path)
    [file] = kept_files(tmp_path)
    for run in range(2):
        mend = spoil(chain.active)
        client = await daemon.run()
        found = {thing["name"]: thing for thing in await client.command("query-left-out")}
        assert {name: thing["type"] for name, thing in found.items()} == {
            "disk": "node",
            "vda": "device",
            "e": "export",
        }
        assert f"guest writes kept in '{file.name}' cannot be staged again: " in found["disk"]["reason"]
        names = "device 'vda', export 'e', node 'disk'"
        assert daemon.stderr.count(f"{names} are not restored, and stay in the journal: ") == run + 1
        assert "disk" not in {node["node-name"] for node in await client.command("query-named-block-nodes")}
        assert [block["device"] for block in await client.command("query-block")] == ["vdb"]
        assert await daemon.content("vdb") == other.content
        # Another journal, several times.
        await client.command("object-add", {"qom-type": "throttle-group", "id": "t"})
        await client.command("object-del", id="t")
        assert await daemon.stop() == 0
        assert kept_files(tmp_path) == [file]
        mend()  # it was marked corrupt
    client = await daemon.run()
    assert await client.command("query-left-out") == []
    await speed_up(client)
    assert await daemon.content() == with_parts(chain)
    assert await daemon.stop() == 0


@pytest.mark.slow
async def test_strict_refuses_it(tmp_path: Path) -> None:
    chain, _, daemon = await stopped(tmp_path)
    before = daemon.journal
    spoil(chain.active)
    daemon.arguments += ["--state-restore", "strict"]
    with pytest.raises(AssertionError):
        await daemon.start()
    line = daemon.stderr.splitlines()[-1]
    assert line.startswith(f"blockd: --state-dir {tmp_path / 'state'}: node 'disk': guest writes kept in '")
    assert daemon.journal == before
    assert len(kept_files(tmp_path)) == 1


@pytest.mark.slow
async def test_nodes_above_it_are_left_out_too(tmp_path: Path) -> None:
    chain, daemon = await disk(tmp_path)
    above = '{"driver": "copy-on-read", "node-name": "above", "file": "disk"}'
    at = daemon.arguments.index("--device")
    daemon.arguments[at:at] = ["--blockdev", above]
    await stopped_with_staged_writes(daemon, cancelled=True)
    mend = spoil(chain.active)
    client = await daemon.run()
    names = {thing["name"] for thing in await client.command("query-left-out")}
    assert names == {"disk", "above", "vda", "e"}
    assert await daemon.stop() == 0
    mend()
    client = await daemon.run()
    assert await client.command("query-left-out") == []
    assert await daemon.stop() == 0
