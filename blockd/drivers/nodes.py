"""The nodes of the graph, and what is looked up of them all the time: who is above, who else has a file.

All of it is kept up to date with each change, so that no question takes a walk over all nodes.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

from blockd.block.node import BlockNode, FilterNode
from blockd.drivers.locking import FileLocks
from blockd.drivers.permissions import Permissions
from blockd.formats.raw.image import RawImage
from blockd.formats.raw.part import RawPart
from blockd.protocols.file import FileNode

FilesByIdentity = dict[tuple[int, int], dict[FileNode, None]]


class Nodes(Mapping[str, BlockNode]):
    """All nodes by name, in the order in which they came.

    Whoever changes what is below a node, or makes one read-only or writable, calls `refresh`.
    """

    def __init__(self) -> None:
        self._nodes: dict[str, BlockNode] = {}
        self._above: defaultdict[BlockNode, dict[tuple[BlockNode, str], None]] = defaultdict(dict)
        self._below: dict[BlockNode, dict[str, BlockNode]] = {}
        self._files: FilesByIdentity = {}
        # Of these, those that are not read-only.
        self._writers: FilesByIdentity = {}
        self.permissions = Permissions(self)
        self.locks = FileLocks(self.permissions.uses, partial(self.same_files, read_only=False), self._follow)
        # The names of nodes that came, went or were changed since `take_touched`.
        self._touched: dict[str, None] = {}

    def __getitem__(self, node_name: str) -> BlockNode:
        return self._nodes[node_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def parents(self, node: BlockNode) -> list[tuple[BlockNode, str]]:
        """The nodes right above, each with the role in which it uses `node`."""
        return [*self._above.get(node, ())]

    def below(self, node: BlockNode) -> list[BlockNode]:
        """The nodes right below, as of the last `refresh`."""
        return [*self._below[node].values()]

    def above(self, *nodes: BlockNode) -> Iterator[BlockNode]:
        """Some nodes and all whose requests may come through them."""
        found = dict.fromkeys(nodes)
        pending = [*found]
        while pending:
            yield (node := pending.pop())
            for parent, _ in self.parents(node):
                if parent not in found:
                    found[parent] = None
                    pending.append(parent)

    def same_files(self, file: FileNode, *, read_only: bool) -> Iterable[FileNode]:
        """The nodes that have the same file; for `read_only` use only those that may write to it."""
        return (self._writers if read_only else self._files).get(file.identity(), ())

    def _follow(self, node: BlockNode, opened: Sequence[BlockNode]) -> None:
        """Let what stands on a node know how large that is: others may have changed it while nobody used it.

        `opened`: nodes that are not in the graph yet.

        Raises:   RequestError: it is too small for a part of it.
        """
        above = [parent for parent, _ in self.parents(node)]
        above += [one for one in opened if node in one.children().values()]
        for parent in above:
            if isinstance(parent, FilterNode | RawImage | RawPart):
                parent.stand_before(node)
                self._follow(parent, opened)

    def touch(self, node: BlockNode) -> None:
        """Something that is recorded of a node is different."""
        self._touched[node.node_name] = None

    def take_touched(self) -> dict[str, None]:
        """The names of nodes that came, went or were changed since this was called last."""
        touched, self._touched = self._touched, {}
        return touched

    def add(self, node: BlockNode) -> None:
        """Take in a node; those below it are there."""
        self._nodes[node.node_name] = node
        self.refresh(node)

    def remove(self, node: BlockNode) -> None:
        """Forget a node; those above it are linked to something else, or the node comes back."""
        del self._nodes[node.node_name]
        self.touch(node)
        if isinstance(node, FileNode):
            _note(self._files, node, is_in=False)
            _note(self._writers, node, is_in=False)
        self._link(node, {})
        del self._below[node]
        self.permissions.uses.forget(node)

    def refresh(self, *nodes: BlockNode) -> None:
        """See what is below some nodes now, and whether they are read-only."""
        for node in nodes:
            self._link(node, dict(node.children()))
            self.touch(node)
            if isinstance(node, FileNode):
                _note(self._files, node, is_in=True)
                _note(self._writers, node, is_in=not node.read_only)
        self.permissions.uses.settle(nodes)

    def refresh_filters(self, node: BlockNode) -> None:
        """Let the filters in front of a node know what became of it."""
        for parent, _ in self.parents(node):
            if isinstance(parent, FilterNode):
                parent.stand_before(node)
                self.refresh(parent)
                self.refresh_filters(parent)

    def _link(self, node: BlockNode, below: dict[str, BlockNode]) -> None:
        for role, child in self._below.get(node, {}).items():
            if below.get(role) is not child:
                self._above[child].pop((node, role))
                if not self._above[child]:
                    del self._above[child]
        for role, child in below.items():
            self._above[child][node, role] = None
        self._below[node] = below


def _note(files: FilesByIdentity, file: FileNode, *, is_in: bool) -> None:
    """See that a file is among those of its identity, or is not."""
    if is_in:
        files.setdefault(file.identity(), {})[file] = None
    elif (same := files.get(file.identity())) is not None:
        same.pop(file, None)
        if not same:
            del files[file.identity()]
