"""What is recorded of a daemon: as much as it takes to go on after a restart.

Nothing in here changes with the data or with the progress of a job: the images know both. A name of ""
stands for none where a name is a key, None elsewhere. Names of files and sockets are absolute.

The format on disk follows from these models; whoever changes them in a way that an older blockd would
misread raises `state_dir.VERSION`.
"""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, ValidationError

from blockd.errors import ImageError
from blockd.jobs.job import OnError
from blockd.qmp.models import Members


class UnixPlace(Members):
    """A socket in the file system."""

    type: Literal["unix"] = "unix"
    path: str


class InetPlace(Members):
    """A TCP port."""

    type: Literal["inet"] = "inet"
    host: str
    port: int


Place = Annotated[UnixPlace | InetPlace, Field(discriminator="type")]


class ThrottleGroupRecord(Members):
    """A throttle group. Of other objects nothing is kept: they may be secrets."""

    id: str
    limits: dict[str, int]


class NodeRecord(Members):
    """A node; those below it come before it."""

    options: dict[str, JsonValue]
    """What opens it again: BlockdevOptions without nested nodes and without `backing`."""
    backings: dict[str, str] | None = None
    """Of an overlay: which node is its backing, by the backing file that the image records. While a stream
    runs there are two answers, and what the image says decides whether the stream had ended."""
    is_added: bool = False
    """It stays until blockdev-del."""


class DeviceRecord(Members):
    """A disk with a name."""

    name: str
    node: str


class NbdServerRecord(Members):
    """The NBD server; a socket that was inherited is not recorded."""

    places: list[Place]
    max_connections: int


class ExportRecord(Members):
    """A disk offered over NBD."""

    id: str
    node: str
    name: str
    description: str
    is_writable: bool


class StreamRecord(Members):
    """What a stream copies; see `devices.streams.StreamRequest`."""

    node: str
    base: str | None
    backing_file: str | None
    filter_node_name: str | None
    is_classic: bool
    """Started with block_stream, so that BLOCK_STREAM_COMPLETED tells its end."""


class JobRecord(Members):
    """A job that was not dismissed."""

    id: str
    type: str
    stream: StreamRecord | None
    """None: it cannot go on in another run."""
    speed: int
    on_error: OnError
    auto_finalize: bool
    auto_dismiss: bool
    group: int | None
    """Jobs of one group complete together or not at all."""
    is_paused: bool
    """A client has paused it. One that an error has paused tries again after a restart."""
    is_cancelled: bool
    length: int
    offset: int = 0
    """How far it came; of a concluded job only."""
    is_concluded: bool = False
    """Its end was told."""
    error: str | None = None
    """Of a concluded job that failed."""
    plain_image: str | None = None
    """The image that needs no add-cow file any more, of a job that has done its work."""


class MonitorRecord(Members):
    """Where QMP is served."""

    place: Place
    is_pretty: bool


class State(Members):
    """All of it, each list in the order in which it was made."""

    throttle_groups: list[ThrottleGroupRecord]
    nodes: list[NodeRecord]
    devices: list[DeviceRecord]
    nbd_server: NbdServerRecord | None
    exports: list[ExportRecord]
    jobs: list[JobRecord]
    given: dict[str, str]
    """What the command line has brought about so far, now or in an earlier run: what it is, and the option.
    What is in here and nowhere above was removed at run time."""
    monitors: list[MonitorRecord]
    image_paths: list[str]
    allowed_files: list[str]
    """Files that a user has named, which other images may therefore name too."""


def parse_state(text: str, path: str) -> State:
    """Understand the state in the journal of the state directory `path`.

    Raises:   ImageError: it is none that this blockd writes.
    """
    try:
        return State.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise ImageError(
            f"The journal in '{path}' is not understood, though its version is known: start the blockd that "
            f"wrote it ({place}: {fault['msg']})"
        ) from error
