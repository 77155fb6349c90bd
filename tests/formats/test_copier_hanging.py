"""A daemon that ends while the copier does not answer."""

import asyncio
import os
import signal
from pathlib import Path

from blockd.aio import process_calls
from blockd.daemon.ending import STEP_MAX_S, Ending
from blockd.protocols.copier import Copier
from tests.formats.test_copier import CONTENT, asked_in_vain, files
from tests.formats.test_copier import own as own  # noqa: PLC0414  (a fixture)


async def test_a_copy_that_hangs_does_not_keep_the_daemon_from_ending(tmp_path: Path, own: Copier) -> None:
    async with files(tmp_path, CONTENT) as (source, target):
        pid, copy = await asked_in_vain(source, target, own)
        ending = Ending()
        async with asyncio.timeout(STEP_MAX_S / 2):
            await ending.step("images", asyncio.create_task(copied(copy)), patience_s=0.01)
        assert ending.left == ["images"]
        os.kill(pid, signal.SIGCONT)
        assert await copy == []
        assert process_calls.count == 0


async def copied(copy: "asyncio.Task[object]") -> None:
    await copy
