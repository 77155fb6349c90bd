"""`blockctl`, the client: streams, switches and lists, and tells by its exit status how it went."""

import argparse
import asyncio
import atexit
import gc
import itertools
import json
import sys
from collections.abc import Callable, Coroutine, Sequence

from blockd import __version__
from blockd.cli import actions
from blockd.cli.actions import DEFAULT_SOCKET, ExitStatus
from blockd.cli.display import print_error, print_json
from blockd.cli.image.arguments import ImageParsers, add_command, size, take_size
from blockd.cli.qmp_client import CommandFailed, Message, NoConnection
from blockd.cli.standard_streams import open_standard_streams
from blockd.errors import BlockdError, printable

# New objects until garbage is looked for: there is little, and a map has hundreds of thousands of entries.
GARBAGE_COUNT = 50_000

Action = Callable[[argparse.Namespace], Coroutine[None, None, int]]

_EXIT_STATUS = """\
exit status:
  0    success; with --wait and --watch: the stream completed, or nothing is left to copy
  1    failure, which is told on standard error
  2    wrong usage
  3    the stream was cancelled
  4    no connection to the daemon, or it was lost
  130  Ctrl-C; a stream that was started goes on
  141  whoever read the output has left, as in `| head`; a stream that was started goes on
"""

_EXAMPLES = """
examples:
  blockctl stream vda --wait                      copy all that is missing, and wait for it
  blockctl stream vda --base base.qcow2 --speed 50M
  blockctl status vda --watch                     come back to a stream that runs
  blockctl pause vda; blockctl resume vda; blockctl speed vda 10M
  blockctl create copy.qcow2 -b disk.qcow2 -F qcow2
  blockctl switch vda copy.qcow2 && blockctl stream vda --wait
  blockctl image info copy.qcow2                  needs no daemon; see blockctl image --help
  blockctl raw '{"execute": "query-block"}'
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `blockctl` with these arguments, by default those of the process, and return its exit status."""
    # All memory goes with the process. Unless it is frozen, the interpreter looks through it for garbage at
    # the end: a fifth of the CPU time of a short command.
    atexit.register(gc.freeze)
    gc.set_threshold(GARBAGE_COUNT)
    parser = _parser()
    words = sys.argv[1:] if arguments is None else arguments
    _refuse_unknown(parser, words)
    options, more = parser.parse_known_args(words)
    if more and not take_size(options, more):
        parser.error(f"unrecognized arguments: {' '.join(map(printable, more))}")
    if getattr(options, "watch", False) and options.device is None:
        parser.error("--watch needs a DEVICE")
    try:
        return _run(options)
    except BrokenPipeError:
        return ExitStatus.READER_GONE


def _refuse_unknown(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """End with an error that names the option that was meant: argparse would blame the word after it."""
    known = _long_options(parser)
    for word in itertools.takewhile(lambda word: word != "--", words):
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:
            from blockd.cli.suggestions import did_you_mean  # noqa: PLC0415  (loads the image formats)

            meant = did_you_mean(name[2:], [option[2:] for option in known], "--")
            parser.error(f"unrecognized option '{printable(name)}'{meant}")


def _long_options(parser: argparse.ArgumentParser) -> list[str]:
    """All options of a command line and of its commands."""
    found = [option for option in parser._option_string_actions if option.startswith("--")]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [option for below in action.choices.values() for option in _long_options(below)]
    return list(dict.fromkeys(found))


def _run(options: argparse.Namespace) -> int:
    action: Action = options.action
    try:
        open_standard_streams()
        return asyncio.run(action(options))
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
    except BlockdError as error:
        if options.json:
            name = error.error_class if isinstance(error, CommandFailed) else "GenericError"
            print_json({"error": {"class": name, "desc": error.message}})
        print_error(error.message)
        return ExitStatus.NO_CONNECTION if isinstance(error, NoConnection) else ExitStatus.FAILURE


# -- the command line -------------------------------------------------------------------------


_REQUEST = """a request is a JSON object such as '{"execute": "query-block"}'"""


def _request(text: str) -> Message:
    try:
        request = json.loads(sys.stdin.read() if text == "-" else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}; {_REQUEST}") from error
    if not isinstance(request, dict):
        raise argparse.ArgumentTypeError(_REQUEST)
    return request


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blockctl",
        description="Control a running blockd.",
        epilog=_EXIT_STATUS + _EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"blockctl {__version__}")
    _add_socket(parser, DEFAULT_SOCKET)
    _add_json(parser, default=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_stream_commands(commands)
    _add_other_commands(commands)
    return parser


# These may stand before and after the command.


def _add_socket(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--socket",
        "--qmp",
        default=default,
        metavar="PATH",
        help=f"the daemon's QMP socket (default: {DEFAULT_SOCKET})",
    )


def _add_json(parser: argparse.ArgumentParser, *, default: bool | str = argparse.SUPPRESS) -> None:
    parser.add_argument("--json", action="store_true", default=default, help="print JSON, one value a line")


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    action: Action,
    purpose: str,
) -> argparse.ArgumentParser:
    parser = add_command(commands, name, purpose, _EXIT_STATUS)
    _add_socket(parser, argparse.SUPPRESS)
    _add_json(parser)
    parser.set_defaults(action=action)
    return parser


def _add_stream_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    stream = _add(commands, "stream", actions.stream, "copy what a disk lacks from its backing files into it")
    stream.add_argument("device")
    stream.add_argument("--base", metavar="FILE", help="copy nothing from this image or from below it")
    stream.add_argument("--speed", type=size, default=0, metavar="RATE", help="bytes a second, such as 10M")
    stream.add_argument(
        "--on-error",
        choices=("report", "ignore", "stop", "enospc"),
        metavar="POLICY",
        help="report (default), ignore, stop, or enospc: stop when the disk is full",
    )
    stream.add_argument("--wait", action="store_true", help="wait until the stream has ended")
    cancel = _add(commands, "cancel", actions.cancel, "end a stream; what was copied stays")
    cancel.add_argument("device")
    cancel.add_argument(
        "--force",
        action="store_true",
        help="give up guest writes that an ended stream has left staged: they are lost",
    )
    pause = _add(commands, "pause", actions.pause, "pause a stream")
    pause.add_argument("device")
    resume = _add(
        commands, "resume", actions.resume, "let a stream go on that was paused, or that an error has paused"
    )
    resume.add_argument("device")
    speed = _add(commands, "speed", actions.speed, "set how fast a stream may be")
    speed.add_argument("device")
    speed.add_argument("rate", type=size, help="bytes a second, such as 10M; 0: as fast as it can")
    status = _add(commands, "status", actions.status, "tell how far streams are")
    status.add_argument("device", nargs="?")
    status.add_argument("--watch", action="store_true", help="stay until the stream of DEVICE has ended")


def _add_other_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    switch = _add(
        commands, "switch", actions.switch, "let a disk go on in another image, an overlay of its present one"
    )
    switch.add_argument("device")
    switch.add_argument("file")
    switch.add_argument("--format", help="the format of FILE (default: qcow2)")
    _add(
        commands,
        "list",
        actions.list_all,
        "list disks with their chains, streams and exports, and what is left out",
    )
    acknowledge = _add(
        commands,
        "acknowledge",
        actions.acknowledge,
        "take note that a disk has lost guest writes: until then the first flush of each connection fails",
    )
    acknowledge.add_argument("disk", help="a device, or a node that is exported without one")
    raw = _add(commands, "raw", actions.raw, "send a QMP request and print what it returns")
    raw.add_argument("request", type=_request, help="a JSON object, or - to read it from standard input")
    images = ImageParsers(_add_json)
    images.add_create(commands)
    images.add_image(commands)


if __name__ == "__main__":
    sys.exit(main())
