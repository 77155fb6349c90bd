"""The drivers: what each is called, which options it takes, and how its nodes are opened.

Options that only tune QEMU's own caches and threads are accepted, so that its command lines work
unchanged, and have no effect: blockd reads through the page cache and decides these things by itself.
"""

import os
from collections.abc import Awaitable, Callable, Mapping

from blockd.aio import in_thread
from blockd.block.chain import chain
from blockd.block.node import BlockNode, OverlayNode, ProtocolNode
from blockd.block.options import (
    Check,
    Field,
    Fields,
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
from blockd.drivers.add_cow import (
    CREATE_OPTIONS,
    check_add_cow,
    create_add_cow,
    files_beside,
    info,
    open_add_cow,
    open_alone,
)
from blockd.drivers.faults import FAULTS, open_faults
from blockd.drivers.opening import Driver, Format, Opening, Wanted
from blockd.errors import BlockdError, ErrorKind, RequestError
from blockd.filters.blkstream import BlkStream
from blockd.filters.throttle import Throttle
from blockd.formats.add_cow import header as add_cow_header
from blockd.formats.qcow2 import header as qcow2_header
from blockd.formats.qcow2.check import check as check_qcow2
from blockd.formats.qcow2.create import create as create_qcow2
from blockd.formats.qcow2.header import COMPRESSION_TYPES
from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.qcow2.repair import repair as repair_qcow2
from blockd.formats.qed import header as qed_header
from blockd.formats.qed.check import check as check_qed
from blockd.formats.qed.create import create as create_qed
from blockd.formats.qed.image import QedImage
from blockd.formats.qed.repair import repair as repair_qed
from blockd.formats.raw.create import create as create_raw
from blockd.formats.raw.image import RawImage
from blockd.protocols.image_lock import LockMode


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
_QCOW2: Fields = {
    **_ON_A_FILE,
    **_optional(
        backing=node_or_none,
        lazy_refcounts=flag,
        pass_discard_request=flag,
        pass_discard_snapshot=flag,
        pass_discard_other=flag,
        overlap_check=choice("none", "constant", "cached", "all"),
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
    await in_thread(opening.paths.allow_file, path)
    read_only = wanted.read_only
    if wanted.may_be_read_only and not read_only:
        read_only = not await in_thread(os.access, path, os.W_OK)
    lock_mode = LockMode.OFF if wanted.options.get("locking") == "off" else wanted.lock_mode
    return await opening.open_file(path, wanted.node_name, read_only=read_only, lock_mode=lock_mode)


async def _open_raw(opening: Opening, wanted: Wanted) -> BlockNode:
    file = await opening.file(wanted)
    read_only = wanted.read_only or file.read_only
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
    return await _on_its_backing(opening, wanted, image)


async def _open_add_cow(opening: Opening, wanted: Wanted) -> BlockNode:
    return await _on_its_backing(opening, wanted, await open_add_cow(opening, wanted))


async def _on_its_backing(opening: Opening, wanted: Wanted, image: OverlayNode) -> OverlayNode:
    """Open what stands below an image: what the options name, or else what the image records."""
    if "backing" not in wanted.options:
        await opening.open_recorded_backing(image, wanted.lock_mode)
    elif wanted.options["backing"] is not None:
        try:
            image.backing = await opening.child(wanted, "backing", read_only=True)
        except BlockdError as error:
            raise RequestError(f"Could not open backing file: {error.message}", kind=error.kind) from error
    return image


async def _open_throttle(opening: Opening, wanted: Wanted) -> BlockNode:
    child = await opening.child(wanted, "file")
    if wanted.read_only and not child.read_only:
        raise RequestError(
            f"'{wanted.node_name}' is as writable as '{child.node_name}' below it: make that read-only"
        )
    group = opening.find_throttle_group(str(wanted.options["throttle-group"]))
    return opening.add(Throttle(child, group, node_name=wanted.node_name))


async def _open_copy_on_read(opening: Opening, wanted: Wanted) -> BlockNode:
    active = await opening.child(wanted, "file")
    bottom = wanted.options.get("bottom")
    return opening.add(copy_on_read(active, wanted.node_name, bottom=None if bottom is None else str(bottom)))


def copy_on_read(active: BlockNode, node_name: str, *, bottom: str | None = None) -> BlkStream:
    """Put copy-on-read in front of an image; what stands below the node `bottom` is not copied.

    Raises:   RequestError: nothing can be copied into this node, or there is no such node below it.
    """
    if not isinstance(active, OverlayNode) or active.read_only:
        raise RequestError(
            f"Cannot copy on read into '{active.node_name}': it is not a writable image with a backing file",
            kind=ErrorKind.NOT_SUPPORTED,
        )
    if bottom is None:
        return BlkStream(active, None, node_name)
    for layer in chain(active):
        if layer.node_name == bottom:
            return BlkStream(active, layer.backing, node_name)
    raise RequestError(f"Node '{bottom}' is not in a chain starting from '{active.node_name}'")


DRIVERS: Mapping[str, Driver] = {
    "file": Driver(_open_file, _FILE),
    "host_device": Driver(_open_file, _FILE),
    "raw": Driver(_open_raw, _ON_A_FILE),
    "qcow2": Driver(_open_qcow2, _QCOW2),
    "qed": Driver(_open_qed, _QED),
    "add-cow": Driver(_open_add_cow, _ADD_COW),
    "throttle": Driver(_open_throttle, _THROTTLE),
    "blkstream": Driver(_open_copy_on_read, _COPY_ON_READ),
    "copy-on-read": Driver(_open_copy_on_read, _COPY_ON_READ),
    "faults": Driver(open_faults, {**_EVERY_NODE, **FAULTS}),
    "blkdebug": Driver(open_faults, {**_EVERY_NODE, **FAULTS}),
}


async def _raw_image(file: ProtocolNode, node_name: str, read_only: bool) -> BlockNode:
    return await RawImage.open(file, node_name=node_name, read_only=read_only)


async def _qcow2_image(file: ProtocolNode, node_name: str, read_only: bool) -> OverlayNode:
    return await Qcow2Image.open(file, node_name=node_name, read_only=read_only)


async def _qed_image(file: ProtocolNode, node_name: str, read_only: bool) -> OverlayNode:
    return await QedImage.open(file, node_name=node_name, read_only=read_only)


def _qcow2_info(image: BlockNode) -> Mapping[str, object]:
    from blockd.formats.qcow2.info import info_blocking  # noqa: PLC0415  (no daemon starts with it)

    assert isinstance(image, Qcow2Image)
    return info_blocking(image.file, image.metadata.header).image_info()


def _qed_info(image: BlockNode) -> Mapping[str, object]:
    from blockd.formats.qed.info import image_info  # noqa: PLC0415

    assert isinstance(image, QedImage)
    return image_info(image.metadata.header)


_QCOW2_CREATE: Fields = {
    "cluster_size": Field(size),
    "compat": Field(choice("0.10", "1.1", "v2", "v3")),
    "refcount_bits": Field(integer),
    "lazy_refcounts": Field(flag),
    "extended_l2": Field(flag),
    "compression_type": Field(choice(*COMPRESSION_TYPES)),
    "preallocation": Field(choice("off", "metadata", "falloc", "full")),
}

FORMATS: Mapping[str, Format] = {
    "qcow2": Format(
        _qcow2_image,
        Signature(".qcow2", qcow2_header.probe),
        create_qcow2,
        create_options=_QCOW2_CREATE,
        has_backing=True,
        check=check_qcow2,
        repair=repair_qcow2,
        info=_qcow2_info,
    ),
    "qed": Format(
        _qed_image,
        Signature(".qed", qed_header.probe),
        create_qed,
        create_options={"cluster_size": Field(size), "table_size": Field(integer)},
        has_backing=True,
        check=check_qed,
        repair=repair_qed,
        info=_qed_info,
    ),
    "raw": Format(
        _raw_image,
        Signature(".raw", None),
        create_raw,
        create_options={"preallocation": Field(choice("off", "falloc", "full"))},
    ),
    "add-cow": Format(
        open_alone,
        Signature(".add-cow", add_cow_header.probe),
        create_add_cow,
        create_options=CREATE_OPTIONS,
        has_backing=True,
        check=check_add_cow,
        info=info,
        beside=files_beside,
    ),
}
