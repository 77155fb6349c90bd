"""The command line and the journal: what both speak of, and where they differ.

The journal wins. An option brings about what it names once; from then on commands may change it or take it
away, and a restart with the same command line must not undo that. An option that names something the journal
has never had is done as always; if it names what could not be restored, it is left out along with that.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from blockd.aio import in_thread
from blockd.commands.context import Services
from blockd.config import (
    BELOW,
    Blockdev,
    Export,
    FileDevice,
    Given,
    NbdServer,
    NodeDevice,
    Object,
    Option,
)
from blockd.devices.left_out import Kind, LeftOut, Thing
from blockd.drivers.graph import COPY_ON_READ_PREFIX
from blockd.filenames import without_protocol


def subject_of(option: Option) -> str | None:
    """What an option brings about that the journal has too; None: it has to be done at every start."""
    match option:
        case Blockdev():
            return f"node {option.options['node-name']}" if "node-name" in option.options else None
        case Object():
            is_kept = option.options["qom-type"] == "throttle-group"
            return f"throttle group {option.options['id']}" if is_kept else None
        case FileDevice(name=name) | NodeDevice(id=name):
            return f"device {name}"
        case NbdServer():
            return "NBD server"
        case Export():
            return f"export {option.id}"
        case _:
            return None


def thing_of(option: Option) -> tuple[Kind, str] | None:
    """What an option brings about that can be left out when the daemon is restored."""
    match option:
        case Blockdev() if "node-name" in option.options:
            return Kind.NODE, str(option.options["node-name"])
        case Object():
            return Kind.THROTTLE_GROUP, str(option.options["id"])
        case FileDevice(name=name) | NodeDevice(id=name):
            return Kind.DEVICE, name
        case Export():
            return Kind.EXPORT, option.id
        case _:
            return None


def lacks(left_out: LeftOut, option: Option) -> Thing | None:
    """What an option names that is left out, if it does; it cannot be done without."""
    found = (left_out.get(kind, name) for kind, name in _needs(option))
    return next((thing for thing in found if thing is not None), None)


def _needs(option: Option) -> Iterator[tuple[Kind, str]]:
    match option:
        case Blockdev():
            yield from _needs_of_node(option.options)
        case NodeDevice(node_name=name) | Export(node_name=name):
            yield Kind.NODE, name


def _needs_of_node(options: Mapping[str, object]) -> Iterator[tuple[Kind, str]]:
    if "throttle-group" in options:
        yield Kind.THROTTLE_GROUP, str(options["throttle-group"])
    for below in map(options.get, BELOW):
        if isinstance(below, str):
            yield Kind.NODE, below
        elif isinstance(below, Mapping):
            yield from _needs_of_node(below)


async def difference(services: Services, earlier: str, given: Given) -> str | None:
    """Tell, in words for people, how what there is differs from what an option says that was done before."""
    subject = subject_of(given.option)
    thing = thing_of(given.option)
    if thing is not None and services.left_out.get(*thing) is not None:
        return None  # that was said when it was left out
    if not _is_there(services, given.option):
        return f"the {subject} was removed while blockd ran, and is not brought back"
    if earlier != given.argument:
        return f"the {subject} stays as it is in the journal, where it began as: {earlier}"
    if isinstance(given.option, FileDevice):
        active = services.devices.get(given.option.name).active
        if not await in_thread(_is_same_file, given.option.filename, active.filename):
            return f"the {subject} goes on in '{active.filename}', its active image when blockd last ran"
    return None


def _is_there(services: Services, option: Option) -> bool:
    match option:
        case Blockdev():
            return option.options["node-name"] in services.graph.nodes
        case Object():
            return services.objects.get(str(option.options["id"])) is not None
        case FileDevice(name=name) | NodeDevice(id=name):
            return any(device.name == name for device in services.devices)
        case NbdServer():
            return services.exports.server is not None
        case Export():
            return any(offer.export.export_id == option.id for offer in services.exports)
        case _:
            return True


def _is_same_file(given: str, active: str) -> bool:
    try:
        return Path(without_protocol(given.removeprefix(COPY_ON_READ_PREFIX))).samefile(active)
    except OSError:
        return False
