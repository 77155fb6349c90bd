"""How each node is used by those above it: kept up to date, so that a change is checked where it matters.

A node has users: claims, and links from the nodes above. What each needs and allows others (its `Access`) is
counted, for thousands of overlays use their common base in two or three ways. If what is wanted of a node
changes, so may what it wants of the nodes below; otherwise nothing below can change, and nothing there is
looked at.
"""

from collections.abc import Iterable, Mapping
from itertools import permutations
from typing import NamedTuple

from blockd.block.node import BlockNode
from blockd.block.permissions import Access, lets, wanted_by, writes
from blockd.protocols.used_file import UsedFile


class Plan(NamedTuple):
    """How the graph is going to be, where it differs from how it is."""

    # What stands below a node in a role.
    links: Mapping[tuple[BlockNode, str], BlockNode | None]
    read_only: Mapping[BlockNode, bool]

    def children(self, node: BlockNode) -> Iterable[tuple[str, BlockNode]]:
        if not self.links:
            return node.children().items()
        planned = {role: child for (parent, role), child in self.links.items() if parent is node}
        below = {**node.children(), **planned}
        return [(role, child) for role, child in below.items() if child is not None]

    def is_read_only(self, node: BlockNode) -> bool:
        return self.read_only.get(node, node.read_only)


AS_IT_IS = Plan({}, {})


# How many users of a node have each access.
Counts = Mapping[Access, int]


class Uses:
    """The users of nodes, counted; a draft `on` another one holds what would be different."""

    def __init__(self, on: "Uses | None" = None) -> None:
        self._on = on
        self._users: dict[BlockNode, Counts] = {}
        # What a node wants of those below it, by role.
        self._links: dict[BlockNode, dict[str, tuple[BlockNode, Access]]] = {}
        # The files whose users have changed since they were locked for them.
        self.changed_files: dict[UsedFile, None] = {}

    def wanted(self, node: BlockNode) -> Access:
        """What all users of a node want of it together."""
        return wanted_by(self._users_of(node))

    def add(self, node: BlockNode, access: Access, count: int = 1) -> None:
        """Note one more user of a node (or with -1 one less); to be settled."""
        users = dict(self._users_of(node))
        users[access] = users.get(access, 0) + count
        if not users[access]:
            del users[access]
        self._users[node] = users
        if isinstance(node, UsedFile):
            self.changed_files[node] = None
        if self._on is None and not users:
            del self._users[node]

    def settle(self, nodes: Iterable[BlockNode], plan: Plan = AS_IT_IS) -> list[BlockNode]:
        """Let some nodes want of those below what follows from their users and links of now, and so on down.

        Returns them and those below that were reached.
        """
        reached: dict[BlockNode, None] = {}
        pending = [*nodes]
        while pending:
            node = pending.pop()
            reached.setdefault(node)
            pending += self._relink(node, plan)
        return [*reached]

    def forget(self, node: BlockNode) -> None:
        """A node is gone: it uses nothing any more."""
        links = self._links.pop(node, {})
        for child, access in links.values():
            self.add(child, access, -1)
        self.settle(child for child, _ in links.values())

    def is_refused(self, node: BlockNode, plan: Plan = AS_IT_IS) -> bool:
        """Whether users of a node are in each other's way, or want to write to what is read-only."""
        users = self._users_of(node)
        if any(count > 1 and not lets(one, one) for one, count in users.items()):
            return True
        if not all(lets(one, other) for one, other in permutations(users, 2)):
            return True
        return writes(self.wanted(node)) and plan.is_read_only(node)

    def _users_of(self, node: BlockNode) -> Counts:
        if node in self._users or self._on is None:
            return self._users.get(node, {})
        return self._on._users_of(node)

    def _links_of(self, node: BlockNode) -> dict[str, tuple[BlockNode, Access]]:
        if node in self._links or self._on is None:
            return self._links.get(node, {})
        return self._on._links_of(node)

    def _relink(self, node: BlockNode, plan: Plan) -> list[BlockNode]:
        """Note what a node wants of those below it; returns those of whom it wants something else by now."""
        before, wanted, read_only = self._links_of(node), self.wanted(node), plan.is_read_only(node)
        now = {
            role: (child, node.access_to(role, wanted, read_only=read_only))
            for role, child in plan.children(node)
        }
        gone = [link for role, link in before.items() if now.get(role) != link]
        come = [link for role, link in now.items() if before.get(role) != link]
        for child, access in gone:
            self.add(child, access, -1)
        for child, access in come:
            self.add(child, access)
        if gone or come:
            self._links[node] = now
        return [child for child, _ in gone + come]
