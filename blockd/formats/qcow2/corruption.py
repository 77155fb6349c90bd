"""What happens when the tables of an image that is open are found to contradict each other or the file.

Who finds it raises `Corruption`. Nothing was written because of it, and from then on nothing is written
to the image any more: whatever is done by wrong tables makes the damage larger. If the image is
writable, and the format has a place for it, it is marked corrupt on the disk, so that nobody else
writes to it either before it is repaired.

The `_nowait` operations only say that they would have to wait; the awaitable ones find it again and mark
the image.
"""

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from blockd.block.node import ProtocolNode
from blockd.errors import ImageError

P = ParamSpec("P")
T = TypeVar("T")


class Corruption(ImageError):
    """The tables of the image in `file` are wrong."""

    def __init__(self, file: ProtocolNode, what: str) -> None:
        super().__init__(f"'{file.filename}': {what}")
        self.file = file


class CanBeCondemned(Protocol):
    """An image that stops being written when its tables turn out to be wrong."""

    async def condemn(self, corruption: Corruption) -> None:
        """Mark the image, if the corruption is its own."""


Image = TypeVar("Image", bound=CanBeCondemned)


def condemning(
    operation: Callable[Concatenate[Image, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Image, P], Coroutine[Any, Any, T]]:
    """Let an operation of an image condemn it when it finds its tables wrong."""

    @wraps(operation)
    async def guarded(image: Image, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await operation(image, *args, **kwargs)
        except Corruption as corruption:
            await image.condemn(corruption)
            raise

    return guarded
