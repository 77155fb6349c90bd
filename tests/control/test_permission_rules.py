"""The rules of permissions by themselves: any graph, any claims."""

import random
from collections.abc import Callable

import pytest

from blockd.block.chain import all_below
from blockd.block.node import BlockNode, Buffer
from blockd.block.permissions import (
    CONSISTENT_READ,
    EVERYTHING,
    RESIZE,
    WRITE,
    WRITE_UNCHANGED,
    Access,
    Permission,
)
from blockd.drivers.nodes import Nodes
from blockd.drivers.permissions import Claim, Permissions, check, check_acyclic
from blockd.drivers.uses import Plan
from blockd.errors import ErrorKind, RequestError

EACH = [CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE]


class Node(BlockNode):
    """A node that holds nothing."""

    driver = "node"

    def __init__(
        self, name: str, *, read_only: bool = False, passes: bool = False, **below: BlockNode
    ) -> None:
        super().__init__(name, name, 0, read_only=read_only)
        self._below = below
        self._passes = passes

    def children(self) -> dict[str, BlockNode]:
        return self._below

    def put_below(self, role: str, child: BlockNode | None) -> None:
        below = {**self._below, role: child}
        self._below = {role: found for role, found in below.items() if found is not None}

    def access_to(self, role: str, wanted: Access, *, read_only: bool) -> Access:
        return wanted if self._passes else super().access_to(role, wanted, read_only=read_only)

    async def read(self, offset: int, length: int) -> Buffer:
        raise NotImplementedError

    async def write(self, offset: int, data: Buffer) -> None:
        raise NotImplementedError

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        raise NotImplementedError

    async def discard(self, offset: int, length: int) -> None:
        raise NotImplementedError

    async def flush(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


def refusal(nodes: list[BlockNode], *claims: Claim, plan: Plan | None = None) -> str:
    with pytest.raises(RequestError) as error:
        check(nodes, claims, plan or Plan({}, {}))
    return error.value.message


def test_need_and_allowance_meet_on_one_node() -> None:
    node = Node("n")
    for need in EACH:
        for allow in EACH:
            claims = [Claim(node, need), Claim(node, Permission.NONE, allow, "job 'j'", "main node")]
            if need is allow:
                check([node], claims)
            else:
                assert refusal([node], *claims) == (
                    f"Permission conflict on node 'n': permissions '{need}' are both required by an unnamed "
                    "block device (uses node 'n' as 'root' child) and unshared by job 'j' (uses node 'n' as "
                    "'main node' child)."
                )


def test_nobody_is_in_his_own_way() -> None:
    node = Node("n")
    check([node], [Claim(node, WRITE, CONSISTENT_READ)])


def test_filters_pass_on_what_formats_keep() -> None:
    file = Node("f")
    image, raw = Node("i", file=file), Node("r", passes=True, file=file)
    nodes: list[BlockNode] = [file, image, raw]
    check(nodes, [])
    check(nodes, [Claim(image, WRITE), Claim(raw, CONSISTENT_READ)])
    assert "'write' are both required by node 'r'" in refusal(nodes, Claim(raw, WRITE))
    assert "'resize' are both required by node 'i'" in refusal(
        nodes, Claim(raw, CONSISTENT_READ, EVERYTHING & ~RESIZE)
    )
    check(nodes, [Claim(raw, CONSISTENT_READ, EVERYTHING & ~RESIZE)], Plan({}, {image: True}))


def test_nobody_writes_below_an_overlay() -> None:
    base = Node("b")
    over = Node("o", file=Node("f"), backing=base)
    check([over], [Claim(base, CONSISTENT_READ | WRITE_UNCHANGED), Claim(over, WRITE | RESIZE)])
    for need in (WRITE, RESIZE):
        assert "unshared by node 'o' (uses node 'b' as 'backing' child)" in refusal([over], Claim(base, need))
        check([over], [Claim(base, need)], Plan({(over, "backing"): None}, {}))


def test_what_is_read_only_is_not_written() -> None:
    node, plan = Node("n", read_only=True), Plan({}, {})
    for need in (WRITE, WRITE_UNCHANGED):
        with pytest.raises(RequestError) as error:
            check([node], [Claim(node, need)], plan)
        assert (error.value.message, error.value.kind) == ("Block node is read-only", ErrorKind.READ_ONLY)
        check([node], [Claim(node, need)], Plan({}, {node: False}))
    check([node], [Claim(node, CONSISTENT_READ | RESIZE)])
    writable = Node("w")
    text = refusal([writable], Claim(writable, WRITE), plan=Plan({}, {writable: True}))
    assert text == "Read-only block node 'w' cannot support read-write users"


def test_claims_are_held_until_they_are_released() -> None:
    node = Node("n")
    permissions = Permissions({"n": node})
    alone, second = Claim(node, WRITE, CONSISTENT_READ), Claim(node, WRITE)
    permissions.claim(alone)
    assert permissions.is_written(node)
    with pytest.raises(RequestError, match="Permission conflict"):
        permissions.claim(Claim(node, CONSISTENT_READ), second)
    assert permissions.claims == [alone]
    permissions.release(alone)
    assert not permissions.is_written(node)
    permissions.claim(second)


def test_a_node_below_itself() -> None:
    low = Node("low")
    middle = Node("middle", file=low)
    top = Node("top", backing=middle)
    for child in (low, middle, top):
        with pytest.raises(
            RequestError, match=f"Making '{'top'}' a backing child of '{child.node_name}' would"
        ):
            check_acyclic(child, "backing", top)
    check_acyclic(top, "backing", low)


def test_what_was_accepted_is_accepted_in_any_order() -> None:
    """As a restart does: fewer claims and fewer links are never in conflict."""
    accepted_count = 0
    for seed in range(400):
        rng = random.Random(seed)
        nodes: list[BlockNode] = []
        for number in range(6):
            roles = ("file", "backing") if len(nodes) > 1 else ("file",)
            below = {role: rng.choice(nodes) for role in roles if nodes and rng.random() < 0.7}
            nodes.append(Node(f"n{number}", read_only=rng.random() < 0.2, passes=rng.random() < 0.5, **below))
        claims = [
            Claim(rng.choice(nodes), rng.choice([CONSISTENT_READ, WRITE]), rng.choice([EVERYTHING, ~WRITE]))
            for _ in range(rng.randrange(1, 4))
        ]
        try:
            check(nodes, claims)
        except RequestError:
            continue
        accepted_count += 1
        for _ in range(10):
            links = {(node, role): None for node in nodes for role in node.children() if rng.random() < 0.3}
            check(nodes, [claim for claim in claims if rng.random() < 0.6], Plan(links, {}))
    assert accepted_count > 50


def test_what_is_kept_up_to_date_is_what_a_look_at_everything_finds() -> None:
    """Random changes of a graph: each is refused or accepted as the check of all claims and links does."""
    verdicts = {True: 0, False: 0}
    for seed in range(200):
        rng = random.Random(seed)
        nodes = Nodes()
        made: list[Node] = []
        for number in range(7):
            roles = ("file", "backing") if len(made) > 1 else ("file",)
            below = {role: rng.choice(made) for role in roles if made and rng.random() < 0.7}
            made.append(Node(f"n{number}", read_only=rng.random() < 0.2, passes=rng.random() < 0.5, **below))
            nodes.add(made[-1])
        permissions, held = nodes.permissions, list[Claim]()
        for _ in range(12):
            node, other = sorted(rng.sample(made, 2), key=made.index)
            match rng.randrange(5):
                case 0:
                    node.read_only = not node.read_only
                    nodes.refresh(node)
                case 1:
                    other.put_below("backing", rng.choice([node, None]))
                    nodes.refresh(other)
                case 2 if held:
                    permissions.release(held.pop(rng.randrange(len(held))))
                case 3 if held:
                    permissions.move(rng.choice(held), node)
                case _:
                    plan = Plan({(other, "backing"): node}, {node: rng.random() < 0.5})
                    claim = Claim(
                        node, rng.choice([CONSISTENT_READ, WRITE]), rng.choice([EVERYTHING, ~WRITE])
                    )
                    verdicts[_agree(permissions, made, claim, rng.choice([plan, Plan({}, {})]))] += 1
                    if _agree(permissions, made, claim, Plan({}, {})):
                        permissions.claim(claim)
                        held.append(claim)
            for found in made:
                _parents_are_right(nodes, found, made)
    assert min(verdicts.values()) > 100


def _agree(permissions: Permissions, nodes: list[Node], claim: Claim, plan: Plan) -> bool:
    """Whether a claim is accepted, after a look at how it was decided."""

    def verdict(decide: Callable[[], object]) -> str:
        try:
            decide()
        except RequestError as error:
            return error.message
        return ""

    # A conflict that is there already, as nobody was asked about a change, is not looked for again.
    if verdict(lambda: check(nodes, reversed(permissions.claims))):
        return False
    fast = verdict(lambda: permissions.require(claim, plan=plan))
    assert fast == verdict(lambda: check(nodes, reversed([*permissions.claims, claim]), plan))
    return not fast


def _parents_are_right(nodes: Nodes, node: Node, made: list[Node]) -> None:
    links = {(parent, role) for parent in made for role, child in parent.children().items() if child is node}
    assert {*nodes.parents(node)} == links
    assert {*nodes.above(node)} == {found for found in made if node in all_below(found)}
