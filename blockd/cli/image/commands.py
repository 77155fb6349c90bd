"""What the commands of `blockctl image` do, and what they print: for people as qemu-img, or JSON."""

import argparse
import json
import sys
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractContextManager, nullcontext

from blockd.aio import in_thread
from blockd.block.chain import chain
from blockd.cli.actions import ExitStatus
from blockd.cli.display import print_error, print_json, print_text, progress_bar
from blockd.cli.following import StreamStatus
from blockd.cli.image.check import (
    NO_CHECK_STATUS,
    Unchecked,
    check_image,
    report_lines,
    report_object,
    status_of,
)
from blockd.cli.image.convert import Source, convert_image
from blockd.cli.image.create import NewImage, create_image
from blockd.cli.image.info import describe, description_lines
from blockd.cli.image.map import HEADING, chain_entries, entry_line, entry_object
from blockd.cli.image.opening import opened_image
from blockd.errors import RequestError
from blockd.formats.check_report import Repair


def _wants_json(options: argparse.Namespace) -> bool:
    return bool(options.json) or options.output == "json"


async def create(options: argparse.Namespace) -> int:
    """Make an image."""
    image = NewImage(options.format, options.size, options.backing, options.backing_format)
    size = await create_image(options.file, image.told(options.options))
    if options.json:
        print_json({"filename": options.file, "size": size})
    return ExitStatus.SUCCESS


async def info(options: argparse.Namespace) -> int:
    """Describe an image, or a whole chain."""
    opening = opened_image(
        options.file, options.format, options.image_paths, has_backing=options.backing_chain
    )
    async with opening as (image, _):
        found = [await in_thread(describe, layer) for layer in chain(image)]
    if _wants_json(options):
        print_json(found if options.backing_chain else found[0])
        return ExitStatus.SUCCESS
    for number, description in enumerate(found):
        if number:
            print_text("")
        for line in description_lines(description):
            print_text(line)
    return ExitStatus.SUCCESS


async def check(options: argparse.Namespace) -> int:
    """Check an image, and repair it if asked to."""
    repair = None if options.repair is None else Repair(options.repair)
    try:
        report, found_format = await check_image(options.file, options.format, repair)
    except Unchecked as error:
        print_error(error.message)
        return NO_CHECK_STATUS
    if _wants_json(options):
        print_json(report_object(report, found_format))
    else:
        for line in report_lines(report):
            print_text(line)
    return status_of(report)


async def map_(options: argparse.Namespace) -> int:
    """List where the data is."""
    is_json = _wants_json(options)
    async with opened_image(options.file, options.format, options.image_paths) as (image, _):
        start, end = min(options.start_offset, image.size), image.size
        if options.max_length is not None:
            end = min(end, start + options.max_length)
        if not is_json:
            print_text(HEADING)
        separator = "["
        async for entry in chain_entries(image, start, end):
            if is_json:
                print(f"{separator}{json.dumps(entry_object(entry))}", end="")
                separator = ",\n"
            elif entry.data:
                print_text(entry_line(entry))
        if is_json:
            print("[]" if separator == "[" else "]", flush=True)
    return ExitStatus.SUCCESS


async def convert(options: argparse.Namespace) -> int:
    """Copy an image into a new one."""
    image = NewImage(options.target_format).told(options.options)
    if (image.size, image.backing, image.backing_format) != (None, None, None):
        raise RequestError("The copy of an image has its size, and no backing file")
    source = Source(options.file, options.format, options.image_paths)
    with _display(options) as show:
        converted = await convert_image(source, options.target, image, show)
    if _wants_json(options):
        told = {"filename": options.target, "format": options.target_format, "result": "completed"}
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
