"""One life of the daemon in a storm."""

import asyncio
import contextlib
import random
from collections import Counter
from typing import Any

from tests.qmp_client import QmpClient, QmpError
from tests.state.restarts import Restarts

ANSWER_COUNT_MAX = 60
LIFE_S_MAX = 3.0
DELAY_S_MAX = 0.02


class Life:
    """The daemon from its start to its end, as all who use it know it."""

    # What a client meets when the daemon is gone.
    gone = (EOFError, ConnectionError)

    def __init__(self, daemon: Restarts, rng: random.Random) -> None:
        self.daemon = daemon
        self.rng = rng
        self.is_over = False
        # How many more commands are answered before the end; reached on machines of any speed.
        self._left = rng.randrange(ANSWER_COUNT_MAX)
        self._is_enough = asyncio.Event()
        # By command: how many were done, and refused.
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    async def last(self) -> None:
        """Return at the moment of the end: while a command is under way, most likely."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LIFE_S_MAX):
                await self._is_enough.wait()
        await asyncio.sleep(self.rng.random() * DELAY_S_MAX)

    def go_on(self) -> None:
        """End the work of a client that waited for something else while the daemon ended."""
        if self.is_over:
            raise EOFError

    async def ask(self, client: QmpClient, command: str, arguments: dict[str, Any] | None = None) -> bool:
        """Send a command; tell whether it was done. No refusal may be an internal error."""
        self._left -= 1
        if self._left <= 0:
            self._is_enough.set()
        try:
            await client.command(command, arguments or {})
        except QmpError as error:
            assert error.error_class != "CommandNotFound", error
            assert "nternal error" not in error.description, f"{command} {arguments}: {error}"
            self.refused[command] += 1
            return False
        self.done[command] += 1
        return True
