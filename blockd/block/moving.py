"""Images that go on in another file: a throttle is put below an image, or two images swap their files.

back = image.stay()
move = await image.load_from(file)
move()                                  or, if something else fails then: back()
"""

from abc import abstractmethod
from collections.abc import Callable

from blockd.block.node import BlockNode, OverlayNode, ProtocolNode

# Has an image go on in a file from which its tables were read; it neither waits nor fails.
Move = Callable[[], None]


class MovableImage(OverlayNode):
    """An image whose tables can be read from another file, and what that holds be the disk from then on."""

    @abstractmethod
    async def prepare_to_move(self) -> None:
        """Make everything durable, and leave the file as it is when the image is closed.

        Needs:    no request is in flight.
        """

    @abstractmethod
    async def load_from(self, file: ProtocolNode) -> Move:
        """Read what this image is in another file.

        Needs:    no request is in flight; this image is prepared, and so is one that is in `file` now.
        Raises:   ImageError, StorageError: there is no image of this format in it, or none that can be used.
        """

    @abstractmethod
    def stay(self) -> Move:
        """What brings the image back to where it is now, as long as nobody has written there meanwhile."""


def take_over_size(file: BlockNode) -> None:
    """Let what stands in front of a file know its size: others, who pass it by, may have changed it.

    Nothing happens to other nodes.
    """
    for below in file.children().values():
        if isinstance(file, ProtocolNode) and isinstance(below, ProtocolNode):
            take_over_size(below)
            file.size = below.size
