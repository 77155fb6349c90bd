"""blockdev-create: making files, and images in files."""

from functools import partial
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from blockd.block.node import BlockNode, ProtocolNode
from blockd.block.options import Options
from blockd.commands.context import Services
from blockd.commands.topic import Table
from blockd.drivers import check_blockdev
from blockd.drivers.add_cow import create_add_cow
from blockd.errors import ErrorKind, RequestError
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
        async with new_file(self.filename) as file:
            await set_size(file, self.size, preallocation=self.preallocation)


class NodeOptions(Members):
    """A node to open; which members there are depends on the driver."""

    model_config = ConfigDict(extra="allow")

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
        user = "blockdev-create"
        file = await _held_file(services, self.file, user)
        try:
            await create_image(file, self._as_options())
        finally:
            services.graph.remove_user(file, user)
            await services.graph.close_unused()

    def _as_options(self) -> CreateOptions:
        if self.backing_fmt is not None and not self.backing_file:
            raise RequestError("Backing format cannot be used without backing file")
        return CreateOptions(
            size=self.size,
            backing_filename=self.backing_file or None,
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
        user = "blockdev-create"
        file = await _held_file(services, self.file, user)
        try:
            await create_qed(
                file,
                self.size,
                backing_filename=self.backing_file or None,
                backing_format=self.backing_fmt,
                cluster_size=self.cluster_size,
                table_size=self.table_size,
            )
        finally:
            services.graph.remove_user(file, user)
            await services.graph.close_unused()


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
        user = "blockdev-create"
        file = await _held_file(services, self.file, user)
        try:
            await create_add_cow(
                file,
                self.size,
                image_file=self.image_file,
                backing_filename=self.backing_file or None,
                backing_format=self.backing_fmt,
                cluster_size=self.cluster_size,
            )
        finally:
            services.graph.remove_user(file, user)
            await services.graph.close_unused()


class OtherOptions(Members):
    """Drivers whose nodes are made of other nodes, or are what a file is anyway."""

    driver: Literal["raw", "throttle", "copy-on-read", "blkstream", "blkdebug", "faults"]


class BlockdevCreateArguments(Arguments):
    """The job's id, and what to make."""

    job_id: str
    options: Annotated[
        FileOptions | Qcow2Options | QedOptions | AddCowOptions | OtherOptions, Field(discriminator="driver")
    ]


@TABLE.command("blockdev-create")
async def blockdev_create(services: Services, arguments: BlockdevCreateArguments) -> None:
    """Make a file, or an image in a file, as a job that is kept until job-dismiss."""
    options = arguments.options
    if isinstance(options, OtherOptions):
        raise RequestError("Driver does not support blockdev-create")
    services.jobs.start(CreateJob(arguments.job_id, partial(options.make, services)))


async def _held_file(services: Services, told: str | NodeOptions, user: str) -> ProtocolNode:
    """The file that is to hold an image, which nobody else uses."""
    async with services.devices.changing:
        if isinstance(told, str):
            node: BlockNode = services.devices.find_node(told)
        else:
            options: Options = told.model_dump(by_alias=True, exclude_unset=True)
            node = await services.graph.open_unnamed(check_blockdev(options, is_text=False))
        others = services.graph.users(node)
        services.graph.add_user(node, user)
        try:
            return _checked_file(services, node, others)
        except RequestError:
            services.graph.remove_user(node, user)
            await services.graph.close_unused()
            raise


def _checked_file(services: Services, node: BlockNode, users: list[str]) -> ProtocolNode:
    name = node.node_name
    if not isinstance(node, ProtocolNode):
        raise RequestError(f"An image is made in a file, and '{name}' is of driver '{node.driver}'")
    if node.read_only:
        raise RequestError("Block node is read-only", kind=ErrorKind.READ_ONLY)
    for parent, role in services.graph.parents(node):
        raise RequestError(
            f"Permission conflict on node '{name}': permissions 'write, resize' are both required by an "
            f"unnamed block device (uses node '{name}' as 'root' child) and unshared by node "
            f"'{parent.node_name}' (uses node '{name}' as '{role}' child)."
        )
    if users:
        raise RequestError(f"Node '{name}' is busy: it is in use by {users[0]}")
    return node
