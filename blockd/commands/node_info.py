"""Nodes as query-named-block-nodes and query-block show them: QEMU's BlockDeviceInfo."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from blockd.aio import Turns
from blockd.block.chain import primary_child, unfiltered
from blockd.block.node import BlockNode, OverlayNode
from blockd.block.settings import DetectZeroes
from blockd.drivers.sharing import files_of
from blockd.filenames import full_name
from blockd.filters.faults import FaultsNode
from blockd.formats.add_cow.image import AddCowImage
from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.qed.image import QedImage
from blockd.protocols.file import FileNode
from blockd.protocols.null import NullNode
from blockd.qmp.models import Members, Result
from blockd.units import SECTOR_SIZE, align_up

_DIRTY = 1 << 0
_CORRUPT = 1 << 1
_LAZY_REFCOUNTS = 1 << 0
# How many files are asked at once what they take.
_USAGE_COUNT = 16
_COMPRESSION_TYPES: Sequence[Literal["zlib", "zstd"]] = ("zlib", "zstd")


class Qcow2Data(Members):
    """What only qcow2 images have."""

    compat: str
    compression_type: Literal["zlib", "zstd"]
    lazy_refcounts: bool
    refcount_bits: int
    corrupt: bool
    extended_l2: bool


class AddCowData(Members):
    """What only add-cow images have."""

    image_file: str
    all_allocated: bool
    """Whether everything is in the image, so that bitmap and backing are not looked at."""


class Qcow2Specific(Members):
    """What only images of one format have."""

    type: Literal["qcow2"] = "qcow2"
    data: Qcow2Data


class AddCowSpecific(Members):
    """What only images of one format have."""

    type: Literal["add-cow"] = "add-cow"
    data: AddCowData


FormatSpecific: TypeAlias = Annotated[Qcow2Specific | AddCowSpecific, Field(discriminator="type")]


class ImageInfo(Members):
    """An image."""

    filename: str
    format: str
    virtual_size: int
    actual_size: int | None = None
    """What the file takes on the disk; absent when it cannot be told."""
    dirty_flag: bool | None = False
    cluster_size: int | None = None
    backing_filename: str | None = None
    """As recorded in the image."""
    full_backing_filename: str | None = None
    backing_filename_format: str | None = None
    format_specific: FormatSpecific | None = None
    backing_image: "ImageInfo | None" = None


class CacheInfo(Members):
    """How a node treats its writes: as a disk with a write cache does."""

    writeback: bool = True
    direct: bool = False
    no_flush: bool = False


class BlockDeviceInfo(Result):
    """A node."""

    node_name: str
    drv: str
    file: str
    ro: bool
    encrypted: bool = False
    cache: CacheInfo = CacheInfo()
    image: ImageInfo
    backing_file: str | None = Field(None, alias="backing_file")
    backing_file_depth: int = Field(0, alias="backing_file_depth")
    detect_zeroes: DetectZeroes = Field(DetectZeroes.OFF, alias="detect_zeroes")
    write_threshold: int = Field(0, alias="write_threshold")
    bps: int = 0
    bps_rd: int = Field(0, alias="bps_rd")
    bps_wr: int = Field(0, alias="bps_wr")
    iops: int = 0
    iops_rd: int = Field(0, alias="iops_rd")
    iops_wr: int = Field(0, alias="iops_wr")


# What files take on their disks, as far as that could be found out.
Usages = Mapping[FileNode, int | None]


async def usages(nodes: Iterable[BlockNode]) -> Usages:
    """Find out what the files of nodes and of those below them take on their disks; some at a time."""
    turns, files = Turns(), dict[FileNode, None]()
    for node in nodes:
        await turns.pass_on()
        files.update((file, None) for image in (node, *_below(node)) for file in files_of(image))
    found: dict[FileNode, int | None] = {}
    while files:
        some = [files.popitem()[0] for _ in range(min(len(files), _USAGE_COUNT))]
        found.update(zip(some, await asyncio.gather(*(file.disk_usage() for file in some)), strict=True))
    return found


def device_info(node: BlockNode, used: Usages, *, flat: bool = False) -> BlockDeviceInfo:
    """Describe a node, and unless `flat` the images below it."""
    below = list(_below(node))
    image = _image_info(node, used)
    if not flat:
        infos = [image, *(_image_info(lower, used) for lower in below)]
        image = infos.pop()
        while infos:
            image = infos.pop().model_copy(update={"backing_image": image})
    return BlockDeviceInfo(
        node_name=node.node_name,
        drv=node.driver,
        file=node.filename,
        ro=node.read_only,
        cache=CacheInfo(direct=node.settings.cache.is_direct, no_flush=node.settings.cache.is_unsafe),
        detect_zeroes=node.settings.detect_zeroes,
        image=image,
        backing_file=node.backing.filename if node.backing is not None else None,
        backing_file_depth=0 if flat else len(below),
    )


def _below(node: BlockNode) -> list[BlockNode]:
    """The images below: the one a filter is in front of, then the backing files."""
    found: list[BlockNode] = []
    while (child := _next_below(node)) is not None:
        found.append(child)
        node = child
    return found


def _next_below(node: BlockNode) -> BlockNode | None:
    if isinstance(node, FaultsNode):
        return node.image
    image = unfiltered(node)
    return node.backing if image is node else image


def _image_info(node: BlockNode, used: Usages) -> ImageInfo:
    recorded = node.backing_filename if isinstance(node, OverlayNode) else None
    return ImageInfo(
        filename=node.filename,
        format=node.driver,
        virtual_size=align_up(node.size, SECTOR_SIZE),
        actual_size=_actual_size(node, used),
        dirty_flag=_is_dirty(node),
        cluster_size=_cluster_size(node),
        backing_filename=recorded,
        full_backing_filename=full_name(node.filename, recorded) if recorded else None,
        backing_filename_format=node.backing_format if isinstance(node, OverlayNode) and recorded else None,
        format_specific=_format_specific(node),
    )


def _cluster_size(node: BlockNode) -> int | None:
    if isinstance(node, Qcow2Image):
        return node.metadata.header.cluster_size  # also if its subclusters are what is allocated
    return node.cluster_size if node.cluster_size > 1 else None


def _is_dirty(node: BlockNode) -> bool | None:
    if _is_on_nothing(node):
        return None  # as QEMU, which knows nothing of such nodes
    if isinstance(node, QedImage):
        return node.metadata.header.needs_check
    return isinstance(node, Qcow2Image) and bool(node.metadata.header.incompatible & _DIRTY)


def _is_on_nothing(node: BlockNode) -> bool:
    """Whether what is written to a node goes nowhere."""
    return any(isinstance(below, NullNode) for below in _bytes_in(node))


def _bytes_in(node: BlockNode) -> Iterator[BlockNode]:
    """A node and what its bytes go through to the disk."""
    below: BlockNode | None = node
    while below is not None:
        yield below
        below = primary_child(below)


def _format_specific(node: BlockNode) -> Qcow2Specific | AddCowSpecific | None:
    if isinstance(node, AddCowImage):
        add_cow = AddCowData(image_file=node.image.filename, all_allocated=node.is_complete)
        return AddCowSpecific(data=add_cow)
    if not isinstance(node, Qcow2Image):
        return None
    header = node.metadata.header
    data = Qcow2Data(
        compat="1.1" if header.version > 2 else "0.10",
        compression_type=_COMPRESSION_TYPES[header.compression_type],
        lazy_refcounts=bool(header.compatible & _LAZY_REFCOUNTS),
        refcount_bits=1 << header.refcount_order,
        corrupt=bool(header.incompatible & _CORRUPT),
        extended_l2=header.has_extended_l2,
    )
    return Qcow2Specific(data=data)


def _actual_size(node: BlockNode, used: Usages) -> int | None:
    """Of the file, and of the image beside it; as in QEMU, of nothing that faults are injected into."""
    if any(isinstance(below, FaultsNode) for below in _bytes_in(node)):
        return None
    if _is_on_nothing(node):
        return 0
    sizes = [used.get(file) for file in files_of(node)]
    known = [size for size in sizes if size is not None]
    return sum(known) if known and len(known) == len(sizes) else None
