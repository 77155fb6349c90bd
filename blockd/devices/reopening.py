"""Reopening: nodes that are told other options while guests use them.

What can be changed is whether a node may be written, what stands below it, and the group of a throttle. The
options are given as for opening the node, all of them: what is left out goes back to its default.

Source:   QEMU documentation, QMP reference, "blockdev-reopen".
"""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import NoReturn

from blockd.block.chain import chain
from blockd.block.node import BlockNode, FilterNode, OverlayNode, ProtocolNode
from blockd.block.options import Options
from blockd.devices.changes import Change
from blockd.devices.device import Devices, all_below
from blockd.devices.streams import Streams
from blockd.drivers.sharing import check_chain, check_single_writer
from blockd.errors import ErrorKind, RequestError
from blockd.filters.blkstream import BlkStream
from blockd.filters.throttle import Throttle

# All that must stay as it was told when the node was opened; other options have no effect in blockd.
_FIXED = ("driver", "node-name", "filename", "locking", "bottom")


class Reopen(Change):
    """Tells one node, and the nodes that were opened along with it, other options."""

    def __init__(self, devices: Devices, streams: Streams, options: Options) -> None:
        self._devices = devices
        self._graph = devices.graph
        self._streams = streams
        self._options = options
        self._node: BlockNode
        self._undoing = AsyncExitStack()

    async def prepare(self) -> None:
        if "node-name" not in self._options:
            raise RequestError("node-name not specified")
        self._node = self._graph[str(self._options["node-name"])]

    def disks(self) -> list[BlockNode]:
        return [self._node]

    async def perform(self) -> None:
        try:
            await self._reopen(self._node, self._options)
        except BaseException:
            await self.undo()
            raise

    async def undo(self) -> None:
        await self._undoing.aclose()

    async def clean(self) -> None:
        await self._graph.close_unused()

    # -- one node -----------------------------------------------------------------------------

    async def _reopen(self, node: BlockNode, options: Options) -> None:
        if isinstance(node, OverlayNode):
            await self._set_backing(node, options)
        self._check_fixed(node, options)
        await self._set_file(node, options)
        if isinstance(node, Throttle):
            self._set_group(node, str(options["throttle-group"]))
        await self._set_read_only(node, options)
        self._undoing.callback(self._graph.set_options, node, self._graph.options(node))
        self._graph.set_options(node, options)

    def _check_fixed(self, node: BlockNode, options: Options) -> None:
        told: Mapping[str, object] = {
            "driver": node.driver,
            "node-name": node.node_name,
            "filename": node.filename,
            **self._graph.options(node),
        }
        for name in _FIXED:
            if name in options and options[name] != told.get(name):
                raise RequestError(f"Cannot change the option '{name}'")

    async def _set_read_only(self, node: BlockNode, options: Options) -> None:
        wanted, before = bool(options.get("read-only")), node.read_only
        if before == wanted or (before and (isinstance(node, FilterNode) or options.get("auto-read-only"))):
            return
        if isinstance(node, FilterNode):
            raise RequestError(f"'{node.node_name}' is as writable as the node below it: make that read-only")
        if wanted:
            self._require_no_writers(node)
        await self._graph.set_read_only(node, wanted)
        self._undoing.push_async_callback(self._graph.set_read_only, node, before)

    def _require_no_writers(self, node: BlockNode) -> None:
        is_written = any(
            role == "file" and not parent.read_only for parent, role in self._graph.parents(node)
        )
        is_active = any(stream.front.active is node for stream in self._streams)
        if is_written or is_active or self._devices.has_writers(node):
            raise RequestError(f"Read-only block node '{node.node_name}' cannot support read-write users")

    def _set_group(self, node: Throttle, name: str) -> None:
        before, group = node.group, self._graph.find_throttle_group(name)
        if group is not before:
            node.join(group)
            self._undoing.callback(node.join, before)

    # -- what stands below --------------------------------------------------------------------

    async def _set_backing(self, node: OverlayNode, options: Options) -> None:
        if "backing" not in options:
            if node.backing is not None or node.backing_filename:
                raise RequestError(f"backing is missing for '{node.node_name}'")
            return
        told, before = options["backing"], node.backing
        if isinstance(told, dict):
            await self._reopen_child(before, "backing", {"read-only": True, "auto-read-only": True, **told})
            return
        new = None if told is None else self._find(str(told), node, "backing")
        if new is before or (new is not None and new is self._behind_job(before)):
            return
        if before is not None and self._is_frozen(node):
            raise RequestError(
                f"Cannot change frozen 'backing' link from '{node.node_name}' to '{before.node_name}'"
            )
        if new is not None and self._devices.has_writers(new):
            _refuse_written(new, node, "backing")
        node.backing = new
        self._undoing.callback(setattr, node, "backing", before)
        for top in (node, *(device.node for device in self._devices)):
            check_chain(top)

    async def _set_file(self, node: BlockNode, options: Options) -> None:
        told, before = options.get("file"), node.children().get("file")
        if told is None or before is None:
            return
        if isinstance(told, dict):
            inherited: Options = {
                name: options[name] for name in ("read-only", "auto-read-only") if name in options
            }
            await self._reopen_child(before, "file", {**inherited, **told})
            return
        new = self._find(str(told), node, "file")
        if new is before or new is self._behind_job(before):
            return
        if not isinstance(node, Throttle):
            check_single_writer(new, self._graph.nodes.values(), node.node_name, read_only=node.read_only)
            raise RequestError("Cannot change the option 'file'")
        if new.read_only and self._devices.has_writers(node):
            raise RequestError("Block node is read-only", kind=ErrorKind.READ_ONLY)
        self._stand_before(node, new)
        self._undoing.callback(self._stand_before, node, before)

    def _stand_before(self, node: Throttle, child: BlockNode) -> None:
        node.stand_before(child)
        self._graph.refresh_filters(node)

    async def _reopen_child(self, child: BlockNode | None, role: str, options: Options) -> None:
        """Reopen a node below whose options stand inside those of the one above."""
        if child is None or self._graph.is_added(child):
            raise RequestError(f"Cannot change the option '{role}.driver'")
        if isinstance(child, ProtocolNode):
            self._check_fixed(child, options)  # it is reopened along with the node above
        else:
            await self._reopen(child, options)

    def _is_frozen(self, node: BlockNode) -> bool:
        """Whether a stream, or copy-on-read down to a bottom, relies on what is below a node."""
        if any(node in stream.layers for stream in self._streams):
            return True
        for found in self._graph.nodes.values():
            if isinstance(found, BlkStream) and found.base is not None:
                layers = list(chain(found.active))
                if node in layers[: layers.index(found.base)]:
                    return True
        return False

    def _behind_job(self, node: BlockNode | None) -> BlockNode | None:
        """What clients know as the node that stands there, when the filter of a job is in front of it."""
        return next((stream.front.active for stream in self._streams if stream.front is node), node)

    def _find(self, name: str, above: BlockNode, role: str) -> BlockNode:
        found = self._devices.find(node_name=name)
        if above in all_below(found):
            raise RequestError(f"Making '{name}' a {role} child of '{above.node_name}' would create a cycle")
        return found


def _refuse_written(node: BlockNode, above: BlockNode, role: str) -> NoReturn:
    raise RequestError(
        f"Permission conflict on node '{node.node_name}': permissions 'write' are both required by an export "
        f"(uses node '{node.node_name}' as 'root' child) and unshared by node '{above.node_name}' (uses node "
        f"'{node.node_name}' as '{role}' child)."
    )
