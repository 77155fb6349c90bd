"""The command line and the journal: what both speak of, and where they differ.

The journal wins. An option brings about what it names once; from then on commands may change it or take it
away, and a restart with the same command line must not undo that. An option that names something the journal
has never had is done as always.
"""

from collections.abc import Iterator
from pathlib import Path

from blockd.block.image_paths import without_protocol
from blockd.commands.context import Services
from blockd.config import Blockdev, Export, FileDevice, Given, NbdServer, NodeDevice, Object, Option
from blockd.drivers.graph import COPY_ON_READ_PREFIX


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


def differences(services: Services, earlier: str, given: Given) -> Iterator[str]:
    """Tell, in words for people, how what there is differs from what an option says that was done before."""
    subject = subject_of(given.option)
    if not _is_there(services, given.option):
        yield f"the {subject} was removed while blockd ran, and is not brought back"
    elif earlier != given.argument:
        yield f"the {subject} stays as it is in the journal, where it began as: {earlier}"
    elif isinstance(given.option, FileDevice):
        active = services.devices.get(given.option.name).active
        if not _is_same_file(given.option.filename, active.filename):
            yield f"the {subject} goes on in '{active.filename}', its active image when blockd last ran"


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
