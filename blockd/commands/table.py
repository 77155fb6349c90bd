"""All commands of the daemon; the QMP server adds those of a session."""

from blockd.commands import (
    control,
    creation,
    exports,
    jobs,
    nodes,
    objects,
    snapshots,
    stats,
    stream,
    transaction,
)
from blockd.commands.context import Table
from blockd.commands.events import EVENTS

COMMANDS: Table = Table(EVENTS)
for _module in (stream, jobs, nodes, stats, creation, snapshots, transaction, objects, exports, control):
    COMMANDS.merge(_module.TABLE)
