"""The end in steps, each of bounded time: what hangs is left behind, and the log says what.

A call that waits for a server which does not answer cannot be called back, nor the thread that makes it be
ended. The others' images are closed in order all the same; then the process ends without unwinding, as that
would wait for the thread.

Whatever goes wrong meanwhile is an error in the log, one line each: an image that cannot be flushed or
closed, writes that are lost, a journal that cannot be written. The exit status says whether there was one.
"""

import asyncio
import logging
import os
import sys
from typing import NoReturn, Self

from blockd.aio import process_calls, thread_calls
from blockd.errors import BlockdError, printable

log = logging.getLogger(__name__)
# Of all that blockd logs.
_logger = logging.getLogger("blockd")

# A call that has been under way for this long is taken to hang. A sync may last, so closing images has more.
PATIENCE_S = 10.0
IMAGES_PATIENCE_S = 30.0
# The most for a step in which no call hangs: it waits for something else, such as a peer.
STEP_MAX_S = 60.0
_INTERVAL_S = 0.25


class _Errors(logging.Handler):
    """Notes whether errors are logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.are_there = False

    def emit(self, record: logging.LogRecord) -> None:
        self.are_there = True


class Ending:
    """What the steps so far have left behind: `with Ending() as ending`."""

    def __init__(self) -> None:
        self._left: dict[str, asyncio.Task[None]] = {}
        self._errors = _Errors()

    def __enter__(self) -> Self:
        _logger.addHandler(self._errors)
        return self

    def __exit__(self, *exception: object) -> None:
        _logger.removeHandler(self._errors)

    @property
    def is_clean(self) -> bool:
        """Whether nothing has gone wrong since this was entered."""
        return not self._errors.are_there

    async def step(self, what: str, task: "asyncio.Task[None]", patience_s: float = PATIENCE_S) -> None:
        """Wait for one step of the end, or leave it behind."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        while not task.done():
            await asyncio.wait([task], timeout=_INTERVAL_S)
            if _is_hanging(loop.time() - started, patience_s):
                self._left[what] = task
                return
        try:
            await task
        except (BlockdError, OSError) as error:  # others are still to be closed
            log.error("%s: %s", what, printable(str(error)))

    @property
    def left(self) -> list[str]:
        """What has not ended by now."""
        return [what for what, task in self._left.items() if not task.done()]

    def abandon(self, unclosed: list[str]) -> NoReturn:
        """End the process; `unclosed`: the images that could not be closed."""
        images = "".join(f", '{printable(filename)}'" for filename in unclosed)
        log.error(
            "ending without waiting any longer: %d calls have not returned; left: %s%s",
            *(thread_calls.count + process_calls.count, ", ".join(self.left), images),
        )
        logging.shutdown()
        sys.stderr.flush()
        os._exit(1)


def _is_hanging(lasted_s: float, patience_s: float) -> bool:
    """Whether a step that has lasted so long waits for what does not come."""
    call_s = max(thread_calls.longest_s, process_calls.longest_s)
    return lasted_s > STEP_MAX_S or (lasted_s > patience_s and call_s > patience_s)
