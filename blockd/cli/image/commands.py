"""What the commands of `blockctl image` do, and what they print: for people as qemu-img, or JSON.

Each loads what it alone needs: the others are as fast without it.
"""

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext

from blockd.aio import in_thread
from blockd.block.chain import chain
from blockd.block.node import BlockNode
from blockd.cli.actions import ExitStatus
from blockd.cli.display import late_bar, print_error, print_json, print_lines, print_text, progress_bar
from blockd.cli.following import StreamStatus
from blockd.cli.image.opening import opened_image
from blockd.cli.standard_streams import write_out
from blockd.drivers.graph import NodeGraph
from blockd.drivers.sharing import file_of
from blockd.errors import RequestError


def _opened(
    options: argparse.Namespace, *, has_backing: bool = True
) -> AbstractAsyncContextManager[tuple[BlockNode, NodeGraph]]:
    return opened_image(
        options.file,
        options.format,
        options.image_paths,
        has_backing=has_backing,
        backing_format=options.backing_format,
    )


def _wants_json(options: argparse.Namespace) -> bool:
    return bool(options.json) or options.output == "json"


async def create(options: argparse.Namespace) -> int:
    """Make an image."""
    from blockd.cli.image.create import (  # noqa: PLC0415
        NewImage,
        chosen_format,
        create_image,
        format_taken_for_raw,
    )

    image_format = chosen_format(options.file, options.format, "-f")
    image = NewImage(image_format, options.size, options.backing, options.backing_format)
    image = image.told(options.options)
    size = await create_image(options.file, image)
    if (seen := await format_taken_for_raw(options.file, image)) is not None:
        print_error(
            f"warning: '{image.backing}' looks like a {seen} image; with -F raw the guest reads the bytes of "
            f"that file, not the disk in it (-F {seen})"
        )
    if options.json:
        print_json({"filename": options.file, "size": size})
    return ExitStatus.SUCCESS


async def info(options: argparse.Namespace) -> int:
    """Describe an image, or a whole chain."""
    from blockd.cli.image.info import describe, description_lines  # noqa: PLC0415

    async with _opened(options, has_backing=options.backing_chain) as (image, _):
        found = [await in_thread(describe, layer, await _actual_size(layer)) for layer in chain(image)]
    if _wants_json(options):
        print_json(found if options.backing_chain else found[0])
        return ExitStatus.SUCCESS
    for number, description in enumerate(found):
        if number:
            print_text("")
        for line in description_lines(description):
            print_text(line)
    return ExitStatus.SUCCESS


async def _actual_size(image: BlockNode) -> int:
    file = file_of(image)
    return (await file.disk_usage() if file is not None else None) or 0


async def check(options: argparse.Namespace) -> int:
    """Check an image, and repair it if asked to."""
    from blockd.cli.image import check as checking  # noqa: PLC0415
    from blockd.formats.check_report import Repair  # noqa: PLC0415

    repair = None if options.repair is None else Repair(options.repair)
    try:
        with late_bar(options.file, is_shown=True):
            report, found_format = await checking.check_image(options.file, options.format, repair)
    except checking.Unchecked as error:
        print_error(error.message)
        return checking.NO_CHECK_STATUS
    if _wants_json(options):
        print_json(checking.report_object(report, found_format))
    else:
        for line in checking.report_lines(report):
            print_text(line)
    return checking.status_of(report)


async def map_(options: argparse.Namespace) -> int:
    """List where the data is."""
    from blockd.cli.image.map import HEADING, chain_entries, entry_json, entry_line  # noqa: PLC0415

    is_json = _wants_json(options)
    async with _opened(options) as (image, _):
        start, end = min(options.start_offset, image.size), image.size
        if options.max_length is not None:
            end = min(end, start + options.max_length)
        if not is_json:
            print_text(HEADING)
        separator = "["
        # On a terminal the lines themselves show that it goes on.
        with late_bar(options.file, is_shown=not sys.stdout.isatty()) as move:
            async for entries in chain_entries(image, start, end):
                if is_json:
                    write_out(separator + ",\n".join(map(entry_json, entries)))
                    separator = ",\n"
                elif lines := [entry_line(entry) for entry in entries if entry.data]:
                    print_lines(lines)
                move(entries[-1].end - start, end - start)
                await asyncio.sleep(0)  # the bar has its turn
        if is_json:
            write_out("[]\n" if separator == "[" else "]\n")
    return ExitStatus.SUCCESS


async def convert(options: argparse.Namespace) -> int:
    """Copy an image into a new one."""
    from blockd.cli.image.convert import Source, convert_image  # noqa: PLC0415
    from blockd.cli.image.create import NewImage, chosen_format  # noqa: PLC0415

    image_format = chosen_format(options.target, options.target_format, "-O")
    image = NewImage(image_format).told(options.options)
    if (image.size, image.backing, image.backing_format) != (None, None, None):
        raise RequestError("The copy of an image has its size, and no backing file")
    source = Source(options.file, options.format, options.image_paths, options.backing_format)
    with _display(options) as show:
        converted = await convert_image(source, options.target, image, show)
    if _wants_json(options):
        told = {"filename": options.target, "format": image_format, "result": "completed"}
        print_json({**told, **converted._asdict()})
    return ExitStatus.SUCCESS


def _display(options: argparse.Namespace) -> AbstractContextManager[Callable[[StreamStatus], None]]:
    """How to show the progress: as JSON, as a bar on a terminal, or not at all."""
    if _wants_json(options):
        return nullcontext(print_json)
    return progress_bar(options.target) if sys.stderr.isatty() else nullcontext(lambda _status: None)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], Coroutine[None, None, int]]] = {
    "create": create,
    "info": info,
    "check": check,
    "map": map_,
    "convert": convert,
}
