"""The daemon itself."""

import asyncio

from blockd.commands.context import Services
from blockd.commands.topic import Table

TABLE: Table = Table()

# How long `quit` waits for requests of guests that are under way.
EXPORTS_PATIENCE_S = 5.0


@TABLE.command("quit")
async def quit_daemon(services: Services) -> None:
    """End the daemon: exports and jobs end, their events are sent; then comes this reply, then the end.

    With a state directory jobs are suspended instead, and exports stay for the next run.
    """
    if not services.jobs.keeps_jobs:
        # A request that hangs keeps its client; the end has more patience, and goes on without it.
        ending = services.jobs.run_beside(services.exports.end())
        await asyncio.wait([ending], timeout=EXPORTS_PATIENCE_S)
    await services.jobs.stop_all()
    services.stop()
