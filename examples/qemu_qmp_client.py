#!/usr/bin/env python3
"""Stream a device and show how it goes, with QEMU's own Python library: pip install qemu.qmp

qemu_qmp_client.py QMP_SOCKET DEVICE [BYTES_PER_SECOND]
"""

import asyncio
import sys
from typing import Any, cast

from qemu.qmp import EventListener, QMPClient

INTERVAL_S = 0.5


async def show_progress(client: QMPClient, device: str) -> None:
    """Print the job's progress until cancelled."""
    while True:
        status = await client.execute("block_stream_status", {"device": device})
        for job in cast(list[dict[str, Any]], status):
            print(f"{job['offset'] / job['len']:.0%} of {job['len']} bytes")
        await asyncio.sleep(INTERVAL_S)


async def stream(socket: str, device: str, speed: int) -> bool:
    """Stream `device`, and tell whether it worked."""
    client = QMPClient("example")
    completed = EventListener(names="BLOCK_JOB_COMPLETED")
    client.register_listener(completed)
    await client.connect(socket)
    try:
        await client.execute("block_stream", {"device": device, "speed": speed})
        async with asyncio.TaskGroup() as tasks:
            progress = tasks.create_task(show_progress(client, device))
            event = await completed.get()
            progress.cancel()
    finally:
        await client.disconnect()
    error = cast(dict[str, Any], event["data"]).get("error")
    print(f"{device}: {error}" if error else f"{device} stands alone now")
    return error is None


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    has_worked = asyncio.run(stream(sys.argv[1], sys.argv[2], int(sys.argv[3]) if sys.argv[3:] else 0))
    sys.exit(0 if has_worked else 1)
