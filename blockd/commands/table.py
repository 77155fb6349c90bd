"""All commands of the daemon; the QMP server adds those of a session."""

from blockd.commands import (
    block_graph,
    control,
    creation,
    exports,
    jobs,
    left_out,
    nodes,
    objects,
    snapshots,
    stats,
    stream,
    transaction,
)
from blockd.commands.events import EVENTS, BlockJobCompleted, BlockStreamCompleted, JobStatusChange
from blockd.commands.jobs import BlockStreamJobArguments
from blockd.commands.stream import BlockStreamArguments
from blockd.commands.topic import Table

COMMANDS: Table = Table(EVENTS)
for _module in (
    stream,
    jobs,
    nodes,
    stats,
    block_graph,
    creation,
    snapshots,
    transaction,
    objects,
    exports,
    left_out,
    control,
):
    COMMANDS.merge(_module.TABLE)


def build_models_of_streams() -> None:
    """Build now what is built when it is first used otherwise, and guests are at work."""
    for model in (
        BlockStreamJobArguments,
        BlockStreamArguments,
        JobStatusChange,
        BlockJobCompleted,
        BlockStreamCompleted,
    ):
        model.model_rebuild()
