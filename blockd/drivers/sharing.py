"""What may stand together: which nodes may have one file, and which images may make a chain.

Raises:   RequestError, from every check: who is in the way of whom; nothing was changed.
"""

from collections.abc import Iterable, Iterator
from itertools import chain as joined

from blockd.block.chain import chain
from blockd.block.node import BlockNode
from blockd.errors import RequestError
from blockd.protocols.file import FileNode

CHAIN_DEPTH_MAX = 64


def file_of(node: BlockNode) -> FileNode | None:
    """The file that holds the bytes of `node`, if it is one."""
    below: BlockNode | None = node
    while below is not None and not isinstance(below, FileNode):
        below = below.children().get("file")
    return below


def files_of(node: BlockNode) -> Iterator[FileNode]:
    """All files that hold bytes of `node`, those of its backing left out."""
    if isinstance(node, FileNode):
        yield node
    for role, child in node.children().items():
        if role != "backing":
            yield from files_of(child)


def check_unshared(file: FileNode, nodes: Iterable[BlockNode], *, read_only: bool) -> None:
    """Two nodes may have the same file only if neither writes."""
    for other in nodes:
        if other is file or not isinstance(other, FileNode) or (other.read_only and read_only):
            continue
        if other.identity() == file.identity():
            raise RequestError(
                f"Could not open '{file.filename}': Failed to get \"write\" lock: "
                f"the file is in use by node '{other.node_name}'"
            )


def check_single_writer(
    file: BlockNode, nodes: Iterable[BlockNode], node_name: str, *, read_only: bool
) -> None:
    """Only one format, here `node_name`, may make sense of the same bytes once anyone writes them."""
    for parent in nodes:
        if parent.node_name == node_name or (parent.read_only and read_only):
            continue
        if file in parent.children().values():
            role = f"(uses node '{file.node_name}' as 'file' child)"
            raise RequestError(
                f"Permission conflict on node '{file.node_name}': permissions 'write, resize' are both "
                f"required by node '{parent.node_name}' {role} and unshared by node '{node_name}' {role}."
            )


def check_chain(top: BlockNode, below: BlockNode | None = None) -> None:
    """Refuse a chain that is too deep or holds a file twice; for parts that were given by name.

    `below`: what the chain of `top` would go on with.
    """
    files: dict[tuple[int, int], str] = {}
    rest = chain(below) if below is not None else ()
    for depth, node in enumerate(joined(chain(top), rest), 1):
        if depth > CHAIN_DEPTH_MAX:
            raise RequestError(f"The backing chain has more than {CHAIN_DEPTH_MAX} images")
        for file in files_of(node):
            first = files.setdefault(file.identity(), node.node_name)
            if first != node.node_name:
                raise RequestError(
                    f"'{file.filename}' is in the backing chain twice: '{first}', '{node.node_name}'"
                )
