"""blockdev-create: making files, and images in files."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from blockd.aio import uninterrupted
from blockd.block.node import BlockNode, ProtocolNode
from blockd.block.options import Options
from blockd.block.permissions import RESIZE, WRITE, Permission
from blockd.commands.context import Services
from blockd.commands.field_schemas import node_schema
from blockd.commands.topic import Table
from blockd.drivers import check_blockdev
from blockd.drivers.add_cow import create_add_cow
from blockd.drivers.permissions import Claim
from blockd.errors import ErrorKind, RequestError
from blockd.filenames import check_filename, recordable
from blockd.formats.add_cow.create import CLUSTER_SIZE_DEFAULT as ADD_COW_CLUSTER_SIZE_DEFAULT
from blockd.formats.qcow2.create import create_image
from blockd.formats.qcow2.create_options import CLUSTER_SIZE_DEFAULT, CreateOptions
from blockd.formats.qed.create import CLUSTER_SIZE_DEFAULT as QED_CLUSTER_SIZE_DEFAULT
from blockd.formats.qed.create import TABLE_SIZE_DEFAULT as QED_TABLE_SIZE_DEFAULT
from blockd.formats.qed.create import create as create_qed
from blockd.formats.raw.create import create as set_size
from blockd.jobs.create import CreateJob
from blockd.protocols.new_file import new_file
from blockd.qmp.models import Arguments, Members, NonNegative

TABLE: Table = Table()

_USER = "blockdev-create"

BackingFormat = Literal["add-cow", "qcow2", "qed", "raw"]
Preallocation = Literal["off", "metadata", "falloc", "full"]


class FileOptions(Members):
    """A file, which must not exist yet."""

    driver: Literal["file"]
    filename: str
    size: NonNegative
    preallocation: Preallocation = "off"
    nocow: bool = False
    """Accepted, without effect."""

    async def make(self, services: Services) -> None:
        async with new_file(check_filename(self.filename)) as file:
            await set_size(file, self.size, preallocation=self.preallocation)


class NodeOptions(Members):
    """A node to open; which members there are depends on the driver."""

    model_config = ConfigDict(extra="allow", json_schema_extra=node_schema)

    driver: str


class Qcow2Options(Members):
    """A qcow2 image in a file, whatever that held before."""

    driver: Literal["qcow2"]
    file: str | NodeOptions
    """A node, or the options of one."""
    size: NonNegative
    version: Literal["v2", "v3"] = "v3"
    backing_file: str | None = None
    backing_fmt: BackingFormat | None = None
    cluster_size: NonNegative = CLUSTER_SIZE_DEFAULT
    preallocation: Preallocation = "off"
    lazy_refcounts: bool = False
    refcount_bits: NonNegative = 16
    compression_type: Literal["zlib", "zstd"] = "zlib"
    extended_l2: bool = False

    async def make(self, services: Services) -> None:
        async with _held_file(services, self.file) as file:
            await create_image(file, self._as_options())

    def _as_options(self) -> CreateOptions:
        if self.backing_fmt is not None and not self.backing_file:
            raise RequestError("Backing format cannot be used without backing file")
        return CreateOptions(
            size=self.size,
            backing_filename=_recorded(self.backing_file),
            backing_format=self.backing_fmt if self.backing_file else None,
            cluster_size=self.cluster_size,
            compat=self.version,
            refcount_bits=self.refcount_bits,
            lazy_refcounts=self.lazy_refcounts,
            extended_l2=self.extended_l2,
            compression_type=self.compression_type,
            preallocation=self.preallocation,
        )


class QedOptions(Members):
    """A QED image in a file, whatever that held before."""

    driver: Literal["qed"]
    file: str | NodeOptions
    """A node, or the options of one."""
    size: NonNegative
    backing_file: str | None = None
    backing_fmt: BackingFormat | None = None
    """Only raw is recorded."""
    cluster_size: NonNegative = QED_CLUSTER_SIZE_DEFAULT
    table_size: NonNegative = QED_TABLE_SIZE_DEFAULT

    async def make(self, services: Services) -> None:
        if self.backing_fmt is not None and not self.backing_file:
            raise RequestError("Backing format cannot be used without backing file")
        async with _held_file(services, self.file) as file:
            await create_qed(
                file,
                self.size,
                backing_filename=_recorded(self.backing_file),
                backing_format=self.backing_fmt,
                cluster_size=self.cluster_size,
                table_size=self.table_size,
            )


class AddCowOptions(Members):
    """An add-cow file, and beside it the raw image that it speaks of."""

    driver: Literal["add-cow"]
    file: str | NodeOptions
    """A node, or the options of one: for the add-cow file."""
    size: NonNegative
    image_file: str | None = None
    """The raw image, made unless it exists; its name counts from the folder of the add-cow file.

    Without it: the name of the add-cow file, ending in .raw.
    """
    backing_file: str | None = None
    backing_fmt: BackingFormat | None = None
    cluster_size: NonNegative = ADD_COW_CLUSTER_SIZE_DEFAULT

    async def make(self, services: Services) -> None:
        if self.backing_fmt is not None and not self.backing_file:
            raise RequestError("Backing format cannot be used without backing file")
        async with _held_file(services, self.file) as file:
            await create_add_cow(
                file,
                self.size,
                image_file=self.image_file,
                backing_filename=_recorded(self.backing_file),
                backing_format=self.backing_fmt,
                cluster_size=self.cluster_size,
            )


class OtherOptions(Members):
    """Drivers whose nodes are made of other nodes, or are what a file is anyway."""

    driver: Literal[
        "raw", "throttle", "copy-on-read", "blkstream", "blkdebug", "faults", "null-co", "null-aio"
    ]


class BlockdevCreateArguments(Arguments):
    """The job's id, and what to make."""

    job_id: str
    options: Annotated[
        FileOptions | Qcow2Options | QedOptions | AddCowOptions | OtherOptions, Field(discriminator="driver")
    ]


def _recorded(filename: str | None) -> str | None:
    return recordable(filename) if filename else None


@TABLE.command("blockdev-create")
async def blockdev_create(services: Services, arguments: BlockdevCreateArguments) -> None:
    """Make a file, or an image in a file, as a job that is kept until job-dismiss."""
    options = arguments.options
    if isinstance(options, OtherOptions):
        raise RequestError("Driver does not support blockdev-create")
    services.jobs.start(CreateJob(arguments.job_id, partial(options.make, services)))


@asynccontextmanager
async def _held_file(services: Services, told: str | NodeOptions) -> AsyncIterator[ProtocolNode]:
    """The file that is to hold an image, which nobody else uses meanwhile."""
    graph = services.graph
    async with AsyncExitStack() as stack:
        async with services.devices.change(), AsyncExitStack() as undo:
            if isinstance(told, str):
                node: BlockNode = services.devices.find_node(told)
            else:
                options: Options = told.model_dump(by_alias=True, exclude_unset=True)
                node = await graph.open_unnamed(check_blockdev(options, is_text=False))
            others = graph.users(node)
            graph.add_user(node, _USER)
            undo.push_async_callback(graph.close_unused)
            undo.callback(graph.remove_user, node, _USER)
            file = _checked_file(node, others)
            planned = graph.permissions.require(Claim(node, WRITE | RESIZE))
            await graph.nodes.locks.take(planned)
            alone = Claim(node, WRITE | RESIZE, Permission.NONE, _USER)
            graph.permissions.claim(alone)
            undo.callback(graph.permissions.release, alone)
            stack.push_async_callback(_let_go, services, undo.pop_all())
        yield file


@uninterrupted
async def _let_go(services: Services, held: AsyncExitStack) -> None:
    """Undo what has held a file, when no other change is half done: nodes are closed that nobody needs."""
    async with services.devices.change_unasked():
        await held.aclose()


def _checked_file(node: BlockNode, users: list[str]) -> ProtocolNode:
    name = node.node_name
    if not isinstance(node, ProtocolNode):
        raise RequestError(f"An image is made in a file, and '{name}' is of driver '{node.driver}'")
    if node.read_only:
        raise RequestError("Block node is read-only", kind=ErrorKind.READ_ONLY)
    if users:
        raise RequestError(f"Node '{name}' is busy: it is in use by {users[0]}")
    return node
