"""A file that is locked as far as it is used: what nobody here uses, others may write."""

from blockd.aio import in_thread
from blockd.protocols.file import FileNode
from blockd.protocols.image_lock import NO_CLAIM, Claim, LockMode, Use, change_claim, claim_of, patiently
from blockd.protocols.opening import NamedFile, size_of


class UsedFile(FileNode):
    """A file that a client has added, whose users come and go.

    Needs:    `use` covers what is done with the file: see `lock_for`.
    """

    def __init__(self, named: NamedFile, *, node_name: str) -> None:
        super().__init__(named, node_name=node_name)
        # It is locked as for all that may be done with it, which takes no call of its own, unless somebody is
        # in the way: who uses it hears of that.
        self.use = Use.NONE if self._claim == NO_CLAIM else Use.of(read_only=self.read_only)

    async def lock(self, mode: LockMode) -> None:
        self._lock_mode = mode

    @property
    def is_closed(self) -> bool:
        return self._fd < 0

    async def lock_for(self, use: Use) -> None:
        """Keep others out as far as this use needs it.

        Raises:   RequestError: somebody else is using the file.
        Fails to: the file is locked as before.
        """
        await patiently(lambda: in_thread(self._lock_for_blocking, use))

    def _lock_for_blocking(self, use: Use) -> None:
        wanted = claim_of(self._lock_mode, use)
        change_claim(self._fd, self.filename, self._claim, wanted)
        if self.use is Use.NONE:
            self.size = size_of(self._fd, self.filename)  # others may have changed it
        self.use, self._claim = use, wanted

    def _claim_once(self, *, read_only: bool) -> Claim:
        return claim_of(self._lock_mode, self.use)
