"""transaction: changes to several disks, all of them or none.

The changes of all disks take effect at one moment: their guests are held together. Besides QEMU's actions
there are ``x-block-switch`` and ``x-block-stream``, so that a live copy of several disks is one request.
"""

from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from blockd.commands.context import Services
from blockd.commands.events import BlockSwitched
from blockd.commands.jobs import BlockStreamJobArguments, stream_request
from blockd.commands.snapshots import (
    BlockdevSnapshotArguments,
    BlockdevSnapshotSyncArguments,
    snapshot_in_file,
    snapshot_on_node,
)
from blockd.commands.stream import BlockSwitchArguments
from blockd.commands.topic import Table
from blockd.devices.changes import Change, make_changes
from blockd.devices.overlays import Switch
from blockd.devices.stream_changes import StartStream
from blockd.errors import RequestError
from blockd.jobs.group import JobGroup
from blockd.qmp.models import Arguments, Members

TABLE: Table = Table()

CompletionMode = Literal["individual", "grouped"]


class Action(Members):
    """One action; ``data`` are the arguments of the command of that name.

    QEMU refuses snapshots where jobs complete together, although they have none.
    """

    can_be_grouped: ClassVar[bool] = False

    type: str


class SnapshotAction(Action):
    """Put an overlay that is a node already in the place of a node."""

    type: Literal["blockdev-snapshot"]
    data: BlockdevSnapshotArguments

    def change(self, services: Services, group: JobGroup | None) -> Change:
        return snapshot_on_node(services, self.data)


class SnapshotSyncAction(Action):
    """Put an overlay in a file in the place of an image."""

    type: Literal["blockdev-snapshot-sync"]
    data: BlockdevSnapshotSyncArguments

    def change(self, services: Services, group: JobGroup | None) -> Change:
        return snapshot_in_file(services, self.data)


class SwitchAction(Action):
    """block_switch: put an overlay that is a file already in the place of a device's active image."""

    can_be_grouped: ClassVar[bool] = True

    type: Literal["x-block-switch"]
    data: BlockSwitchArguments

    def change(self, services: Services, group: JobGroup | None) -> Change:
        arguments = self.data
        return Switch(
            services.devices, services.streams, arguments.device, arguments.filename, arguments.format
        )


class StreamAction(Action):
    """block-stream: copy into a node what its backing files hold.

    Grouped streams complete together: if one fails or is cancelled, so are the others.
    """

    can_be_grouped: ClassVar[bool] = True

    type: Literal["x-block-stream"]
    data: BlockStreamJobArguments

    def change(self, services: Services, group: JobGroup | None) -> Change:
        find = partial(stream_request, services, self.data)
        return StartStream(services.streams, services.jobs, find, group)


class AbortData(Members):
    """Nothing."""


class Abort(Change):
    """Cannot be done."""

    async def prepare(self) -> None:
        """Nothing is needed to fail."""

    async def perform(self) -> None:
        raise RequestError("Transaction aborted using Abort action")

    async def undo(self) -> None:
        raise AssertionError("it was never done")

    async def clean(self) -> None:
        """Nothing was prepared."""


class AbortAction(Action):
    """Fail: a way to try the other actions out."""

    can_be_grouped: ClassVar[bool] = True

    type: Literal["abort"]
    data: AbortData

    def change(self, services: Services, group: JobGroup | None) -> Change:
        return Abort()


AnyAction = Annotated[
    SnapshotAction | SnapshotSyncAction | SwitchAction | StreamAction | AbortAction,
    Field(discriminator="type"),
]


class TransactionProperties(Members):
    """How the jobs of the actions complete."""

    completion_mode: CompletionMode = "individual"


class TransactionArguments(Arguments):
    """What to do."""

    actions: list[AnyAction]
    properties: TransactionProperties = TransactionProperties()


@TABLE.command("transaction")
async def transaction(services: Services, arguments: TransactionArguments) -> None:
    """Do several things at one moment, all of them or none."""
    group = JobGroup() if arguments.properties.completion_mode == "grouped" else None
    for action in arguments.actions:
        if group is not None and not action.can_be_grouped:
            raise RequestError(
                f"Action '{action.type}' does not support Transaction property completion-mode = grouped"
            )
    changes = [action.change(services, group) for action in arguments.actions]
    await make_changes(services.devices, changes)
    for action, change in zip(arguments.actions, changes, strict=True):
        if isinstance(action, SwitchAction) and isinstance(change, Switch):
            names = {"filename": change.overlay.filename, "backing": change.old.filename}
            services.events.emit(BlockSwitched(device=action.data.device, **names))
