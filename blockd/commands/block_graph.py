"""x-debug-query-block-graph: who uses which node, what each needs of it, and what it lets others do.

Users are told first: those of disks (exports, and what a job reads with), then jobs; then come all nodes.
"""

from enum import StrEnum
from functools import partial
from itertools import count

from blockd.aio import in_turns
from blockd.block.node import BlockNode
from blockd.block.permissions import Access, Permission
from blockd.commands.context import Services
from blockd.commands.topic import Table
from blockd.drivers.permissions import Claim
from blockd.qmp.models import Members, Result

TABLE: Table = Table()


class XDbgBlockGraphNodeType(StrEnum):
    """What a vertex of the graph is."""

    BLOCK_BACKEND = "block-backend"
    BLOCK_JOB = "block-job"
    BLOCK_DRIVER = "block-driver"


class BlockPermission(StrEnum):
    """What can be done to a node."""

    CONSISTENT_READ = "consistent-read"
    WRITE = "write"
    WRITE_UNCHANGED = "write-unchanged"
    RESIZE = "resize"


class XDbgBlockGraphNode(Members):
    """A vertex of the graph."""

    id: int
    type: XDbgBlockGraphNodeType
    name: str
    """Of a disk its device, which may have none; of a job its id."""


class XDbgBlockGraphEdge(Members):
    """That one vertex uses another."""

    parent: int
    child: int
    name: str
    """As what: `file`, `backing`, `root`."""
    perm: list[BlockPermission]
    """What is needed."""
    shared_perm: list[BlockPermission]
    """What others may do meanwhile."""


class XDbgBlockGraph(Result):
    """All nodes, and those who use them."""

    nodes: list[XDbgBlockGraphNode]
    edges: list[XDbgBlockGraphEdge]


@TABLE.command("x-debug-query-block-graph", features=("unstable",))
async def query_block_graph(services: Services) -> XDbgBlockGraph:
    """Tell who uses which node, for people who look for a mistake."""
    graph = services.graph
    numbers = count(1)
    users: dict[tuple[XDbgBlockGraphNodeType, object], XDbgBlockGraphNode] = {}
    used: list[tuple[XDbgBlockGraphNode, Claim]] = []
    for claim in graph.permissions.claims:
        key, name = _user(services, claim)
        user = users.get(key) or XDbgBlockGraphNode(id=next(numbers), type=key[0], name=name)
        users[key] = user
        used.append((user, claim))
    nodes = {
        node: XDbgBlockGraphNode(id=next(numbers), type=XDbgBlockGraphNodeType.BLOCK_DRIVER, name=name)
        for name, node in graph.nodes.items()
    }
    edges = [_edge(user, nodes[claim.node], claim.role, claim.access) for user, claim in used]
    for below in await in_turns(partial(_edges_below, services, vertices=nodes), [*nodes]):
        edges += below
    return XDbgBlockGraph(nodes=[*users.values(), *nodes.values()], edges=edges)


def _user(services: Services, claim: Claim) -> tuple[tuple[XDbgBlockGraphNodeType, object], str]:
    """Who claims: what is the same for all claims of one, and the name."""
    if claim.role != "root":
        for stream in services.streams.running:
            if claim in stream.claims:
                return (XDbgBlockGraphNodeType.BLOCK_JOB, stream.job), stream.job.id
    names = [device.name for device in services.devices.at(claim.node) if claim in device.exports.values()]
    return (XDbgBlockGraphNodeType.BLOCK_BACKEND, claim), "".join(names)


def _edges_below(
    services: Services, node: BlockNode, *, vertices: dict[BlockNode, XDbgBlockGraphNode]
) -> list[XDbgBlockGraphEdge]:
    wanted = services.graph.permissions.uses.wanted(node)
    return [
        _edge(vertices[node], vertices[child], role, node.access_to(role, wanted, read_only=node.read_only))
        for role, child in node.children().items()
    ]


def _edge(
    parent: XDbgBlockGraphNode, child: XDbgBlockGraphNode, role: str, access: Access
) -> XDbgBlockGraphEdge:
    return XDbgBlockGraphEdge(
        parent=parent.id,
        child=child.id,
        name=role,
        perm=_names(access.need),
        shared_perm=_names(access.allow),
    )


def _names(permissions: Permission) -> list[BlockPermission]:
    names = [one.name for one in Permission if one in permissions]
    return [BlockPermission[name] for name in names if name and name in BlockPermission.__members__]
