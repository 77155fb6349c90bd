"""A daemon with a state directory that runs several times, by itself or ended by a kill."""

from collections.abc import Sequence
from pathlib import Path

from blockd.daemon.journal import parse_journal
from blockd.protocols.nbd_client import NbdClient
from tests.daemon_process import DaemonProcess
from tests.qmp_client import Json, QmpClient


class Restarts(DaemonProcess):
    """One folder, one state directory, many runs."""

    def __init__(
        self, folder: Path, *arguments: str | Path, program: Sequence[str] = ("-m", "blockd.cli.daemon")
    ) -> None:
        super().__init__(folder, *arguments, "--state-dir", folder / "state", program=program)

    async def run(self) -> QmpClient:
        """Start, and open a QMP session."""
        await self.start()
        return await self.qmp()

    def be_alone(self) -> None:
        """From now on, start with the state directory and nothing else."""
        self.arguments = ["--state-dir", str(self.folder / "state"), "--pidfile", str(self.pidfile)]

    async def guest(self, export: str = "vda") -> NbdClient:
        return await NbdClient.connect_unix(str(self.nbd_path), export)

    async def content(self, export: str = "vda") -> bytes:
        """All that a guest reads."""
        async with await self.guest(export) as client:
            parts = [
                bytes(await client.read(offset, min(1 << 20, client.size - offset)))
                for offset in range(0, client.size, 1 << 20)
            ]
        return b"".join(parts)

    @property
    def journal(self) -> Json:
        """The state in the journal."""
        data = (self.folder / "state" / "journal.json").read_bytes()
        return parse_journal(data, "journal").state


async def events_to_the_end(client: QmpClient) -> list[str]:
    """Read until the daemon is gone; the names of all events of the session."""
    try:
        while True:
            await client.receive()
    except (EOFError, OSError):
        return client.event_names()
