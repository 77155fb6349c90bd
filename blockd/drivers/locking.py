"""Files that clients have added are locked as far as they are used, through whatever nodes above them.

What a change is going to need is locked before it is made (`take`). When it is over, what is needed then is
locked, and no more (`adjust`). In between a file is locked too much rather than too little.
"""

from collections.abc import Callable, Iterable, Sequence

from blockd.block.node import BlockNode
from blockd.block.permissions import NOTHING, RESIZE, Access, writes
from blockd.drivers.sharing import check_unshared
from blockd.drivers.uses import Uses
from blockd.errors import RequestError
from blockd.protocols.file import FileNode
from blockd.protocols.image_lock import Use
from blockd.protocols.used_file import UsedFile

# The nodes that have the same file as one.
SameFiles = Callable[[FileNode], Iterable[BlockNode]]
# Lets what stands on a file know what others have made of that; also what is not in the graph yet.
Follow = Callable[[BlockNode, Sequence[BlockNode]], None]


class FileLocks:
    """The locks on the files of a graph; `uses` says how these are used."""

    def __init__(self, uses: Uses, same_files: SameFiles, follow: Follow) -> None:
        self._uses = uses
        self._same_files = same_files
        self._follow = follow
        # Locked for what was planned, or may be done.
        self._taken: dict[UsedFile, None] = {}

    def note(self, file: FileNode) -> None:
        """A file was opened, and is perhaps locked for more than it is used for."""
        if isinstance(file, UsedFile):
            self._taken[file] = None

    async def take(self, planned: Uses, opened: Iterable[BlockNode] = ()) -> None:
        """Lock the files as they are planned to be used.

        `opened`: nodes that are not in the graph yet.

        Raises:   RequestError: somebody else uses one of them; `adjust` lets go of the others.
        """
        others = [*opened]
        for file in planned.changed_files:
            await self._raise(file, _use(planned.wanted(file)), others)

    async def _raise(self, file: UsedFile, use: Use, opened: Sequence[BlockNode] = ()) -> None:
        if use > file.use:
            check_unshared(file, [*self._same_files(file), *opened], use)
            self._taken[file] = None
            was_used = file.use is not Use.NONE
            await file.lock_for(use)
            if not was_used:
                self._follow(file, opened)

    async def cover(self) -> None:
        """Lock the files for what they are used for now, beside what they are locked for: that may come back.

        Raises:   RequestError: somebody else uses one of them.
        """
        for file in [*self._uses.changed_files]:
            if not file.is_closed:
                await self._raise(file, _use(self._uses.wanted(file)))

    async def adjust(self) -> None:
        """Lock the files as they are used now.

        Raises:   RequestError: somebody else uses one of them; it is tried again the next time.
        """
        changed, refused = self._uses.changed_files, dict[UsedFile, RequestError]()
        while pending := [file for file in {**changed, **self._taken} if file not in refused]:
            for file in pending:
                try:
                    await self._adjust(file)
                except RequestError as error:  # the others are let go of all the same
                    refused[file] = error
                else:
                    changed.pop(file, None)
                    self._taken.pop(file, None)
        for refusal in refused.values():
            raise refusal

    async def _adjust(self, file: UsedFile) -> None:
        if not file.is_closed:
            use = _use(self._uses.wanted(file))
            await self._raise(file, use)
            if use < file.use:
                await file.lock_for(use)


def _use(wanted: Access) -> Use:
    if writes(wanted) or RESIZE in wanted.need:
        return Use.WRITING
    return Use.NONE if wanted == NOTHING else Use.READING
