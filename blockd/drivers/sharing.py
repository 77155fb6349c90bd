"""What may stand together: which nodes may have one file, and which images may make a chain.

Raises:   RequestError, from every check: who is in the way of whom; nothing was changed.
"""

from collections.abc import Iterable, Iterator
from itertools import chain as joined

from blockd.block.chain import chain, primary_child
from blockd.block.node import BlockNode
from blockd.errors import RequestError
from blockd.found_files import AT_FDCWD, Folder
from blockd.protocols.file import FileNode
from blockd.protocols.image_lock import Use
from blockd.protocols.used_file import UsedFile

CHAIN_DEPTH_MAX = 64


def file_of(node: BlockNode) -> FileNode | None:
    """The file that holds the bytes of `node`, if it is one."""
    below: BlockNode | None = node
    while below is not None and not isinstance(below, FileNode):
        below = primary_child(below)
    return below


def folder_of(node: BlockNode) -> Folder:
    """What the names count from that an image records."""
    file = file_of(node)
    return Folder(node.filename, AT_FDCWD) if file is None else file.folder


def files_of(node: BlockNode) -> Iterator[FileNode]:
    """All files that hold bytes of `node`, those of its backing left out."""
    if isinstance(node, FileNode):
        yield node
    for role, child in node.children().items():
        if role != "backing":
            yield from files_of(child)


def use_of(file: FileNode) -> Use:
    """What is done with a file: as far as it is used, or else whatever may be done."""
    return file.use if isinstance(file, UsedFile) else Use.of(read_only=file.read_only)


def use_if_writable(file: FileNode) -> Use:
    """What may be done with a file that becomes writable: what it is locked for, if that follows its use."""
    return file.use if isinstance(file, UsedFile) else Use.WRITING


def check_unshared(file: FileNode, nodes: Iterable[BlockNode], use: Use) -> None:
    """Two nodes may use the same file only if neither writes.

    `use`: what is going to be done with `file`.
    """
    for other in nodes:
        if other is file or not isinstance(other, FileNode) or not use.meets(use_of(other)):
            continue
        if other.identity() == file.identity():
            raise RequestError(
                f"Could not open '{file.filename}': Failed to get \"write\" lock: "
                f"the file is in use by node '{other.node_name}'"
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
