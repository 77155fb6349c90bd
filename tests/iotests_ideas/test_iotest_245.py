"""blockdev-reopen: QEMU's iotest 245."""

from pathlib import Path

import pytest

from tests import qemu_img
from tests.chains import Chain, make
from tests.control.running import refusal, running
from tests.iotests_ideas.nodes import (
    Options,
    add,
    add_chain,
    export,
    file,
    finished,
    nodes_of,
    qcow2,
    reopen,
    stream,
    throttle,
)
from tests.model import cluster
from tests.qmp_client import QmpClient

LAYERS = ["AB0-A-AB", "-C-C--0-", "D------D"]
CLUSTER = 65536


@pytest.fixture
async def chain(tmp_path: Path) -> Chain:
    return await make(tmp_path, LAYERS)


async def refused(client: QmpClient, *nodes: Options) -> str:
    """The text of the refusal; nothing has changed."""
    before = await arrangement(client)
    error_class, text = await refusal(client, "blockdev-reopen", options=list(nodes))
    assert error_class == "GenericError"
    assert await arrangement(client) == before
    return text


async def arrangement(client: QmpClient) -> dict[str, tuple[object, ...]]:
    """What of every node can be changed; its size on the disk is another matter."""
    members = ("drv", "file", "ro", "backing_file")
    return {
        name: tuple(node.get(member) for member in members) for name, node in (await nodes_of(client)).items()
    }


async def test_what_cannot_be_changed(chain: Chain) -> None:
    """Mirrors test_incorrect_parameters_single_file."""
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        node = qcow2("n", file(chain.paths[0], node_name="f"), backing=None)
        await add(client, node)
        for same in (node, {**node, "file": "f"}, {**node, "file": file(chain.paths[0])}):
            await reopen(client, same)
        told: Options = {**node, "file": "f"}
        cases: list[tuple[Options, str]] = [
            ({**told, "node-name": "nope"}, "Failed to find node with node-name='nope'"),
            ({**told, "driver": "raw"}, "Parameter 'options[0].backing' is unexpected"),
            ({**told, "driver": ""}, "Parameter 'driver' does not accept value ''"),
            ({**told, "driver": 1}, "Invalid parameter type for 'options[0].driver', expected: string"),
            ({**told, "file": "nope"}, "Cannot find device='' nor node-name='nope'"),
            ({**told, "file": None}, "Invalid parameter type for 'options[0].file', expected: BlockdevRef"),
            ({**node, "file": file("other")}, "Cannot change the option 'filename'"),
            (
                {**node, "file": file(chain.paths[0], node_name="other")},
                "Cannot change the option 'node-name'",
            ),
            ({**node, "file": file(chain.paths[0], locking="off")}, "Cannot change the option 'locking'"),
            ({**told, "zap": 1}, "Parameter 'options[0].zap' is unexpected"),
            ({name: value for name, value in told.items() if name != "node-name"}, "node-name not specified"),
        ]
        for options, text in cases:
            assert await refused(client, options) == text
        assert await refused(client, {**told, "driver": "qcow2"}, {"driver": "qcow2"}) == (
            "Parameter 'options[1].file' is missing"
        )


async def test_backing_has_to_be_said(chain: Chain) -> None:
    """Mirrors test_incorrect_parameters_backing_file and test_missing_backing_options_1 and _2."""
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        node = qcow2("n1", chain.paths[1])
        await add(client, node)
        assert await refused(client, node) == "backing is missing for 'n1'"
        below = daemon.services.graph["n1"].backing
        assert below is not None
        await reopen(client, {**node, "backing": below.node_name})
        text = "Cannot find device='' nor node-name='nope'"
        assert await refused(client, {**node, "backing": "nope"}) == text
        # The backing was opened along with the node: it can be told its options again.
        inner: Options = {"driver": "qcow2", "file": file(chain.paths[0])}
        await reopen(client, {**node, "backing": inner})
        other = {**inner, "file": file("other")}
        assert await refused(client, {**node, "backing": other}) == "Cannot change the option 'filename'"
        await reopen(client, {**node, "backing": None})
        # The image still records one.
        assert await refused(client, node) == "backing is missing for 'n1'"


async def test_read_only_and_back(chain: Chain) -> None:
    """Mirrors test_reopen."""
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        node = qcow2("n0", file(chain.paths[0], node_name="f"))
        await add(client, node)
        for read_only in (True, False, True, False):
            await reopen(client, {**node, "read-only": read_only})
            nodes = await nodes_of(client)
            assert (nodes["n0"]["ro"], nodes["f"]["ro"]) == (read_only, read_only)
        # What is not said is off.
        await reopen(client, {**node, "read-only": True})
        await reopen(client, node)
        assert not (await nodes_of(client))["n0"]["ro"]
        tuning = {"discard": "unmap", "detect-zeroes": "on", "lazy-refcounts": True, "l2-cache-size": 1 << 20}
        await reopen(client, {**node, **tuning})
        await export(client, "n0")
        text = "Read-only block node 'n0' cannot support read-write users"
        assert await refused(client, {**node, "read-only": True}) == text
        guest = await daemon.guest("n0")
        await guest.write(0, b"written")
    assert qemu_img.content(chain.paths[0])[:7] == b"written"


async def test_node_that_is_somebody_elses_file(chain: Chain) -> None:
    """Mirrors test_misc_drivers, "file"."""
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        below = file(chain.paths[0], node_name="f")
        await add(client, below, qcow2("n0", "f"))
        text = "Read-only block node 'f' cannot support read-write users"
        assert await refused(client, {**below, "read-only": True}) == text
        await reopen(client, qcow2("n0", "f", read_only=True))
        # It was added by itself, and so stays what it is until told otherwise.
        assert [(await nodes_of(client))[name]["ro"] for name in ("n0", "f")] == [True, False]
        await reopen(client, {**below, "read-only": True})
        assert await refused(client, qcow2("n0", "f")) == "Block node is read-only"
        await reopen(client, below, qcow2("n0", "f"))
        assert [(await nodes_of(client))[name]["ro"] for name in ("n0", "f")] == [False, False]


async def test_guest_sees_what_the_graph_says(chain: Chain) -> None:
    """Mirrors test_io_with_graph_changes: the backings are moved about under a guest that reads."""
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        nodes = [qcow2(f"n{number}", path, backing=None) for number, path in enumerate(chain.paths)]
        await add(client, *nodes)
        await export(client, "n2")
        guest = await daemon.guest("n2")

        async def seen() -> str:
            """Which layer each cluster comes from, as a drawing."""
            drawing = ""
            for index in range(8):
                data = await guest.read(index * CLUSTER, CLUSTER)
                letters = [letter for letter in "ABCD" if data == cluster(letter, index, CLUSTER)]
                drawing += letters[0] if letters else "."
            return drawing

        assert await seen() == "D......D"
        await reopen(client, {**nodes[2], "backing": "n0"})
        assert await seen() == "DB..A.AD"
        await reopen(client, {**nodes[2], "backing": "n1"})
        assert await seen() == "DC.C...D"
        await reopen(client, {**nodes[1], "backing": "n0"})
        assert await seen() == "DC.CA..D"
        assert await refused(client, {**nodes[0], "backing": "n2"}) == (
            "Making 'n2' a backing child of 'n0' would create a cycle"
        )
        await reopen(client, {**nodes[1], "backing": None}, {**nodes[2], "backing": "n0"})
        assert await seen() == "DB..A.AD"


async def test_cycles(chain: Chain) -> None:
    """Mirrors test_graph_cycles."""
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        nodes = [qcow2(f"n{number}", path, backing=None) for number, path in enumerate(chain.paths)]
        await add(client, *nodes)
        cycle = "Making 'n{}' a backing child of 'n{}' would create a cycle"
        assert await refused(client, {**nodes[1], "backing": "n1"}) == cycle.format(1, 1)
        # One alone would do, but not both.
        both = ({**nodes[1], "backing": "n2"}, {**nodes[2], "backing": "n1"})
        assert await refused(client, *both) == cycle.format(1, 2)
        await reopen(client, both[0])
        await reopen(client, {**nodes[1], "backing": None}, both[1])
        assert daemon.services.graph["n2"].backing is daemon.services.graph["n1"]


async def test_all_or_none(chain: Chain) -> None:
    """Mirrors test_swap_files, as far as it is about several nodes at once."""
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        nodes = [qcow2(f"n{number}", path, backing=None) for number, path in enumerate(chain.paths)]
        await add(client, *nodes)
        first = [{**nodes[0], "read-only": True}, {**nodes[1], "backing": "n0"}]
        assert await refused(client, *first, {**nodes[2], "backing": "nope"})
        assert await refused(client, *first, {**nodes[2], "node-name": "nope"})
        await reopen(client, *first)
        assert (await nodes_of(client))["n0"]["ro"]


async def test_file_is_replaced_by_one_that_nobody_else_has(chain: Chain) -> None:
    """Mirrors test_replace_file and test_swap_files."""
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        await add(client, *(file(path, node_name=f"f{n}") for n, path in enumerate(chain.paths)))
        await add(client, qcow2("n0", "f0"))
        assert await refused(client, qcow2("n0", "f1")) == "backing is missing for 'n0'"
        await reopen(client, qcow2("n0", "f1", backing=None))
        await reopen(client, qcow2("n0", "f0", backing=None))
        await add(client, qcow2("n1", "f1", backing=None))
        assert await refused(client, qcow2("n0", "f1")) == (
            "Permission conflict on node 'f1': permissions 'write, resize' are both required by node 'n1' "
            "(uses node 'f1' as 'file' child) and unshared by node 'n0' (uses node 'f1' as 'file' child)."
        )


async def test_throttle(chain: Chain) -> None:
    """Mirrors test_misc_drivers, "throttle"."""
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        for group in ("g0", "g1"):
            await client.command("object-add", {"qom-type": "throttle-group", "id": group})
        node = throttle("th", qcow2("n0", chain.paths[0]), "g0")
        await add(client, node)
        for same in (node, {**node, "file": "n0"}):
            await reopen(client, same)
        text = "Throttle group 'nope' does not exist"
        assert await refused(client, {**node, "throttle-group": "nope"}) == text
        await reopen(client, {**node, "throttle-group": "g1"})
        found = await refusal(client, "object-del", id="g1")
        assert found == ("GenericError", "object 'g1' is in use, can not be deleted")
        await client.command("object-del", id="g0")
        await client.command("object-add", {"qom-type": "throttle-group", "id": "g0"})
        await reopen(client, node)
        await client.command("object-del", id="g1")


async def test_throttle_is_put_in_between_and_taken_out(chain: Chain) -> None:
    """Mirrors test_insert_throttle_filter and test_insert_compress_filter, under a guest."""
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        for group, limits in (("outer", {}), ("inner", {"iops-total": 1000})):
            await client.command("object-add", {"qom-type": "throttle-group", "id": group, "limits": limits})
        outer = throttle("th", "n0", "outer")
        await add(client, qcow2("n0", chain.paths[0]), outer)
        await export(client, "th")
        guest = await daemon.guest("th")
        await add(client, throttle("inner", "n0", "inner"))
        await reopen(client, {**outer, "file": "inner"})
        await guest.write(0, b"through two")
        text = "Making 'th' a file child of 'inner' would create a cycle"
        assert await refused(client, throttle("inner", "th", "inner")) == text
        await reopen(client, outer)
        await client.command("blockdev-del", {"node-name": "inner"})
        assert await guest.read(0, 11) == b"through two"


async def test_after_a_stream(chain: Chain) -> None:
    """Mirrors test_block_stream_1 and test_block_stream_2."""
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, "j", "n2", base_node="n0")
        await finished(client, "j")
        node = qcow2("n2", chain.paths[2])
        assert await refused(client, node) == "backing is missing for 'n2'"
        await reopen(client, {**node, "backing": "n0"})
        await stream(client, "j", "n2")
        await finished(client, "j")
        for options in (node, {**node, "backing": None}):
            await reopen(client, options)
        text = "Cannot change the option 'backing.driver'"
        assert await refused(client, {**node, "backing": qcow2("n0", chain.paths[0])}) == text


async def test_during_a_stream(chain: Chain) -> None:
    """Mirrors test_block_stream_3 and test_block_stream_4: what a stream relies on is frozen."""
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, "j", "n2", base_node="n0", speed=1)
        frozen = "Cannot change frozen 'backing' link from '{}' to '{}'"
        top, middle = qcow2("n2", chain.paths[2]), qcow2("n1", chain.paths[1])
        for backing in (None, "n0"):
            assert await refused(client, {**top, "backing": backing}) == frozen.format("n2", "n1")
        await reopen(client, {**middle, "backing": None})
        await reopen(client, {**middle, "backing": "n0"})
        await reopen(client, {**top, "backing": "n1"})
        await reopen(client, {**middle, "backing": "n0", "read-only": True})
        text = "Read-only block node 'n2' cannot support read-write users"
        assert await refused(client, {**top, "backing": "n1", "read-only": True}) == text
        await client.command("block-job-set-speed", device="j", speed=0)
        assert "error" not in await finished(client, "j")
    assert qemu_img.content(chain.active) == chain.content


async def test_above_a_stream(chain: Chain) -> None:
    """Mirrors test_block_stream_4: the image above an intermediate stream goes where it likes, and stays."""
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, "j", "n1", speed=1)
        top = qcow2("n2", chain.paths[2])
        await reopen(client, {**top, "backing": "n1"})
        await reopen(client, {**top, "backing": None})
        await client.command("block-job-set-speed", device="j", speed=0)
        await finished(client, "j")
        nodes = daemon.services.graph.nodes
        assert nodes["n2"].backing is None
        await reopen(client, {**top, "backing": "n1"})
    assert qemu_img.content(chain.active) == chain.content


async def test_backing_that_somebody_writes(chain: Chain) -> None:
    """A backing whose guest goes on writing would change under the overlay."""
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        nodes = [qcow2(f"n{number}", path, backing=None) for number, path in enumerate(chain.paths)]
        await add(client, *nodes)
        await export(client, "n0")
        text = await refused(client, {**nodes[1], "backing": "n0"})
        assert text.startswith("Permission conflict on node 'n0': permissions 'write' are both required by")
        await client.command("block-export-del", id="export-n0")
        await reopen(client, {**nodes[1], "backing": "n0"})
