"""The command line of `blockctl image …` and of `blockctl create`.

What the commands do is loaded when one of them is used: the others start without the image formats.
"""

import argparse
from collections.abc import Callable

from blockd.units import parse_size

_EXIT_STATUS = """\
exit status:
  0    success; check: nothing is wrong
  1    failure, which is told on standard error
  2    check: the image is corrupt (or: wrong usage)
  3    check: nothing is wrong but space that nothing refers to
  63   check: images of this format hold nothing that could be checked
  130  Ctrl-C; convert has removed the file it had begun
"""

_EXAMPLES = """
examples:
  blockctl image create -f qcow2 -o cluster_size=128k,lazy_refcounts=on disk.qcow2 10G
  blockctl image create -b base.raw -F raw disk.qcow2
  blockctl image info --backing-chain disk.qcow2
  blockctl image check --repair leaks disk.qcow2
  blockctl image map --json disk.qcow2
  blockctl image convert -O raw disk.qcow2 disk.raw
"""


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, purpose: str, exit_status: str
) -> argparse.ArgumentParser:
    """Add a command whose help tells its exit statuses."""
    return commands.add_parser(
        name,
        help=purpose,
        description=purpose.capitalize() + ".",
        epilog=exit_status,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class ImageParsers:
    """Adds the commands; `share` adds the options that every command of blockctl has."""

    def __init__(self, share: Callable[[argparse.ArgumentParser], None]) -> None:
        self._share = share

    def add_image(self, commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        """Add `image` with the commands below it."""
        image = commands.add_parser(
            "image",
            help="work on image files that nobody has open; needs no daemon",
            description="Work on image files that nobody has open; needs no daemon.",
            epilog=_EXIT_STATUS + _EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        below = image.add_subparsers(required=True, metavar="COMMAND")
        self.add_create(below)
        self._add_info(below)
        self._add_check(below)
        self._add_map(below)
        self._add_convert(below)

    def _add(
        self,
        commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
        name: str,
        purpose: str,
    ) -> argparse.ArgumentParser:
        parser = add_command(commands, name, purpose, _EXIT_STATUS)
        self._share(parser)
        parser.set_defaults(action=_run, image_command=name)
        return parser

    def add_create(self, commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        """Add `create`."""
        create = self._add(commands, "create", "make a new image; needs no daemon")
        create.add_argument("file")
        create.add_argument(
            "size", nargs="?", type=size, help="such as 10G (default: that of the backing file)"
        )
        create.add_argument(
            "-f", "--format", help="default: qcow2; needed if FILE is named like an image of another format"
        )
        create.add_argument("-b", "--backing", metavar="FILE", help="make an overlay of FILE")
        create.add_argument("-F", "--backing-format", metavar="FORMAT", help="the format of that FILE")
        _add_creation_options(create)

    def _add_info(self, commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        info = self._add(commands, "info", "describe an image")
        _add_file(info)
        _add_backing_format(info)
        info.add_argument("--backing-chain", action="store_true", help="describe its backing files too")

    def _add_check(self, commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        check = self._add(commands, "check", "look whether the tables of an image are right")
        _add_file(check)
        check.add_argument(
            "-r",
            "--repair",
            choices=("leaks", "all"),
            metavar="leaks|all",
            help="give back space that nothing refers to; with `all` also make wrong tables right",
        )

    def _add_map(self, commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        mapped = self._add(commands, "map", "list where the data of a disk is stored")
        _add_file(mapped)
        _add_backing_format(mapped)
        mapped.add_argument("-s", "--start-offset", type=size, default=0, metavar="OFFSET")
        mapped.add_argument("-l", "--max-length", type=size, metavar="LENGTH")

    def _add_convert(self, commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        convert = self._add(
            commands, "convert", "copy a disk, with its whole backing chain, into a new image"
        )
        _add_file(convert)
        _add_backing_format(convert)
        convert.add_argument("target", help="a file that does not exist yet")
        convert.add_argument(
            "-O",
            "--target-format",
            metavar="FORMAT",
            help="default: qcow2; needed if TARGET is named like an image of another format",
        )
        _add_creation_options(convert)


def size(text: str) -> int:
    """An argument that is a number of bytes."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def take_size(options: argparse.Namespace, more: list[str]) -> bool:
    """Take the size of a new image that stands behind options; tell whether that is what is left.

    With `create FILE -f raw 1M` argparse has decided at FILE that there is no size.
    """
    if getattr(options, "image_command", None) != "create" or options.size is not None or len(more) != 1:
        return False
    try:
        options.size = size(more[0])
    except argparse.ArgumentTypeError:
        return False
    return True


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file")
    parser.add_argument(
        "-f",
        "--format",
        help="the format of FILE; needed unless its name's extension and its content say the same",
    )
    parser.add_argument(
        "--output", choices=("human", "json"), help="`json` is another way to say --json, qemu-img's"
    )
    _add_paths(parser)


def _add_backing_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backing-format",
        metavar="FORMAT",
        help="the format of the backing file of FILE, if FILE does not record it (QED records only raw); "
        "needed unless the backing file's extension and content say the same",
    )


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-paths",
        action="append",
        default=[],
        metavar="FOLDER",
        help="let images name backing files in this folder; without it only in their own "
        "(may be given several times)",
    )


def _add_creation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--options",
        action="append",
        default=[],
        metavar="KEY=VALUE[,...]",
        help="what the new image is to be like, in qemu-img's words (may be given several times)",
    )


async def _run(options: argparse.Namespace) -> int:
    from blockd.cli.image.commands import COMMANDS  # noqa: PLC0415  (image formats are slow to load)

    return await COMMANDS[options.image_command](options)
