"""The daemon itself."""

from blockd.commands.context import Services
from blockd.commands.topic import Table

TABLE: Table = Table()


@TABLE.command("quit")
async def quit_daemon(services: Services) -> None:
    """End the daemon: jobs are stopped, their events sent; then comes this reply, then the end."""
    await services.jobs.stop_all()
    services.stop()
