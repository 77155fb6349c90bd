"""Who may use a node beside whom: one check of all claims and links, before any of them changes.

A `Claim` is somebody's access to a node. Exports and jobs make theirs; those of nodes to the nodes below
follow from what is wanted of them (`BlockNode.access_to`). Two claims on one node are in conflict when one
needs what the other does not allow.

Fewer claims and links never make a conflict: what was accepted one after the other is accepted again in any
order, so a restart accepts it too.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from blockd.block.chain import all_below
from blockd.block.node import BlockNode
from blockd.block.permissions import EVERYTHING, WRITE, Access, Permission, wanted_by, writes
from blockd.drivers.uses import AS_IT_IS, Plan, Uses
from blockd.errors import ErrorKind, RequestError

ANONYMOUS = "an unnamed block device"


@dataclass(eq=False)
class Claim:
    """What `by` (words for people) needs of a node, and what it allows others."""

    node: BlockNode
    need: Permission
    allow: Permission = EVERYTHING
    by: str = ANONYMOUS
    role: str = "root"

    @property
    def access(self) -> Access:
        return Access(self.need, self.allow)

    def __str__(self) -> str:
        return f"{self.by} (uses node '{self.node.node_name}' as '{self.role}' child)"


class Permissions:
    """The claims on the nodes of a graph, and what follows from them for the nodes below.

    The graph tells of every link that changes, and of every node that becomes read-only or writable. So what
    a change costs depends on what it reaches, and not on what else there is.
    """

    def __init__(self, nodes: Mapping[str, BlockNode]) -> None:
        self._nodes = nodes
        # The newest last.
        self._claims: dict[Claim, None] = {}
        self.uses = Uses()
        self.uses.settle(nodes.values())

    @property
    def claims(self) -> list[Claim]:
        """All claims, the newest last."""
        return [*self._claims]

    def require(self, *claims: Claim, plan: Plan = AS_IT_IS) -> Uses:
        """See that somebody could have these claims, the newest last, in the graph as it is planned.

        Returns how nodes would be used then.

        Raises:   RequestError: who is in the way of whom; or of kind READ_ONLY.
        """
        draft = Uses(self.uses)
        parents = [parent for parent, _ in plan.links]
        self.require_draft(draft, [*parents, *plan.read_only], claims, self._nodes.values(), plan)
        return draft

    def require_draft(
        self,
        draft: Uses,
        changed: Iterable[BlockNode],
        claims: Sequence[Claim],
        nodes: Iterable[BlockNode],
        plan: Plan = AS_IT_IS,
    ) -> None:
        """The same in a graph of `nodes`, of which `changed` are not in `draft` yet as they are going to be.

        Raises:   RequestError: who is in the way of whom; or of kind READ_ONLY.
        """
        for claim in claims:
            draft.add(claim.node, claim.access)
        reached = draft.settle([*changed, *(claim.node for claim in claims)], plan)
        if any(draft.is_refused(node, plan) for node in reached):
            # Who is in the way of whom takes a look at all claims and links, in order.
            check(nodes, reversed([*self._claims, *claims]), plan)

    def require_below(self, node: BlockNode) -> None:
        """See that a node and those below it may be used as they are.

        Raises:   RequestError: who is in the way of whom; or of kind READ_ONLY.
        """
        self.require_draft(Uses(self.uses), all_below(node), (), self._nodes.values())

    def claim(self, *claims: Claim) -> None:
        """Give somebody these claims until `release`.

        Raises:   RequestError: as `require`.
        Fails to: nothing is claimed.
        """
        self.require(*claims)
        for claim in claims:
            self._claims[claim] = None
            self.uses.add(claim.node, claim.access)
        self._settle(*(claim.node for claim in claims))

    def release(self, *claims: Claim) -> None:
        """Take back what was claimed."""
        for claim in claims:
            del self._claims[claim]
            self.uses.add(claim.node, claim.access, -1)
        self._settle(*(claim.node for claim in claims))

    def move(self, claim: Claim, node: BlockNode) -> None:
        """Let a claim be on another node from now on."""
        self.uses.add(claim.node, claim.access, -1)
        self.uses.add(node, claim.access)
        before, claim.node = claim.node, node
        self._settle(before, node)

    def _settle(self, *nodes: BlockNode) -> None:
        """A node that is gone by now uses nothing."""
        self.uses.settle(node for node in nodes if self._nodes.get(node.node_name) is node)

    def is_written(self, node: BlockNode) -> bool:
        """Whether anybody may write to a node."""
        return WRITE in self.uses.wanted(node).need


def check(nodes: Iterable[BlockNode], claims: Iterable[Claim], plan: Plan = AS_IT_IS) -> None:
    """Refuse a graph in which anybody needs of a node what it cannot give, or others do not allow.

    `claims`: the newest first, for errors name the newer one of two in the way of QEMU.

    Raises:   RequestError: who is in the way of whom; or of kind READ_ONLY.
    """
    for node, users in _uses(nodes, claims, plan):
        for one, other in permutations(users, 2):
            missing = other.need & ~one.allow
            if missing:
                raise RequestError(
                    f"Permission conflict on node '{node.node_name}': permissions '{missing}' are both "
                    f"required by {other} and unshared by {one}."
                )
        if writes(wanted_by(user.access for user in users)) and plan.is_read_only(node):
            if node.read_only:
                raise RequestError("Block node is read-only", kind=ErrorKind.READ_ONLY)
            raise RequestError(f"Read-only block node '{node.node_name}' cannot support read-write users")


def check_acyclic(parent: BlockNode, role: str, child: BlockNode, plan: Plan = AS_IT_IS) -> None:
    """Refuse a link that would make a node stand below itself."""
    if parent in _all_below(child, plan):
        raise RequestError(
            f"Making '{child.node_name}' a {role} child of '{parent.node_name}' would create a cycle"
        )


def _all_below(node: BlockNode, plan: Plan) -> Iterable[BlockNode]:
    found = {node: None}
    pending = [node]
    while pending:
        new = [child for _, child in plan.children(pending.pop()) if child not in found]
        found.update(dict.fromkeys(new))
        pending += new
    return found


def _uses(
    nodes: Iterable[BlockNode], claims: Iterable[Claim], plan: Plan
) -> Iterator[tuple[BlockNode, list[Claim]]]:
    """Every node, after those above it, with all who use it."""
    used: defaultdict[BlockNode, list[Claim]] = defaultdict(list)
    for claim in claims:
        used[claim.node].append(claim)
    for node in _top_down(nodes, plan):
        yield node, used[node]
        wanted = wanted_by(user.access for user in used[node])
        for role, child in plan.children(node):
            access = node.access_to(role, wanted, read_only=plan.is_read_only(node))
            claim = Claim(child, *access, by=f"node '{node.node_name}'", role=role)
            # What is only planned is newer than what is there.
            used[child].insert(0 if (node, role) in plan.links else len(used[child]), claim)


def _top_down(nodes: Iterable[BlockNode], plan: Plan) -> Iterable[BlockNode]:
    """All nodes, each after those above it; of several above one, the newest first."""
    ordered: dict[BlockNode, None] = {}
    pending = [*nodes][::-1]
    while pending:
        below = [child for _, child in plan.children(pending[-1]) if child not in ordered]
        if below:
            pending += below
        else:
            ordered.setdefault(pending.pop())
    return reversed(ordered)
