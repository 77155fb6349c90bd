"""What is recorded of a daemon: as much as it takes to go on after a restart.

Nothing in here changes with the data or with the progress of a job: the images know both. A name of ""
stands for none where a name is a key, None elsewhere. Names of files and sockets are absolute.

The format on disk follows from these models; whoever changes them in a way that an older blockd would
misread raises `state_dir.VERSION`.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, JsonValue, ValidationError

from blockd.errors import ImageError
from blockd.jobs.job import OnError
from blockd.jobs.states import JobType
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
    is_told_read_only: bool = False
    """Read-only because somebody said so, and not for being a backing file."""

    @property
    def name(self) -> str:
        return str(self.options["node-name"])

    @property
    def below(self) -> list[str]:
        """The nodes that it stands on, or may."""
        named = [str(self.options[role]) for role in ("file", "image") if role in self.options]
        return [*named, *filter(None, (self.backings or {}).values())]


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
    is_writethrough: bool = False
    tells_depth: bool = False


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
    type: JobType
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
    """Of a concluded job that failed: what its clients are told."""
    error_detail: str | None = None
    """What else is known of that."""
    plain_image: str | None = None
    """The image that needs no add-cow file any more, of a job that has done its work."""


class StagedRecord(Members):
    """Guest writes that were staged in front of an image when the run ended."""

    node: str
    """The image."""
    file: str
    """In the state directory."""
    sha256: str
    length: int
    """Of the data in it."""
    births: tuple[str, ...] = ()
    """Which files the image is in, as `birth_of`; none: an earlier blockd did not ask."""


class LostWritesRecord(Members):
    """Acknowledged writes are lost, and not every client knows."""

    node: str
    why: str


class MonitorRecord(Members):
    """Where QMP is served."""

    place: Place
    is_pretty: bool


class Things(Members):
    """What is restored one by one, each list in the order in which it was made."""

    throttle_groups: list[ThrottleGroupRecord]
    nodes: list[NodeRecord]
    devices: list[DeviceRecord]
    exports: list[ExportRecord]
    jobs: list[JobRecord]


class SmallParts(Members):
    """What does not become more with the number of disks."""

    throttle_groups: list[ThrottleGroupRecord]
    nbd_server: NbdServerRecord | None
    staged: list[StagedRecord] = Field(default_factory=list)
    lost_writes: list[LostWritesRecord] = Field(default_factory=list)
    given: dict[str, str]
    """What the command line has brought about so far, now or in an earlier run: what it is, and the option.
    What is in here and nowhere else in the state was removed at run time."""
    monitors: list[MonitorRecord]
    image_paths: list[str]
    left_out: Things | None = None
    """What an earlier run had and this one could not bring back; the next start tries again."""


class State(Things, SmallParts):
    """All of it."""

    allowed_files: list[str]
    """Files that a user has named, which other images may therefore name too."""

    def members(self) -> dict[str, object]:
        """What is written. Not in pydantic's JSON mode, which garbles names that are not UTF-8."""
        return self.model_dump()


def bottom_up(nodes: Iterable[NodeRecord]) -> list[NodeRecord]:
    """The same nodes, each after those that it stands on."""
    named = {node.name: node for node in nodes}
    ordered: dict[str, NodeRecord] = {}
    pending = [*named][::-1]
    seen: set[str] = set()
    while pending:
        name = pending[-1]
        below = [] if name in seen else [each for each in named[name].below if each in named]
        seen.add(name)
        if missing := [each for each in below if each not in seen]:
            pending += missing
        else:
            ordered.setdefault(pending.pop(), named[name])
    return [*ordered.values()]


def parse_state(members: JsonValue, path: str) -> State:
    """Understand the state in the journal of the state directory `path`.

    Raises:   ImageError: it is none that this blockd writes.
    """
    try:
        # Not `model_validate_json`, which refuses names that are not UTF-8; JSON has no enums, so not strict.
        state = State.model_validate(members, strict=False)
        return state.model_copy(update={"nodes": bottom_up(state.nodes)})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise ImageError(
            f"The journal in '{path}' is not understood, though its version is known: start the blockd that "
            f"wrote it ({place}: {fault['msg']})"
        ) from error
