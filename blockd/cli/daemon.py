"""`blockd`, the program: reads its command line, runs the daemon, and says what went wrong.

What is slow to load is imported when it is needed, so that --help answers at once.
"""

# ruff: noqa: PLC0415

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from blockd import __version__

if TYPE_CHECKING:
    from blockd.config import Config


def main() -> int:
    """Run `blockd` with the arguments of the process and return its exit status."""
    arguments = sys.argv[1:]
    if arguments in (["--help"], ["-h"]):
        return _print_help()
    if arguments in (["--version"], ["-V"]):
        return _print_version()
    from blockd.errors import BlockdError, printable

    try:
        return _start(arguments)
    except BlockdError as error:
        print(f"blockd: {printable(error.message)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # before the daemon ran: from then on Ctrl-C is a clean stop


def _print_help() -> int:
    from blockd.cli.help import HELP

    print(HELP, end="")
    return 0


def _print_version() -> int:
    print(f"blockd {__version__}")
    return 0


def _start(arguments: list[str]) -> int:
    from blockd.cli.background import fork_to_background
    from blockd.cli.options import Action, parse_command_line
    from blockd.cli.service_manager import inherited_sockets, notifier
    from blockd.errors import RequestError

    inherited = inherited_sockets(os.environ)
    line = parse_command_line(arguments, inherited)
    if line.action is Action.HELP:
        return _print_help()
    if line.action is Action.VERSION:
        return _print_version()
    if not line.config.options and line.config.state_dir is None:
        raise RequestError("nothing to serve: give a disk, --device NAME=FILE, or see --help")
    if line.action is Action.CHECK:
        return _check(line.config)
    tell_parent = fork_to_background() if line.is_background else None
    notify = notifier(os.environ)

    def when_ready() -> None:
        if not inherited:  # else who started us knows where the sockets are
            _announce(line.config)
        if tell_parent is not None:
            tell_parent()
        notify("READY=1")

    _serve(line.config, when_ready, lambda: notify("STOPPING=1"))
    return 0


def _check(config: "Config") -> int:
    """Say what is wrong with a configuration; nothing is opened."""
    from blockd.cli.checking import problems
    from blockd.errors import printable

    found = problems(config)
    for problem in found:
        print(f"blockd: {printable(problem)}", file=sys.stderr)
    if not found:
        print("blockd: the configuration makes sense")
    return 1 if found else 0


def _announce(config: "Config") -> None:
    from blockd.cli.announcement import ready_lines

    for line in ready_lines(config):
        print(line, flush=True)


def _serve(config: "Config", when_ready: Callable[[], None], when_ending: Callable[[], None]) -> None:
    """Run the daemon until it is told to end."""
    import asyncio

    import uvloop

    from blockd.aio import io_executor
    from blockd.cli.log import start_log
    from blockd.daemon import Daemon
    from blockd.scheduling import take_short_turns

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(io_executor())
        await Daemon().run(config, when_ready, when_ending)

    start_log()
    take_short_turns()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


if __name__ == "__main__":
    sys.exit(main())
