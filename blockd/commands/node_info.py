"""Nodes as query-named-block-nodes and query-block show them: QEMU's BlockDeviceInfo."""

from pathlib import Path

from pydantic import Field

from blockd.block.chain import unfiltered
from blockd.block.image_paths import beside
from blockd.block.node import BlockNode, OverlayNode
from blockd.formats.add_cow.image import AddCowImage
from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.qed.image import QedImage
from blockd.qmp.models import Members, Result
from blockd.units import SECTOR_SIZE, align_up

_DIRTY = 1 << 0
_CORRUPT = 1 << 1
_LAZY_REFCOUNTS = 1 << 0
_COMPRESSION_TYPES = ("zlib", "zstd")


class Qcow2Data(Members):
    """What only qcow2 images have."""

    compat: str
    compression_type: str
    lazy_refcounts: bool
    refcount_bits: int
    corrupt: bool
    extended_l2: bool


class AddCowData(Members):
    """What only add-cow images have."""

    image_file: str
    all_allocated: bool
    """Whether everything is in the image, so that bitmap and backing are not looked at."""


class FormatSpecific(Members):
    """What only images of one format have."""

    type: str
    data: Qcow2Data | AddCowData


class ImageInfo(Members):
    """An image."""

    filename: str
    format: str
    virtual_size: int
    actual_size: int | None = None
    """What the file takes on the disk; absent when it cannot be told."""
    dirty_flag: bool = False
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
    detect_zeroes: str = Field("off", alias="detect_zeroes")
    write_threshold: int = Field(0, alias="write_threshold")
    bps: int = 0
    bps_rd: int = Field(0, alias="bps_rd")
    bps_wr: int = Field(0, alias="bps_wr")
    iops: int = 0
    iops_rd: int = Field(0, alias="iops_rd")
    iops_wr: int = Field(0, alias="iops_wr")


def device_info(node: BlockNode, *, flat: bool = False) -> BlockDeviceInfo:
    """Describe a node, and unless `flat` the images below it.

    Needs:    a thread, for it asks the file system for sizes.
    """
    below = list(_below(node))
    image = _image_info(node)
    if not flat:
        infos = [image, *map(_image_info, below)]
        image = infos.pop()
        while infos:
            image = infos.pop().model_copy(update={"backing_image": image})
    return BlockDeviceInfo(
        node_name=node.node_name,
        drv=node.driver,
        file=node.filename,
        ro=node.read_only,
        image=image,
        backing_file=node.backing.filename if node.backing is not None else None,
        backing_file_depth=0 if flat else len(below),
    )


def _below(node: BlockNode) -> list[BlockNode]:
    """The images below: the one a filter is in front of, then the backing files."""
    found: list[BlockNode] = []
    while (child := unfiltered(node) if unfiltered(node) is not node else node.backing) is not None:
        found.append(child)
        node = child
    return found


def _image_info(node: BlockNode) -> ImageInfo:
    recorded = node.backing_filename if isinstance(node, OverlayNode) else None
    return ImageInfo(
        filename=node.filename,
        format=node.driver,
        virtual_size=align_up(node.size, SECTOR_SIZE),
        actual_size=_actual_size(node),
        dirty_flag=_is_dirty(node),
        cluster_size=_cluster_size(node),
        backing_filename=recorded,
        full_backing_filename=beside(node.filename, recorded) if recorded else None,
        backing_filename_format=node.backing_format if isinstance(node, OverlayNode) and recorded else None,
        format_specific=_format_specific(node),
    )


def _cluster_size(node: BlockNode) -> int | None:
    if isinstance(node, Qcow2Image):
        return node.metadata.header.cluster_size  # also if its subclusters are what is allocated
    return node.cluster_size if node.cluster_size > 1 else None


def _is_dirty(node: BlockNode) -> bool:
    if isinstance(node, QedImage):
        return node.metadata.header.needs_check
    return isinstance(node, Qcow2Image) and bool(node.metadata.header.incompatible & _DIRTY)


def _format_specific(node: BlockNode) -> FormatSpecific | None:
    if isinstance(node, AddCowImage):
        add_cow = AddCowData(image_file=node.image.filename, all_allocated=node.is_complete)
        return FormatSpecific(type=node.driver, data=add_cow)
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
    return FormatSpecific(type="qcow2", data=data)


def _actual_size(node: BlockNode) -> int | None:
    """Of the file, and of the image beside it."""
    filenames = [node.filename, *([node.image.filename] if isinstance(node, AddCowImage) else [])]
    try:
        return sum(Path(filename).stat().st_blocks for filename in filenames) * SECTOR_SIZE
    except OSError:
        return None
