"""The drivers: what each is called, which options it takes, and how its nodes are opened.

Options that only tune QEMU's own caches and threads are accepted, so that its command lines work
unchanged, and have no effect; `docs/qmp-differences.md` lists them, each with its reason.

What a driver consists of is loaded when a node of it is opened: `blockctl image` ends before the other
drivers would be loaded. A daemon loads them after its start (`daemon/late.py`).
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from blockd.block.chain import chain, unfiltered
from blockd.block.node import BlockNode, OverlayNode, ProtocolNode
from blockd.block.options import (
    Check,
    Choice,
    Field,
    Fields,
    NameOrRecord,
    Options,
    Record,
    check_options,
    choice,
    flag,
    integer,
    node,
    node_or_none,
    record,
    size,
    text,
)
from blockd.block.probe import Signature
from blockd.drivers.cache_options import check_cache_options
from blockd.drivers.faults import FAULTS, open_faults
from blockd.drivers.opening import Driver, Format, Opening, Wanted
from blockd.errors import BlockdError, ErrorKind, RequestError, printable
from blockd.filenames import check_filename
from blockd.formats.add_cow import header as add_cow_header
from blockd.formats.qcow2 import header as qcow2_header
from blockd.formats.qcow2.header import COMPRESSION_TYPES
from blockd.formats.qed import header as qed_header
from blockd.formats.raw.image import RawImage
from blockd.formats.raw.part import RawPart
from blockd.found_files import FoundFile
from blockd.protocols.image_lock import LockMode
from blockd.protocols.used_file import UsedFile

if TYPE_CHECKING:
    from blockd.filters.blkstream import BlkStream
    from blockd.formats.check_report import CheckReport, Repair


def _optional(**checks: Check) -> dict[str, Field]:
    return {name.replace("_", "-"): Field(check) for name, check in checks.items()}


_EVERY_NODE: Fields = _optional(
    node_name=text,
    discard=choice("ignore", "unmap"),
    cache=record(_optional(direct=flag, no_flush=flag)),
    read_only=flag,
    auto_read_only=flag,
    force_share=flag,
    detect_zeroes=choice("off", "on", "unmap"),
)
_FILE: Fields = {
    **_EVERY_NODE,
    "filename": Field(text, is_required=True),
    **_optional(
        locking=choice("auto", "on", "off"),
        aio=choice("threads", "native", "io_uring"),
        aio_max_batch=integer,
        drop_cache=flag,
    ),
}
_ON_A_FILE: Fields = {**_EVERY_NODE, "file": Field(node, is_required=True)}
_OVERLAP_MODES = Choice(("none", "constant", "cached", "all"))
_OVERLAP_CHECK = NameOrRecord(
    _OVERLAP_MODES,
    Record(
        _optional(
            template=_OVERLAP_MODES,
            main_header=flag,
            active_l1=flag,
            active_l2=flag,
            refcount_table=flag,
            refcount_block=flag,
            snapshot_table=flag,
            inactive_l1=flag,
            inactive_l2=flag,
            bitmap_directory=flag,
        )
    ),
)
_RAW: Fields = {**_ON_A_FILE, **_optional(offset=size, size=size)}
_NULL: Fields = {**_EVERY_NODE, **_optional(size=size, latency_ns=integer, read_zeroes=flag)}
_QCOW2: Fields = {
    **_ON_A_FILE,
    **_optional(
        backing=node_or_none,
        lazy_refcounts=flag,
        pass_discard_request=flag,
        pass_discard_snapshot=flag,
        pass_discard_other=flag,
        overlap_check=_OVERLAP_CHECK,
        cache_size=integer,
        l2_cache_size=integer,
        l2_cache_entry_size=integer,
        refcount_cache_size=integer,
        cache_clean_interval=integer,
    ),
}
_QED: Fields = {**_ON_A_FILE, **_optional(backing=node_or_none)}
_ADD_COW: Fields = {**_ON_A_FILE, **_optional(image=node, backing=node_or_none)}
_THROTTLE: Fields = {**_ON_A_FILE, "throttle-group": Field(text, is_required=True)}
_COPY_ON_READ: Fields = {**_ON_A_FILE, **_optional(bottom=text)}


async def _open_file(opening: Opening, wanted: Wanted) -> BlockNode:
    path = str(wanted.options["filename"])
    if not path:
        raise RequestError(f"The '{wanted.options['driver']}' block driver requires a file name")
    check_filename(path)
    file = await opening.open_file(
        partial(FoundFile.find, path),
        wanted.node_name,
        read_only=wanted.read_only,
        may_be_read_only=wanted.may_be_read_only,
        lock_mode=LockMode.OFF if wanted.options.get("locking") == "off" else wanted.lock_mode,
        opener=UsedFile,
    )
    opening.allow(file)
    return file


async def _open_null(opening: Opening, wanted: Wanted) -> BlockNode:
    from blockd.protocols.null import SIZE_DEFAULT, NullAioNode, NullNode  # noqa: PLC0415

    options = wanted.options
    node_class = NullAioNode if options["driver"] == NullAioNode.driver else NullNode
    latency_ns = _number(options, "latency-ns") or 0
    if latency_ns < 0:
        raise RequestError("latency-ns is invalid")
    null_size = _number(options, "size")
    return opening.add(
        node_class(
            SIZE_DEFAULT if null_size is None else null_size,
            node_name=wanted.node_name,
            read_only=wanted.read_only,
            latency_s=latency_ns / 1e9,
            reads_zeroes=bool(options.get("read-zeroes")),
        )
    )


def _number(options: Options, name: str) -> int | None:
    value = options.get(name)
    assert value is None or isinstance(value, int)
    return value


async def _open_raw(opening: Opening, wanted: Wanted) -> BlockNode:
    file = await opening.child(wanted, "file")
    opening.require_written(wanted, file)
    read_only = wanted.read_only or file.read_only
    start, part_size = _number(wanted.options, "offset"), _number(wanted.options, "size")
    if start is not None or part_size is not None or not isinstance(file, ProtocolNode):
        part = RawPart(file, start or 0, part_size, node_name=wanted.node_name, read_only=read_only)
        return opening.add(part)
    return opening.add(await RawImage.open(file, node_name=wanted.node_name, read_only=read_only))


async def _open_qcow2(opening: Opening, wanted: Wanted) -> BlockNode:
    return await _open_overlay(opening, wanted, _qcow2_image)


async def _open_qed(opening: Opening, wanted: Wanted) -> BlockNode:
    return await _open_overlay(opening, wanted, _qed_image)


async def _open_overlay(
    opening: Opening,
    wanted: Wanted,
    open_image: Callable[[ProtocolNode, str, bool], Awaitable[OverlayNode]],
) -> OverlayNode:
    """Open an image in its file, and what it has below it."""
    file = await opening.file(wanted)
    read_only = wanted.read_only or file.read_only
    image = opening.add(await open_image(file, wanted.node_name, read_only))
    check_cache_options(wanted.options, image.cluster_size)
    return await _on_its_backing(opening, wanted, image)


async def _open_add_cow(opening: Opening, wanted: Wanted) -> BlockNode:
    from blockd.drivers.add_cow import open_add_cow  # noqa: PLC0415

    return await _on_its_backing(opening, wanted, await open_add_cow(opening, wanted))


async def _on_its_backing(opening: Opening, wanted: Wanted, image: OverlayNode) -> OverlayNode:
    """Open what stands below an image: what the options name, or else what the image records."""
    if "backing" not in wanted.options:
        await opening.open_recorded_backing(image, wanted.lock_mode)
    elif wanted.options["backing"]:
        try:
            backing = await opening.child(wanted, "backing", read_only=True)
        except BlockdError as error:
            raise RequestError(f"Could not open backing file: {error.message}", kind=error.kind) from error
        opening.set_backing(image, backing)
    return image


async def _open_throttle(opening: Opening, wanted: Wanted) -> BlockNode:
    from blockd.filters.throttle import Throttle  # noqa: PLC0415
    from blockd.filters.throttled_file import ThrottledFile  # noqa: PLC0415

    child = await opening.child(wanted, "file")
    if wanted.read_only and not child.read_only:
        raise RequestError(
            f"'{wanted.node_name}' is as writable as '{child.node_name}' below it: make that read-only"
        )
    group = opening.find_throttle_group(str(wanted.options["throttle-group"]))
    if isinstance(child, ProtocolNode):
        return opening.add(ThrottledFile(child, group, node_name=wanted.node_name))
    return opening.add(Throttle(child, group, node_name=wanted.node_name))


async def _open_copy_on_read(opening: Opening, wanted: Wanted) -> BlockNode:
    from blockd.filters.blkstream import CopyOnRead  # noqa: PLC0415

    active = await opening.child(wanted, "file")
    bottom = wanted.options.get("bottom")
    node = copy_on_read(active, wanted.node_name, bottom=None if bottom is None else str(bottom))
    if wanted.options["driver"] == CopyOnRead.driver:
        node = CopyOnRead(node.active, node.base, node.node_name)
    return opening.add(node)


def copy_on_read(active: BlockNode, node_name: str, *, bottom: str | None = None) -> "BlkStream":
    """Put copy-on-read in front of an image; what stands below the node `bottom` is not copied.

    Raises:   RequestError: nothing can be copied into this node, or there is no such node below it.
    """
    from blockd.filters.blkstream import BlkStream  # noqa: PLC0415

    if active.read_only:
        raise RequestError("Block node is read-only", kind=ErrorKind.READ_ONLY)
    if not isinstance(active, OverlayNode):
        raise RequestError(
            f"Cannot copy on read into '{active.node_name}': it is no image that can have a backing file",
            kind=ErrorKind.NOT_SUPPORTED,
        )
    if bottom is None:
        return BlkStream(active, None, node_name)
    for layer in chain(active):
        if layer.node_name == bottom:
            return BlkStream(active, layer.backing and unfiltered(layer.backing), node_name)
    raise RequestError(f"Node '{bottom}' is not in a chain starting from '{active.node_name}'")


DRIVERS: Mapping[str, Driver] = {
    "file": Driver(_open_file, _FILE),
    "host_device": Driver(_open_file, _FILE),
    "null-co": Driver(_open_null, _NULL),
    "null-aio": Driver(_open_null, _NULL),
    "raw": Driver(_open_raw, _RAW),
    "qcow2": Driver(_open_qcow2, _QCOW2),
    "qed": Driver(_open_qed, _QED),
    "add-cow": Driver(_open_add_cow, _ADD_COW),
    "throttle": Driver(_open_throttle, _THROTTLE),
    "blkstream": Driver(_open_copy_on_read, _COPY_ON_READ),
    "copy-on-read": Driver(_open_copy_on_read, _COPY_ON_READ),
    "faults": Driver(open_faults, {**_EVERY_NODE, **FAULTS}),
    "blkdebug": Driver(open_faults, {**_EVERY_NODE, **FAULTS}),
}


def check_blockdev(options: Mapping[str, object], *, is_text: bool, path: str = "") -> Options:
    """Check BlockdevOptions without opening anything; `is_text`: all values are strings still.

    `path`: where they stand, for errors.

    Raises:   RequestError: an option is unknown, missing or of the wrong type.
    """
    fields = {name: driver.fields for name, driver in DRIVERS.items()}
    return check_options(options, fields, is_text=is_text, path=path)


async def _raw_image(file: ProtocolNode, node_name: str, read_only: bool) -> BlockNode:
    return await RawImage.open(file, node_name=node_name, read_only=read_only)


async def _qcow2_image(file: ProtocolNode, node_name: str, read_only: bool) -> OverlayNode:
    from blockd.formats.qcow2.image import Qcow2Image  # noqa: PLC0415

    return await Qcow2Image.open(file, node_name=node_name, read_only=read_only)


async def _qed_image(file: ProtocolNode, node_name: str, read_only: bool) -> OverlayNode:
    from blockd.formats.qed.image import QedImage  # noqa: PLC0415

    return await QedImage.open(file, node_name=node_name, read_only=read_only)


async def _add_cow_image(file: ProtocolNode, node_name: str, read_only: bool) -> BlockNode:
    from blockd.drivers.add_cow import open_alone  # noqa: PLC0415

    return await open_alone(file, node_name, read_only)


async def _attach_to_add_cow(
    opening: Opening, image: BlockNode, lock_mode: LockMode, above: Sequence[BlockNode]
) -> None:
    from blockd.drivers.add_cow import attach_recorded  # noqa: PLC0415

    await attach_recorded(opening, image, lock_mode, above)


async def _create_raw(file: ProtocolNode, size: int, **options: Any) -> None:
    from blockd.formats.raw.create import create  # noqa: PLC0415

    await create(file, size, **options)


async def _create_qcow2(file: ProtocolNode, size: int, **options: Any) -> None:
    from blockd.formats.qcow2.create import create  # noqa: PLC0415

    await create(file, size, **options)


async def _create_qed(file: ProtocolNode, size: int, **options: Any) -> None:
    from blockd.formats.qed.create import create  # noqa: PLC0415

    await create(file, size, **options)


async def _create_add_cow(file: ProtocolNode, size: int, **options: Any) -> None:
    from blockd.drivers.add_cow import create_add_cow  # noqa: PLC0415

    await create_add_cow(file, size, **options)


async def _check_qcow2(file: ProtocolNode) -> "CheckReport":
    from blockd.formats.qcow2.check import check  # noqa: PLC0415

    return await check(file)


async def _check_qed(file: ProtocolNode) -> "CheckReport":
    from blockd.formats.qed.check import check  # noqa: PLC0415

    return await check(file)


async def _check_add_cow(file: ProtocolNode) -> "CheckReport":
    from blockd.drivers.add_cow import check_add_cow  # noqa: PLC0415

    return await check_add_cow(file)


async def _repair_qcow2(file: ProtocolNode, what: "Repair") -> "CheckReport":
    from blockd.formats.qcow2.repair import repair  # noqa: PLC0415

    return await repair(file, what)


async def _repair_qed(file: ProtocolNode, what: "Repair") -> "CheckReport":
    from blockd.formats.qed.repair import repair  # noqa: PLC0415

    return await repair(file, what)


def _qcow2_info(image: BlockNode) -> Mapping[str, object]:
    from blockd.formats.qcow2.image import Qcow2Image  # noqa: PLC0415
    from blockd.formats.qcow2.info import info_blocking  # noqa: PLC0415

    assert isinstance(image, Qcow2Image)
    return info_blocking(image.file, image.metadata.header).image_info()


def _qed_info(image: BlockNode) -> Mapping[str, object]:
    from blockd.formats.qed.image import QedImage  # noqa: PLC0415
    from blockd.formats.qed.info import image_info  # noqa: PLC0415

    assert isinstance(image, QedImage)
    return image_info(image.metadata.header)


def _add_cow_info(image: BlockNode) -> Mapping[str, object]:
    from blockd.drivers.add_cow import info  # noqa: PLC0415

    return info(image)


_QCOW2_CREATE: Fields = {
    "cluster_size": Field(size),
    "compat": Field(choice("0.10", "1.1", "v2", "v3")),
    "refcount_bits": Field(integer),
    "lazy_refcounts": Field(flag),
    "extended_l2": Field(flag),
    "compression_type": Field(choice(*COMPRESSION_TYPES)),
    "preallocation": Field(choice("off", "metadata", "falloc", "full")),
}


def unknown_format(name: str) -> str:
    """What is wrong with a format that is none."""
    return f"Unknown driver '{printable(name)}'; the formats are {', '.join(FORMATS)}"


FORMATS: Mapping[str, Format] = {
    "qcow2": Format(
        _qcow2_image,
        Signature(".qcow2", qcow2_header.probe),
        _create_qcow2,
        create_options=_QCOW2_CREATE,
        has_backing=True,
        check=_check_qcow2,
        repair=_repair_qcow2,
        info=_qcow2_info,
    ),
    "qed": Format(
        _qed_image,
        Signature(".qed", qed_header.probe),
        _create_qed,
        create_options={"cluster_size": Field(size), "table_size": Field(integer)},
        has_backing=True,
        check=_check_qed,
        repair=_repair_qed,
        info=_qed_info,
    ),
    "raw": Format(
        _raw_image,
        Signature(".raw", None),
        _create_raw,
        create_options={"preallocation": Field(choice("off", "falloc", "full"))},
    ),
    "add-cow": Format(
        _add_cow_image,
        Signature(".add-cow", add_cow_header.probe),
        _create_add_cow,
        create_options={"image_file": Field(text), "cluster_size": Field(size)},
        has_backing=True,
        attach=_attach_to_add_cow,
        check=_check_add_cow,
        info=_add_cow_info,
    ),
}
