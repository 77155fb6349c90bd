"""``--check-config``: what in a command line or config file cannot work, found without opening anything.

Each option by itself was checked when it was read. What is looked at here is what they say of each other:
names that nobody defines, or that two define. Images and sockets are not looked at: they may come later.
"""

from collections.abc import Iterator, Mapping

from blockd.config import (
    BELOW,
    Blockdev,
    Config,
    Export,
    FileDevice,
    Monitor,
    NbdServer,
    NodeDevice,
    Object,
    Option,
    SocketChardev,
    StdioChardev,
)
from blockd.drivers import FORMATS, unknown_format


def problems(config: Config) -> list[str]:
    """Tell everything that is wrong, each with the place it stands at.

    With a state directory names may also be those of an earlier run, so none is taken for unknown.
    """
    names = _Names(may_be_known=config.state_dir is not None)
    return [f"{given.where}: {problem}" for given in config.options for problem in names.meet(given.option)]


class _Names:
    """The names that the options so far have defined, each of some kind."""

    def __init__(self, *, may_be_known: bool) -> None:
        self._may_be_known = may_be_known
        self._defined: set[tuple[str, str]] = set()

    def meet(self, option: Option) -> Iterator[str]:
        """Say what is wrong with an option after those before it."""
        match option:
            case Blockdev():
                if "node-name" not in option.options:
                    yield "'node-name' must be specified for the root node"
                yield from self._node(option.options)
            case Object():
                yield from self._object(option)
            case SocketChardev() | StdioChardev():
                yield from self._define("chardev", option.id, f"Duplicate ID '{option.id}' for chardev")
            case Monitor():
                if ("chardev", option.chardev) not in self._defined:  # the journal knows nothing of these
                    yield f'chardev "{option.chardev}" not found'
            case NbdServer():
                yield from self._define("NBD server", "", "NBD server already running")
            case Export():
                yield from self._export(option)
            case FileDevice():
                yield from self._file_device(option)
            case NodeDevice():
                yield from self._use_node(option.node_name)
                yield from self._define("device", option.id, f"Device '{option.id}' already exists")

    def _define(self, kind: str, name: str, duplicate: str) -> Iterator[str]:
        if (kind, name) in self._defined:
            yield duplicate
        self._defined.add((kind, name))

    def _use(self, kind: str, name: str, unknown: str) -> Iterator[str]:
        if (kind, name) not in self._defined and not self._may_be_known:
            yield unknown

    def _use_node(self, name: str) -> Iterator[str]:
        yield from self._use("node", name, f"Cannot find device='' nor node-name='{name}'")

    def _node(self, options: Mapping[str, object]) -> Iterator[str]:
        for role in BELOW:
            below = options.get(role)
            if isinstance(below, str):
                yield from self._use_node(below)
            elif isinstance(below, dict):
                yield from self._node(below)
        if "throttle-group" in options:
            group = str(options["throttle-group"])
            yield from self._use("throttle-group", group, f"Throttle group '{group}' does not exist")
        if "node-name" in options:
            name = str(options["node-name"])
            yield from self._define("node", name, f"Duplicate nodes with node-name='{name}'")

    def _object(self, option: Object) -> Iterator[str]:
        name = str(option.options["id"])
        self._defined.add((str(option.options["qom-type"]), name))
        duplicate = f"attempt to add duplicate property '{name}' to object (type 'container')"
        yield from self._define("object", name, duplicate)

    def _export(self, option: Export) -> Iterator[str]:
        yield from self._use_node(option.node_name)
        yield from self._use("NBD server", "", "NBD server not running")
        yield from self._define("export", option.id, f"Block export id '{option.id}' is already in use")

    def _file_device(self, option: FileDevice) -> Iterator[str]:
        for name in (option.format, option.backing_format):
            if name is not None and name not in FORMATS:
                yield unknown_format(name)
        yield from self._define("device", option.name, f"Device '{option.name}' already exists")
