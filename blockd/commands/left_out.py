"""What a restart could not bring back: telling of it, and giving it up.

A thing is given up by the command that removes it when it is there.
"""

from blockd.commands.context import Services
from blockd.commands.topic import Table
from blockd.devices.left_out import Kind
from blockd.qmp.models import Result

TABLE: Table = Table()


class LeftOutInfo(Result):
    """A thing of an earlier run that this one could not bring back; the next start tries again."""

    type: Kind
    name: str
    reason: str
    node_name: str | None = None
    """The node that it needs."""
    cause: str | None = None
    """The node that is left out, if that is the whole reason."""


@TABLE.command("query-left-out")
async def query_left_out(services: Services) -> list[LeftOutInfo]:
    """List what the journal has and the daemon has not."""
    return [
        LeftOutInfo(
            type=thing.kind, name=thing.name, reason=thing.reason, node_name=thing.node, cause=thing.cause
        )
        for thing in services.left_out
    ]


def give_up(services: Services, kind: Kind, name: str) -> bool:
    """Give up a thing if it is left out, and tell whether it was."""
    if services.left_out.get(kind, name) is None:
        return False
    services.left_out.forget(kind, name)
    return True
