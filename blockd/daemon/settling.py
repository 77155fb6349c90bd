"""What becomes of guests' writes at the end of a run: none that was acknowledged is lost in silence.

    guests have left → staged writes are merged, or else kept → images are flushed → what is lost is recorded

What is staged gets some seconds to be merged. What is left then is kept in the state directory, or is lost,
which is logged, told by an event, and recorded for the next run if there may be one.

The journal's models are loaded by those daemons only that have a journal.
"""

# ruff: noqa: PLC0415

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from blockd.block.chain import all_below
from blockd.block.node import BlockNode, ProtocolNode
from blockd.commands.context import Services
from blockd.daemon.recorder import Recorder
from blockd.errors import BlockdError, StorageError
from blockd.filters.blkstream import BlkStream
from blockd.filters.throttle import unthrottled_files

if TYPE_CHECKING:
    from blockd.daemon.state import StagedRecord

log = logging.getLogger(__name__)

# How long a stop waits for the sources of staged writes.
MERGE_LIMIT_S = 5.0


async def settle(services: Services, recorder: Recorder) -> None:
    """Merge what is staged, or keep it for the next run, or tell that it is lost; images are closed next.

    Needs:    guests have left, jobs have ended, and the recorder is closed.
    """
    staged = await services.streams.flush_staged(MERGE_LIMIT_S)
    if recorder.keeps_staged:
        await _keep(services, recorder, staged)
    else:
        for front in staged:
            _lose(services, front, "the daemon has ended")
        await _flush_images(services)
    await services.jobs.stop_beside()


async def _keep(services: Services, recorder: Recorder, staged: list[BlkStream]) -> None:
    """Keep for the next run what is staged, and what is known to be lost."""
    from blockd.daemon.snapshot import kept_records
    from blockd.daemon.staged_file import pack

    records = kept_records(services, but=staged)
    kept_before = [inserted.front for inserted in services.streams if inserted.kept is not None]
    for front in staged:
        try:
            content = pack(front.staged_pieces())
            if front in kept_before:
                # What the new file has not is in the image, and must be durable before the old file goes.
                with contextlib.suppress(BlockdError):  # `_flush_images` tells
                    await front.active.flush()
            records.append(await recorder.write_staged(front.active, front.staged_length, content))
        except StorageError as error:
            _lose(services, front, error.message)
    await _finish(services, recorder, records)
    await _flush_images(services)
    await _finish(services, recorder, records)


async def _finish(services: Services, recorder: Recorder, records: "list[StagedRecord]") -> None:
    try:
        await recorder.finish(records)
    except StorageError as error:
        if records or services.devices.losses:
            log.error("what guests wrote last may be lost without their being told: %s", error.message)
        else:
            recorder.tell(error)


def _lose(services: Services, front: BlkStream, why: str) -> None:
    reason = front.staging_error.message if front.staging_error is not None else "the source is slow"
    services.devices.lose(front.active, front.drop_staged(), f"not merged ({reason}), not kept ({why})")


async def _flush_images(services: Services) -> None:
    """Bring to the disk what guests wrote and did not flush; nobody could be told if only closing failed."""

    async def flush(image: BlockNode) -> None:
        files = [node for node in all_below(image) if isinstance(node, ProtocolNode)]
        if image.read_only or not image.needs_flush() or any(file.failed for file in files):
            return  # of a failed sync guests were told already
        try:
            with unthrottled_files(image):  # no guest is kept within limits any more
                await image.flush()
        except BlockdError as error:
            services.devices.lose(image, None, error.message)

    # Side by side: one that hangs keeps no other from its disk.
    await asyncio.gather(*map(flush, {device.active for device in services.devices.all}))
