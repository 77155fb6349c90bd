"""Who is told that writes are lost which were acknowledged, and for how long that is remembered.

A loss belongs to a disk. The next flush of every client that may write fails with it, once for each
connection: of those that are open when it happens, and of all that come later. The guest whose writes are
lost may be away just then, and nobody can tell whether the client that connects next is that guest. So only
a person ends this, by the command `acknowledge-lost-writes`. Until then the journal has the loss, and the
next run goes on telling it.
"""

import errno

from blockd.errors import StorageError


class LostWrites:
    """What one disk has lost, and which of its clients know."""

    def __init__(self) -> None:
        # The reason in words; None: nothing is lost, or somebody has taken note of it.
        self.why: str | None = None
        self._told: set[object] = set()

    def add(self, why: str) -> None:
        """Note a loss; whoever was told of an earlier one is told again."""
        self.why = why
        self._told.clear()

    def acknowledge(self) -> None:
        """Somebody sees to it: who has not been told yet never is."""
        self.why = None
        self._told.clear()

    def leave(self, client: object) -> None:
        """A client has gone, told or not."""
        self._told.discard(client)

    def report(self, client: object) -> None:
        """Fail the first flush of a client since the loss.

        Raises:   StorageError: what it wrote may be lost.
        """
        if self.why is not None and client not in self._told:
            self._told.add(client)
            raise StorageError(f"acknowledged writes are lost: {self.why}", errno=errno.EIO)
