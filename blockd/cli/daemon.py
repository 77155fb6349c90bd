"""`blockd`, the program: reads its command line, runs the daemon, and says what went wrong.

What is slow to load is imported when it is needed, so that --help answers at once.
"""

# ruff: noqa: PLC0415

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from blockd import __version__

if TYPE_CHECKING:
    from blockd.config import Config, Served
    from blockd.daemon import Daemon


def main() -> int:
    """Run `blockd` with the arguments of the process and return its exit status."""
    from blockd.cli.standard_streams import open_standard_streams
    from blockd.errors import BlockdError, printable

    try:
        open_standard_streams()
        return _run(sys.argv[1:])
    except BrokenPipeError:
        return 1  # nobody reads what was to be printed
    except BlockdError as error:
        print(f"blockd: {printable(error.message)}", file=sys.stderr)
        return 1
    except MemoryError:
        print("blockd: out of memory", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # before the daemon ran: from then on Ctrl-C is a clean stop


def _run(arguments: list[str]) -> int:
    if arguments in (["--help"], ["-h"]):
        return _print_help()
    if arguments in (["--version"], ["-V"]):
        return _print_version()
    return _start(arguments)


def _print_help() -> int:
    from blockd.cli.help import HELP
    from blockd.cli.standard_streams import write_out

    write_out(HELP)
    return 0


def _print_version() -> int:
    from blockd.cli.standard_streams import write_out

    write_out(f"blockd {__version__}\n")
    return 0


def _start(arguments: list[str]) -> int:
    from blockd.cli.announcement import moved_line, stopped_line
    from blockd.cli.background import fork_to_background
    from blockd.cli.limits import require_address_space
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
    require_address_space()
    tell_parent = fork_to_background() if line.is_background else None
    notify = notifier(os.environ)

    is_for_people = False

    def when_ready(served: "Served") -> None:
        nonlocal is_for_people
        if not inherited:  # else who started us knows where the sockets are
            is_for_people = _announce(line.config, served)
        if tell_parent is not None:
            tell_parent()
        notify("READY=1")

    is_clean, daemon = _serve(line.config, when_ready, lambda: notify("STOPPING=1"))
    if is_for_people:
        _say([*map(stopped_line, daemon.stopped), *map(moved_line, daemon.moved)])
    return 0 if is_clean else 1


def _check(config: "Config") -> int:
    """Say what is wrong with a configuration; nothing is opened."""
    from blockd.cli.checking import problems
    from blockd.cli.standard_streams import write_out
    from blockd.errors import printable

    found = problems(config)
    for problem in found:
        print(f"blockd: {printable(problem)}", file=sys.stderr)
    if not found:
        write_out("blockd: the configuration makes sense\n")
    return 1 if found else 0


def _announce(config: "Config", served: "Served") -> bool:
    """Say where the daemon is reached, unless that is known; tell whether it was said."""
    from blockd.cli.announcement import ready_lines

    lines = ready_lines(config, served)
    _say(lines)
    return bool(lines)


def _say(lines: Iterable[str]) -> None:
    """Print lines; that nobody can read them keeps nothing from being served."""
    from blockd.cli.standard_streams import write_out
    from blockd.errors import BlockdError

    with contextlib.suppress(BrokenPipeError, BlockdError):
        write_out("".join(f"{line}\n" for line in lines))


def _serve(
    config: "Config", when_ready: "Callable[[Served], None]", when_ending: Callable[[], None]
) -> "tuple[bool, Daemon]":
    """Run the daemon until it is told to end; returns whether the end was clean, and the daemon."""
    import asyncio

    import uvloop

    from blockd.aio import io_executor, run_in_loop
    from blockd.cli.log import start_log
    from blockd.daemon import Daemon
    from blockd.scheduling import take_short_turns

    async def run() -> bool:
        asyncio.get_running_loop().set_default_executor(executor)
        return await daemon.run(config, when_ready, when_ending)

    start_log()
    executor = io_executor()
    take_short_turns()
    daemon = Daemon()
    with executor:
        return run_in_loop(uvloop.new_event_loop, run), daemon


if __name__ == "__main__":
    sys.exit(main())
