"""What images have to do beside guests, without anybody having asked for it."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

from blockd.block.node import BlockNode

log = logging.getLogger(__name__)


class Housekeeping(ABC):
    """An image that may have something to do after it was opened."""

    @abstractmethod
    def begin_housekeeping(self) -> Callable[[], Awaitable[None]] | None:
        """Begin it, and return what does the rest, in a task of the caller's; None: there is nothing to do.

        It ends by itself when the image is closed, or made read-only, and raises no BlockdError.

        Needs:    the image was opened for writing, and nobody has written to it since.
        """


class Housekeeper:
    """Has images do that in tasks of its own, one image at a time; they end when all images are closed."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks
        self._working = asyncio.Lock()

    def begin(self, node: BlockNode) -> None:
        """See whether a node that was opened has something to do."""
        if isinstance(node, Housekeeping) and not node.read_only:
            work = node.begin_housekeeping()
            if work is not None:
                self._tasks.create_task(self._do(node.node_name, work))

    async def _do(self, node_name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do it when it is its turn. The supervisor of that work: guests keep their disks."""
        async with self._working:
            try:
                await work()
            except Exception:
                log.exception("what node %s does beside guests failed inside", node_name)
