"""What a client asks for when it asks for a stream."""

from collections.abc import Callable
from typing import NamedTuple

from blockd.block.node import BlockNode
from blockd.jobs.job import Job, OnError


class JobOptions(NamedTuple):
    """How any job is run."""

    speed: int = 0
    on_error: OnError = OnError.REPORT
    auto_finalize: bool = True
    auto_dismiss: bool = True


class StreamRequest(NamedTuple):
    """What to copy: all that the image at `top` lacks, down to, not including, `base` (None: everything).

    At the end `base` is the backing of the image, recorded as `backing_file` (empty: not at all) or under a
    name that leads there; it may be given as a filter in front of it. `on_done` is called exactly once, also
    after a cancel.
    """

    top: BlockNode
    job_id: str
    base: BlockNode | None = None
    backing_file: str | None = None
    filter_node_name: str | None = None
    options: JobOptions = JobOptions()
    on_done: Callable[[Job], None] | None = None
