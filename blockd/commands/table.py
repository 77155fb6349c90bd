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
from blockd.commands.events import EVENTS
from blockd.commands.topic import Table

COMMANDS: Table = Table(EVENTS)
for _module in (stream, jobs, nodes, stats, creation, snapshots, transaction, objects, exports, control):
    COMMANDS.merge(_module.TABLE)
