"""x-debug-query-block-graph tells the same of nodes and exports as qemu-storage-daemon does."""

from pathlib import Path
from typing import Any

from tests.differential.images import make_images
from tests.differential.nodes import chain_nodes, file_node
from tests.differential.pair import FOLDER, IMAGES, Send, blockd, call, copied
from tests.differential.test_differential_permissions import reply
from tests.qmp_client import QmpClient
from tests.qsd import qsd

QUERY = "x-debug-query-block-graph"
THROTTLED = {"driver": "throttle", "throttle-group": "g", "file": "top", "node-name": "slow"}
STEPS: list[Send] = [
    *(step for step in chain_nodes() if isinstance(step, Send)),
    file_node("f", "disk.raw"),
    call("blockdev-add", driver="blkdebug", node_name="d", image="f", take_child_perms=["resize"]),
    call("blockdev-add", driver="raw", node_name="r", file="d"),
    call("object-add", qom_type="throttle-group", id="g"),
    Send(f'{{"execute": "blockdev-add", "arguments": {THROTTLED}}}'.replace("'", '"')),
    call("nbd-server-start", addr={"type": "unix", "data": {"path": f"{FOLDER}/nbd"}}),
    call("block-export-add", type="nbd", id="e", node_name="slow", writable=True),
    call("block-export-add", type="nbd", id="ro", node_name="r", name="ro"),
]


def told(graph: dict[str, Any]) -> list[str]:
    """The edges, whatever numbers the vertices have and whatever the names that nobody has given.

    What else than reading an overlay allows others on its backing is an entry of its own: "A backing file is
    not written".
    """
    names = {
        vertex["id"]: f"{vertex['type']} {'#' if vertex['name'].startswith('#') else vertex['name']}"
        for vertex in graph["nodes"]
    }
    alone = [name for name in names.values() if name.startswith("block-driver")]
    edges = [
        f"{names[edge['parent']]} has {names[edge['child']]} as {edge['name']}: {sorted(edge['perm'])}, "
        f"{'' if edge['name'] == 'backing' else sorted(edge['shared-perm'])}"
        for edge in graph["edges"]
    ]
    return sorted(edges + alone)


async def test_the_graph_is_told_the_same(tmp_path: Path) -> None:
    make_images(tmp_path / IMAGES)
    found: dict[str, list[list[str]]] = {"theirs": [], "blockd": []}
    for name, start in {"theirs": qsd, "blockd": blockd}.items():
        folder = copied(tmp_path / IMAGES, tmp_path / name)
        async with start(folder) as path, await QmpClient.connect(path) as client:
            for step in STEPS:
                assert await reply(client, folder, step) == "accepted"
                found[name].append(told(await client.command(QUERY)))
    assert found["blockd"] == found["theirs"]
    assert len(found["theirs"][-1]) >= 20
