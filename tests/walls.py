"""The walls of the house, as rules over syntax trees; `test_architecture.py` applies them.

A rule takes a module and yields what breaks it: where, what, and the cure.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parent.parent

# Rooms by floor: code imports its own room and the floors below, never up and never sideways.
FLOORS: list[set[str]] = [
    {"errors", "units", "extents"},
    {"aio", "few_lines", "filenames", "found_files", "freed_memory", "range_lock", "ratelimit", "scheduling"},
    {"wire"},
    {"qmp"},
    {"block"},
    {"protocols", "formats", "filters"},
    {"drivers", "objects"},
    {"jobs", "exports"},
    {"devices"},
    {"commands", "web"},
    {"config", "daemon"},
    {"cli", "__main__"},
]
# Floors whose names are single modules that may know each other.
SHARED_FLOORS = (0, 1, 10, 11)

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Who may import what is slow to load or ties the code to one library.
LIBRARIES: dict[str, set[str]] = {
    "pydantic": {"qmp", "commands", "web", "daemon"},
    "aiohttp": {"web", "protocols"},
    "prometheus_client": {"web"},
    "uvloop": {"cli"},
    "rich": {"cli"},
}
# wire/ turns bytes into values and back; what it cannot do, it cannot do wrong.
PURE_ROOM = "wire"
IMPURE_MODULES = {
    "asyncio",
    "os",
    "socket",
    "select",
    "selectors",
    "ssl",
    "subprocess",
    "threading",
    "pathlib",
}

BANNED_NAMES = {"utils", "helpers", "common", "misc", "base"}

FUNCTION_LINES_MAX = 60
FILE_LINES_MAX = 500


@dataclass(frozen=True)
class Module:
    """One source file: `name` is dotted, `room` its place under blockd (empty for blockd itself)."""

    path: str
    source: str
    tree: ast.Module

    @classmethod
    def parse(cls, path: str, source: str) -> "Module":
        return cls(path, source, ast.parse(source, path))

    @property
    def room(self) -> str:
        parts = Path(self.path).with_suffix("").parts
        return parts[1] if parts[0] == "blockd" and parts[1] != "__init__" else ""

    @property
    def is_product(self) -> bool:
        return self.path.startswith("blockd/")

    def breach(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"


Rule = Callable[[Module], Iterator[str]]


def imported(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """Every module that is imported anywhere in the file, by its dotted name."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            # `from blockd import units` names the room in the second half.
            yield from ((node, f"{name}.{alias.name}" if name == "blockd" else name) for alias in node.names)


def imports_stay_below(module: Module) -> Iterator[str]:
    """Imports go to the module's own room and to the floors below."""
    if not module.is_product or not module.room:
        return
    if module.room not in FLOOR_OF:
        yield module.breach(module.tree, f"'{module.room}' is on no floor: give it one in tests/walls.py")
        return
    own = FLOOR_OF[module.room]
    for node, name in imported(module):
        if name.startswith("."):
            yield module.breach(node, "relative import: write the name from blockd on")
        target = name.split(".")[1] if name.startswith("blockd.") else ""
        if target not in FLOOR_OF or target == module.room:
            continue
        floor = FLOOR_OF[target]
        if floor > own:
            yield module.breach(
                node,
                f"{module.room} imports {target} from above: take what it gives as an argument",
            )
        elif floor == own and own not in SHARED_FLOORS:
            yield module.breach(
                node, f"{module.room} imports its sibling {target}: let a floor above bring them together"
            )


def libraries_stay_in_their_rooms(module: Module) -> Iterator[str]:
    """pydantic, aiohttp, uvloop and rich are imported only where they belong."""
    if not module.is_product:
        return
    for node, name in imported(module):
        library = name.split(".")[0]
        rooms = LIBRARIES.get(library)
        if rooms is not None and module.room not in rooms:
            yield module.breach(
                node,
                f"{library} in {module.room}: only for {', '.join(sorted(rooms))}; use a dataclass",
            )


def wire_is_pure(module: Module) -> Iterator[str]:
    """wire/ does no I/O."""
    if module.room != PURE_ROOM:
        return
    for node, name in imported(module):
        if name.split(".")[0] in IMPURE_MODULES:
            yield module.breach(
                node, f"wire imports {name}: take bytes and return values, the caller reads and writes"
            )


def names_say_something(module: Module) -> Iterator[str]:
    """No module is called utils or the like."""
    for part in Path(module.path).with_suffix("").parts:
        if part in BANNED_NAMES:
            yield module.breach(module.tree, f"'{part}' says nothing: name the module after what it holds")


def tasks_have_owners(module: Module) -> Iterator[str]:
    """Tasks start in a TaskGroup; tests may hold single ones, to stop them where they want."""
    if module.path.startswith("tests/") or module.path == "blockd/aio.py":
        return
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        owner, _, name = called.rpartition(".")
        is_bare = name == "create_task" and (owner in ("", "asyncio") or owner.endswith(("loop", "loop()")))
        if is_bare or name == "ensure_future":
            yield module.breach(node, f"{called}() has no owner: use create_task() of an asyncio.TaskGroup")


# What may be lost when the caller of a thread is cancelled, though the thread has done it.
LOST_RESULTS: dict[str, str] = {
    "blockd/qmp/late_commands.py": "modules that were loaded stay loaded, and are asked for again",
}


def memory_follows_threads(module: Module) -> Iterator[str]:
    """What a thread has done is noted even if the task was cancelled meanwhile."""
    if not module.path.startswith("blockd/") or module.path in LOST_RESULTS:
        return
    for function in ast.walk(module.tree):
        if not isinstance(function, ast.AsyncFunctionDef):
            continue
        if any(ast.unparse(decorator) == "uninterrupted" for decorator in function.decorator_list):
            continue
        nodes = list(ast.walk(function))
        calls = [
            node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "in_thread"
        ]
        first = min((call.lineno for call in calls), default=len(module.source))
        for node in nodes:
            is_set = (
                isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.lineno >= first
            )
            if is_set and ast.unparse(node).startswith("self."):
                yield module.breach(
                    node,
                    f"'{ast.unparse(node)}' is not set if the task is cancelled while a thread works: "
                    "decorate the function with @uninterrupted",
                )


# Where any exception at all is caught on purpose: a supervisor keeps the daemon alive, and says why.
SUPERVISORS: dict[str, str] = {
    "blockd/block/housekeeping.py": "a bug in what images do beside guests ends no disk of them",
    "blockd/jobs/job.py": "a bug in a job ends that job, and its completion event says so",
    "blockd/daemon/left_out.py": "a bug met by one thing that is restored does not keep the rest from being",
    "blockd/daemon/recorder.py": "a bug in the last journal does not keep images from being closed",
    "blockd/jobs/manager.py": "a bug in the journal, or beside the jobs, ends neither a job nor the daemon",
    "blockd/exports/nbd/connection.py": "a bug costs the guest a request, or one client its connection",
    "blockd/qmp/server.py": "a bug costs one client its connection",
    "blockd/qmp/late_commands.py": "modules of two editions that meet end no daemon",
    "blockd/qmp/session.py": "a bug in a command becomes its error reply",
    "blockd/web/server.py": "a bug in what is shown becomes an error page",
}


def only_supervisors_catch_all(module: Module) -> Iterator[str]:
    """`except Exception` stands in supervisors only; `except BaseException` only to clean up and re-raise."""
    if not module.is_product:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = _caught(node)
            if "BaseException" in caught and _reraises(node):
                continue
            if caught & {"Exception", "BaseException"} and module.path not in SUPERVISORS:
                yield module.breach(
                    node, "catches everything: name the exceptions, or be a supervisor in tests/walls.py"
                )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            names = {ast.unparse(argument).rpartition(".")[2] for argument in node.args}
            if names & {"Exception", "BaseException", "CancelledError"}:
                yield module.breach(node, "suppresses too much: name the exceptions, never CancelledError")


# Where a cancellation is held back on purpose, and why.
CANCELLATION_KEEPERS: dict[str, str] = {
    "blockd/aio.py": "waits until the blocking call is over; its caller re-raises",
    "blockd/jobs/job.py": "the cancellation that `cancel` asked for ends here; any other is raised again",
}


def cancellation_is_never_swallowed(module: Module) -> Iterator[str]:
    """Who catches CancelledError raises it again."""
    if not module.is_product or module.path in CANCELLATION_KEEPERS:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and "CancelledError" in _caught(node) and not _reraises(node):
            yield module.breach(node, "swallows CancelledError: end the handler with a bare raise")


def _caught(handler: ast.ExceptHandler) -> set[str]:
    """The names of the exceptions a handler catches, without their modules."""
    if handler.type is None:
        return {"BaseException"}
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(caught).rpartition(".")[2] for caught in types}


def _reraises(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def only_cli_prints(module: Module) -> Iterator[str]:
    """print() and sys.stdout belong to programs."""
    if not module.is_product or module.room == "cli":
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield module.breach(node, "prints: log an event with logging, or return the value to cli/")


# The one module that makes names absolute: it takes no '..' away, or asks the file system.
NAMES_MODULE = "blockd/filenames.py"
_COLLAPSING = {"abspath", "normpath", "realpath", "relpath", "absolute", "resolve"}


def names_stay_as_they_are(module: Module) -> Iterator[str]:
    """`..` behind a symbolic link leads elsewhere than the text says."""
    if not module.is_product or module.path == NAMES_MODULE:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            is_ours = name == "absolute" and isinstance(node, ast.Name)
            if name in _COLLAPSING and not is_ours:
                yield module.breach(node, f"{name}: use absolute() or real_path() of blockd.filenames")


def loop_is_never_put_to_sleep(module: Module) -> Iterator[str]:
    """time.sleep() in the product stalls every guest, or hides a missing condition."""
    if not module.is_product:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep":
            yield module.breach(node, "time.sleep(): wait for an event or condition, with asyncio.timeout()")


def functions_are_short(module: Module) -> Iterator[str]:
    """A function fits on a screen."""
    if not module.is_product:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            if count > FUNCTION_LINES_MAX:
                yield module.breach(
                    node, f"{node.name}() has {count} lines, {FUNCTION_LINES_MAX} at most: name its steps"
                )


def files_are_short(module: Module) -> Iterator[str]:
    """A file is about one thing."""
    count = module.source.count("\n")
    if count > FILE_LINES_MAX:
        yield module.breach(
            module.tree, f"{count} lines, {FILE_LINES_MAX} at most: find the second thing and move it out"
        )


RULES: list[Rule] = [
    imports_stay_below,
    libraries_stay_in_their_rooms,
    wire_is_pure,
    names_say_something,
    tasks_have_owners,
    memory_follows_threads,
    only_supervisors_catch_all,
    cancellation_is_never_swallowed,
    only_cli_prints,
    names_stay_as_they_are,
    loop_is_never_put_to_sleep,
    functions_are_short,
    files_are_short,
]
