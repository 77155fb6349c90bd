"""Changes to the graph under its guests: one or several, all of them or none.

    await make_changes(devices, [Switch(...), Switch(...)])

A change goes through four steps. All of them are prepared while the guests go on; then the guests of all
disks concerned are held together, so that what is changed on several disks is cut at one moment; then all
are performed, and if one cannot be, or the result not be recorded, what was done is undone; then they are
final.

Locks:    `Devices.changing`, then the drain of all roots concerned.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AsyncExitStack

from blockd.block.node import BlockNode
from blockd.devices.device import Devices


class Change(ABC):
    """One change; the steps are called in the order in which they stand here, each at most once."""

    @abstractmethod
    async def prepare(self) -> None:
        """Find and open what is needed, and refuse what cannot be; the guests go on."""

    def disks(self) -> list[BlockNode]:
        """The nodes whose guests have to be held."""
        return []

    @abstractmethod
    async def perform(self) -> None:
        """Do it; nothing is in flight.

        Fails to: all is as before.
        """

    @abstractmethod
    async def undo(self) -> None:
        """Take back what `perform` did, for another change could not be done."""

    def make_final(self) -> None:  # noqa: B027  (most have nothing left to do)
        """All changes are done."""

    @abstractmethod
    async def clean(self) -> None:
        """Let go of what was prepared; called in any case, also when `prepare` failed."""


async def make_changes(devices: Devices, changes: Sequence[Change]) -> None:
    """Do all changes, in order.

    Raises:   what the change that could not be done raised.
    Fails to: all disks are as before, and their guests go on.
    """
    async with devices.change(), AsyncExitStack() as cleaning:
        for change in changes:
            cleaning.push_async_callback(change.clean)
            await change.prepare()
        disks = [disk for change in changes for disk in change.disks()]
        async with devices.drained(*disks, is_bounded=True):
            async with AsyncExitStack() as undoing:
                for change in changes:
                    await change.perform()
                    undoing.push_async_callback(change.undo)
                # What a guest writes from here on has to be found after a restart.
                await devices.record()
                undoing.pop_all()
            for change in changes:
                change.make_final()
