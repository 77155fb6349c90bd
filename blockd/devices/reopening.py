"""Reopening: nodes that are told other options while guests use them.

What can be changed is whether a node may be written, what becomes of guests' requests, what stands below it,
and the group of a throttle. The options are given as for opening the node, all of them: what is left out
goes back to its default.

Source:   QEMU documentation, QMP reference, "blockdev-reopen".
"""

from collections.abc import Mapping
from contextlib import AsyncExitStack

from blockd.block.chain import layers_above
from blockd.block.moving import MovableImage, take_over_size
from blockd.block.node import BlockNode, FilterNode, OverlayNode, ProtocolNode
from blockd.block.options import Options, flattened
from blockd.block.permissions import RESIZE
from blockd.block.settings import Settings
from blockd.devices.changes import Change
from blockd.devices.device import Devices
from blockd.devices.streams import Stream, Streams
from blockd.drivers.cache_options import check_cache_options
from blockd.drivers.opening import settings_of
from blockd.drivers.permissions import Claim, check_acyclic
from blockd.drivers.sharing import check_chain
from blockd.drivers.uses import Plan
from blockd.errors import ErrorKind, RequestError
from blockd.filters.blkstream import BlkStream
from blockd.filters.throttle import Throttle, unthrottled, unthrottled_files
from blockd.filters.throttled_file import ThrottledFile
from blockd.formats.raw.image import RawImage
from blockd.formats.raw.part import Part, RawPart

# What can be changed, by the first part of its name; all else stays as it was told when the node was opened.
_CHANGEABLE = {
    *("read-only", "auto-read-only", "force-share", "discard", "detect-zeroes", "cache"),
    *("file", "image", "backing", "throttle-group"),
    *("lazy-refcounts", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other"),
    *("overlap-check", "cache-size", "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size"),
    "cache-clean-interval",
}
# What of a part of a file can be changed besides.
_PART = {"offset", "size"}


class Together:
    """What the reopenings of one command do together: images may swap their files."""

    def __init__(self) -> None:
        # What is going to stand below nodes; permissions are looked at as if all of it did.
        self.links: dict[tuple[BlockNode, str], BlockNode | None] = {}
        self._settled: set[MovableImage] = set()

    async def settle(self) -> None:
        """Bring what images have in memory to the files that they leave: others may be about to read it."""
        for image, role in self.links:
            if role == "file" and isinstance(image, MovableImage) and image not in self._settled:
                with unthrottled_files(image):
                    await image.prepare_to_move()
                self._settled.add(image)


class Reopen(Change):
    """Tells one node, and the nodes that were opened along with it, other options."""

    def __init__(
        self, devices: Devices, streams: Streams, options: Options, together: Together | None = None
    ) -> None:
        self._devices = devices
        self._graph = devices.graph
        self._streams = streams
        self._options = options
        self._together = together or Together()
        self._node: BlockNode
        # What is told along with it, and gets another node below.
        self._changed: list[BlockNode] = []
        self._undoing = AsyncExitStack()
        # What has to wait until all is recorded.
        self._holding = AsyncExitStack()

    async def prepare(self) -> None:
        if "node-name" not in self._options:
            raise RequestError("node-name not specified")
        self._node = self._graph[str(self._options["node-name"])]
        self._plan_links(self._node, self._options)

    def _plan_links(self, node: BlockNode, options: Options) -> None:
        """Note what is going to stand below a node and those that are told along with it."""
        below = node.children()
        if isinstance(node, OverlayNode):
            check_cache_options(options, node.cluster_size)
        for role in ("file", "backing"):
            told, before = options.get(role), below.get(role)
            if isinstance(told, dict):
                if before is not None and not isinstance(before, ProtocolNode):
                    self._plan_links(before, told)
                continue
            new = None if told is None else self._devices.find(node_name=str(told))
            if role in options and new is not before and new is not self._behind_job(before):
                self._together.links[node, role] = new
                self._changed.append(node)
                if role == "file" and isinstance(node, MovableImage):
                    self._streams.require_free([node])  # before any image is settled

    def disks(self) -> list[BlockNode]:
        return [self._node, *self._changed]

    async def perform(self) -> None:
        try:
            is_told_read_only = bool(self._options.get("read-only"))
            await self._reopen(self._node, self._options, is_told_read_only=is_told_read_only)
        except BaseException:
            await self.undo()
            raise

    async def undo(self) -> None:
        await self._undoing.aclose()

    async def clean(self) -> None:
        await self._holding.aclose()
        await self._graph.close_unused()

    # -- one node -----------------------------------------------------------------------------

    async def _reopen(self, node: BlockNode, options: Options, *, is_told_read_only: bool) -> None:
        if isinstance(node, OverlayNode):
            await self._set_backing(node, options)
        self._check_fixed(node, options)
        # The tables of an image are read from its file as they are going to be used.
        if options.get("read-only"):
            await self._set_read_only(node, options)
        await self._set_file(node, options)
        if isinstance(node, Throttle):
            self._set_group(node, str(options["throttle-group"]))
        if isinstance(node, RawPart):
            self._set_part(node, options)
        await self._set_read_only(node, options)
        self._undoing.callback(self._graph.set_options, node, self._graph.options(node))
        self._graph.set_options(node, options)
        self._undoing.callback(self._set_settings, node, node.settings)
        self._set_settings(node, settings_of(options))
        file = options.get("file")
        is_file_told = isinstance(file, dict) and bool(file.get("read-only"))
        self._tell_read_only(node, is_told_read_only)
        for part in self._graph.owned_parts(node):
            self._undoing.callback(self._set_settings, part, part.settings)
            self._set_settings(part, part.settings._replace(cache=node.settings.cache))
            self._tell_read_only(part, is_told_read_only or is_file_told)

    def _set_settings(self, node: BlockNode, settings: Settings) -> None:
        node.settings = settings
        self._devices.settle_roots(node)

    def _tell_read_only(self, node: BlockNode, is_told: bool) -> None:
        self._undoing.callback(self._graph.tell_read_only, node, self._graph.is_told_read_only(node))
        self._graph.tell_read_only(node, is_told)

    def _check_fixed(self, node: BlockNode, options: Options) -> None:
        told: Mapping[str, object] = {
            "driver": node.driver,
            "node-name": node.node_name,
            "filename": node.filename,
            **self._graph.options(node),
        }
        changeable = _CHANGEABLE | _PART if isinstance(node, RawPart) else _CHANGEABLE
        before, now = (
            {name: value for name, value in flattened(given) if name.partition(".")[0] not in changeable}
            for given in (told, options)
        )
        for name, value in now.items():
            if name not in before or before[name] != value:
                raise RequestError(f"Cannot change the option '{name}'")
        for name in before.keys() - now.keys() - {"node-name", "filename"}:
            raise RequestError(f"Option '{name}' cannot be reset to its default value")

    async def _set_read_only(self, node: BlockNode, options: Options) -> None:
        wanted, before = bool(options.get("read-only")), node.read_only
        if before == wanted or (before and (isinstance(node, FilterNode) or options.get("auto-read-only"))):
            return
        if isinstance(node, FilterNode):
            raise RequestError(f"'{node.node_name}' is as writable as the node below it: make that read-only")
        self._undoing.push_async_callback(self._graph.set_read_only, node, before)
        await self._graph.set_read_only(node, wanted)

    def _set_group(self, node: Throttle, name: str) -> None:
        before, group = node.group, self._graph.find_throttle_group(name)
        if group is not before:
            node.join(group)
            self._undoing.callback(node.join, before)

    def _set_part(self, node: RawPart, options: Options) -> None:
        """Have another part of the file from now on; of another size only if those above can stand that."""
        before = node.part
        start, size = (options.get(name) for name in ("offset", "size"))
        assert isinstance(start, int | None)
        assert isinstance(size, int | None)
        after = Part(start or 0, size)
        if after == before:
            return
        size_before = node.size
        self._undoing.callback(self._move_part, node, before)
        self._move_part(node, after)
        if node.size != size_before:
            self._graph.permissions.require(Claim(node, RESIZE))

    def _move_part(self, node: RawPart, part: Part) -> None:
        node.move(part)
        self._graph.nodes.refresh_filters(node)

    # -- what stands below --------------------------------------------------------------------

    async def _set_backing(self, node: OverlayNode, options: Options) -> None:
        if "backing" not in options:
            if node.backing is not None or node.backing_filename:
                raise RequestError(f"backing is missing for '{node.node_name}'")
            return
        told, before = options["backing"], node.backing
        if isinstance(told, dict):
            inherited: Options = {"read-only": True, "auto-read-only": True}
            is_told_read_only = bool(told.get("read-only"))
            await self._reopen_child(before, "backing", {**inherited, **told}, is_told_read_only)
            return
        new = None if told is None else self._find(str(told), node, "backing")
        if new is before or (new is not None and new is self._behind_job(before)):
            return
        if before is not None and self._is_frozen(node):
            raise RequestError(
                f"Cannot change frozen 'backing' link from '{node.node_name}' to '{before.node_name}'"
            )
        await self._connect(node, "backing", new, before)
        for stream in self._streams.running:
            if stream.layers[-1] is node:
                await self._streams.rebase(stream, new, self._undoing, self._holding)
        for top in self._graph.nodes.above(node):
            check_chain(top)

    async def _set_file(self, node: BlockNode, options: Options) -> None:
        told, before = options.get("file"), node.children().get("file")
        if told is None or before is None:
            return
        if isinstance(told, dict):
            inherited: Options = {
                name: options[name] for name in ("read-only", "auto-read-only") if name in options
            }
            await self._reopen_child(before, "file", {**inherited, **told}, False)
            return
        new = self._find(str(told), node, "file")
        if new is before or new is self._behind_job(before):
            return
        if isinstance(node, MovableImage | RawImage | RawPart):
            await self._change_file(node, new, before, options)
            return
        if not isinstance(node, Throttle) or isinstance(node, ThrottledFile):
            await self._require_links(node, "file", new)
            raise RequestError("Cannot change the option 'file'")
        await self._connect(node, "file", new, before)

    async def _change_file(
        self,
        image: MovableImage | RawImage | RawPart,
        file: BlockNode,
        before: BlockNode,
        options: Options,
    ) -> None:
        """Have an image go on in another file; of another size only if those above can stand that."""
        self._streams.require_free([image])
        await self._require_links(image, "file", file)
        if not isinstance(image, RawPart) and not isinstance(file, ProtocolNode):
            raise RequestError("Cannot change the option 'file'")
        if file.read_only and not options.get("read-only"):
            raise RequestError("Block node is read-only", kind=ErrorKind.READ_ONLY)
        await self._together.settle()
        take_over_size(file)
        size = image.size
        if isinstance(image, MovableImage):
            assert isinstance(file, ProtocolNode), "required"
            await self._move_image(image, file, before, options)
        else:
            await image.flush()
            await self._connect(image, "file", file, before)
        if image.size != size:
            self._graph.permissions.require(Claim(image, RESIZE))
        for top in self._graph.nodes.above(image):
            check_chain(top)

    async def _move_image(
        self, image: MovableImage, file: ProtocolNode, before: BlockNode, options: Options
    ) -> None:
        """Have an image be what its tables in another file say."""
        back, cluster_size = image.stay(), image.cluster_size
        with unthrottled(file):
            move = await image.load_from(file)
        self._undoing.callback(self._graph.connect, image, "file", before, back)
        self._graph.connect(image, "file", file, move)
        if image.backing_filename and "backing" not in options:
            raise RequestError(f"backing is missing for '{image.node_name}'")
        if image.cluster_size != cluster_size and self._is_copied_into(image):
            raise RequestError("Cannot change the option 'file'")

    def _is_copied_into(self, image: BlockNode) -> bool:
        """Whether copy-on-read is in front of an image: it keeps track of clusters of one size."""
        return any(
            isinstance(above, BlkStream) and above.active is image for above in self._graph.nodes.above(image)
        )

    async def _connect(
        self, node: BlockNode, role: str, new: BlockNode | None, before: BlockNode | None
    ) -> None:
        await self._require_links(node, role, new)
        self._graph.connect(node, role, new)
        self._undoing.callback(self._graph.connect, node, role, before)

    async def _require_links(self, node: BlockNode, role: str, new: BlockNode | None) -> None:
        plan = Plan({**self._together.links, (node, role): new}, {})
        for (parent, place), child in reversed([*plan.links.items()]):
            if child is not None:
                check_acyclic(parent, place, child, plan)
        await self._graph.nodes.locks.take(self._graph.permissions.require(plan=plan))

    async def _reopen_child(
        self, child: BlockNode | None, role: str, options: Options, is_told_read_only: bool
    ) -> None:
        """Reopen a node below whose options stand inside those of the one above."""
        if child is None or self._graph.is_added(child):
            raise RequestError(f"Cannot change the option '{role}.driver'")
        options = {"discard": "unmap", **options}  # as when it is opened
        if isinstance(child, ProtocolNode):
            self._check_fixed(child, options)  # it is reopened along with the node above
        else:
            await self._reopen(child, options, is_told_read_only=is_told_read_only)

    def _is_frozen(self, node: BlockNode) -> bool:
        """Whether a stream, or copy-on-read down to a bottom, relies on what is below a node.

        Streams go down to their lowest layer, whatever is below that.
        """
        for inserted in self._streams:
            if node in (inserted.layers[:-1] if isinstance(inserted, Stream) else inserted.layers):
                return True
        fronts = [
            found
            for found in self._graph.nodes.values()
            if isinstance(found, BlkStream) and not self._streams.is_filter_of_job(found)
        ]
        # A stream into the bottom may have taken the base away: whatever is below is frozen then.
        return any(
            front.base is not None and node in layers_above(front.base, front.active) for front in fronts
        )

    def _behind_job(self, node: BlockNode | None) -> BlockNode | None:
        """What clients know as the node that stands there, when the filter of a job is in front of it."""
        return next((stream.front.active for stream in self._streams if stream.front is node), node)

    def _find(self, name: str, above: BlockNode, role: str) -> BlockNode:
        found = self._devices.find(node_name=name)
        check_acyclic(above, role, found)
        return found
