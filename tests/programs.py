"""Other people's programs, run by tests."""

import asyncio
from pathlib import Path

from tests.missing import require_programs

PROGRAM_TIMEOUT_S = 100.0


async def run(*command: str | Path, expect: int | None = 0, stdin: str = "", cwd: Path | None = None) -> str:
    """Run a program and return what it printed on both streams.

    Raises:   AssertionError: its exit status is not `expect` (None: any will do), or it took too long.
    """
    words = [str(word) for word in command]
    if "/" not in words[0]:
        require_programs(words[0])  # an event loop may start programs in a way of its own
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=cwd,
    )
    try:
        async with asyncio.timeout(PROGRAM_TIMEOUT_S):
            output, _ = await process.communicate(stdin.encode())
    except TimeoutError:
        process.kill()
        await process.wait()
        raise AssertionError(f"{' '.join(words)} did not end within {PROGRAM_TIMEOUT_S} s") from None
    text = output.decode(errors="replace")
    assert expect in (None, process.returncode), f"{' '.join(words)} ended with {process.returncode}:\n{text}"
    return text
