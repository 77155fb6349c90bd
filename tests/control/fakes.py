"""A job whose work is a script, and an observer that writes down what it is told."""

import asyncio
from collections.abc import Callable

from blockd.errors import BlockdError, StorageError
from blockd.jobs.job import Action, Job


class Recorder:
    """Writes down every call as one line."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def status_changed(self, job: Job) -> None:
        self.lines.append(job.status.value)

    def error_met(self, job: Job, operation: str, action: Action) -> None:
        self.lines.append(f"ERROR {operation} {action.value}")

    def pending(self, job: Job) -> None:
        self.lines.append("PENDING")

    def ended(self, job: Job) -> None:
        if job.is_cancelled:
            self.lines.append("CANCELLED")
        else:
            self.lines.append(f"COMPLETED {job.error.message if job.error else 'ok'}")

    def done(self, job: Job) -> None:
        self.lines.append("done")


class ScriptedJob(Job):
    """Does `chunk_count` chunks; before each it waits for a `step()`, as for I/O."""

    type = "stream"

    def __init__(self, job_id: str = "j", *, chunk_count: int = 2, **options: object) -> None:
        super().__init__(job_id, length=chunk_count, **options)  # type: ignore[arg-type]
        self.chunk_count = chunk_count
        self.bytes_per_chunk = 0
        self.failures: dict[int, list[StorageError]] = {}
        self.commit_error: BlockdError | None = None
        self.commit_gate: asyncio.Event | None = None
        self.done_chunks: list[int] = []
        self.was_cleaned_up = False
        self._steps = asyncio.Semaphore(0)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._steps.release()

    async def run(self) -> None:
        chunk = 0
        try:
            while chunk < self.chunk_count:
                await self.pause_point(self.bytes_per_chunk if chunk else 0)
                await self._steps.acquire()
                if self.failures.get(chunk):
                    error = self.failures[chunk].pop(0)
                    action = await self.handle_error(error, "read")
                    if action is Action.REPORT:
                        raise error
                    if action is Action.STOP:
                        continue
                self.done_chunks.append(chunk)
                chunk += 1
                self.set_progress(chunk, self.chunk_count)
        finally:
            self.was_cleaned_up = True

    async def commit(self) -> None:
        if self.commit_gate is not None:
            await self.commit_gate.wait()
        if self.commit_error is not None:
            raise self.commit_error


async def settle(until: Callable[[], bool] | None = None) -> None:
    """Let every task run until it waits for something that is not there yet."""
    for _ in range(50):
        if until is not None and until():
            return
        await asyncio.sleep(0)
    assert until is None, "what the test waits for did not happen"
