"""Memory that was freed: the C library keeps it where a smaller piece behind it is still in use."""

import asyncio
import ctypes

# A burst may be followed by the next one, for which fresh memory would cost a page fault every 4 KiB.
AFTER_S = 1.0


def give_back() -> None:
    """Give it back to the system; other C libraries than glibc do so by themselves. Takes milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def give_back_soon() -> None:
    """Give it back in a moment, and keep nobody waiting."""
    loop = asyncio.get_running_loop()
    loop.call_later(AFTER_S, loop.run_in_executor, None, give_back)
