"""Turns what happens in the daemon into events, if there is anybody to hear of it.

The events are models, which a daemon is there before; where nobody listens they are not needed.
"""

# ruff: noqa: PLC0415

from blockd.errors import Operation
from blockd.jobs.job import Action, Job
from blockd.qmp.events import EventBus


class EventTeller:
    """A `JobObserver` that emits an event for everything, and tells of exports gone and writes lost."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus

    def status_changed(self, job: Job) -> None:
        if self._bus.has_listeners:
            from blockd.commands.events import JobStatusChange

            self._bus.emit(JobStatusChange(status=job.status, id=job.id))

    def error_met(self, job: Job, operation: Operation, action: Action) -> None:
        if self._bus.has_listeners:
            from blockd.commands.events import BlockJobError

            self._bus.emit(BlockJobError(device=job.id, operation=operation, action=action))

    def pending(self, job: Job) -> None:
        if self._bus.has_listeners:
            from blockd.commands.events import BlockJobPending

            self._bus.emit(BlockJobPending(type=job.type, id=job.id))

    def ended(self, job: Job) -> None:
        if not (job.is_block_job and self._bus.has_listeners):
            return
        from blockd.commands.events import BlockJobCancelled, BlockJobCompleted

        end = {"device": job.id, "len": job.length, "offset": job.offset, "speed": job.speed}
        if job.is_cancelled:
            self._bus.emit(BlockJobCancelled.model_validate({**end, "type": job.type}))
        else:
            result = {
                "type": job.type,
                "error": job.error_text,
                "x_detail": job.error_detail,
                "image": job.plain_image,
            }
            self._bus.emit(BlockJobCompleted.model_validate({**end, **result}))

    def writes_lost(self, device: str, node_name: str, length: int | None, why: str) -> None:
        if self._bus.has_listeners:
            from blockd.commands.events import BlockWritesLost

            self._bus.emit(BlockWritesLost(device=device, node_name=node_name, len=length, error=why))

    def export_deleted(self, export_id: str) -> None:
        if self._bus.has_listeners:
            from blockd.commands.events import BlockExportDeleted

            self._bus.emit(BlockExportDeleted(id=export_id))
