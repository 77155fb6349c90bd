"""The walls of the house stand: who imports whom, what has an owner, how big things get."""

import pytest

from tests.walls import (
    CANCELLATION_KEEPERS,
    FILE_LINES_MAX,
    FLOORS,
    FUNCTION_LINES_MAX,
    PROJECT,
    RULES,
    SUPERVISORS,
    Module,
    Rule,
    cancellation_is_never_swallowed,
    files_are_short,
    functions_are_short,
    imports_stay_below,
    libraries_stay_in_their_rooms,
    loop_is_never_put_to_sleep,
    memory_follows_threads,
    names_say_something,
    names_stay_as_they_are,
    only_cli_prints,
    only_supervisors_catch_all,
    tasks_have_owners,
    wire_is_pure,
)

FOLDERS = ("blockd", "tests", "bench", "examples")


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    """Every source file of the project."""
    files = sorted(path for folder in FOLDERS for path in (PROJECT / folder).rglob("*.py"))
    return [Module.parse(path.relative_to(PROJECT).as_posix(), path.read_text()) for path in files]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_wall_stands(rule: Rule, modules: list[Module]) -> None:
    breaches = [breach for module in modules for breach in rule(module)]
    assert not breaches, f"{rule.__doc__}\n" + "\n".join(breaches)


def test_exceptions_to_the_rules_are_still_needed() -> None:
    for path in SUPERVISORS:
        assert "except Exception" in (PROJECT / path).read_text(), f"{path} is no supervisor any more"
    for path in CANCELLATION_KEEPERS:
        assert "CancelledError" in (PROJECT / path).read_text(), f"{path} holds no cancellation back any more"


def test_every_room_is_on_one_floor() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert len(rooms) == len(set(rooms))


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX
SWALLOW = "try:\n    f()\nexcept {caught}:\n    g()\n"
CLEAN_UP = "try:\n    f()\nexcept {caught}:\n    g()\n    raise\n"

BREACHES: list[tuple[Rule, str, str]] = [
    (imports_stay_below, "blockd/jobs/stream.py", "from blockd.devices import Device"),
    (imports_stay_below, "blockd/jobs/stream.py", "from blockd import devices"),
    (imports_stay_below, "blockd/formats/qcow2/image.py", "import blockd.protocols.file"),
    (imports_stay_below, "blockd/qmp/session.py", "def f():\n    from blockd.block.node import BlockNode"),
    (imports_stay_below, "blockd/jobs/stream.py", "from .job import Job"),
    (imports_stay_below, "blockd/attic/trunk.py", ""),
    (libraries_stay_in_their_rooms, "blockd/jobs/sample.py", "from pydantic import BaseModel"),
    (libraries_stay_in_their_rooms, "blockd/daemon.py", "import uvloop"),
    (libraries_stay_in_their_rooms, "blockd/commands/block.py", "import aiohttp.web"),
    (wire_is_pure, "blockd/wire/nbd.py", "import asyncio"),
    (wire_is_pure, "blockd/wire/nbd.py", "from os import path"),
    (names_say_something, "blockd/block/utils.py", ""),
    (names_say_something, "tests/helpers/disk.py", ""),
    (tasks_have_owners, "blockd/jobs/sample.py", "asyncio.create_task(f())"),
    (tasks_have_owners, "blockd/jobs/sample.py", "asyncio.get_running_loop().create_task(f())"),
    (tasks_have_owners, "bench/run.py", "self.loop.create_task(f())"),
    (
        memory_follows_threads,
        "blockd/formats/sample.py",
        "async def f(self):\n    await in_thread(g)\n    self.size = 1",
    ),
    (tasks_have_owners, "blockd/jobs/sample.py", "ensure_future(f())"),
    (only_supervisors_catch_all, "blockd/jobs/sample.py", SWALLOW.format(caught="Exception")),
    (only_supervisors_catch_all, "blockd/jobs/sample.py", SWALLOW.format(caught="(OSError, Exception)")),
    (only_supervisors_catch_all, "blockd/jobs/sample.py", SWALLOW.format(caught="BaseException")),
    (only_supervisors_catch_all, "blockd/jobs/sample.py", SWALLOW.replace(" {caught}", "")),
    (only_supervisors_catch_all, "blockd/jobs/sample.py", "with contextlib.suppress(Exception):\n    f()"),
    (
        cancellation_is_never_swallowed,
        "blockd/jobs/sample.py",
        SWALLOW.format(caught="asyncio.CancelledError"),
    ),
    (only_cli_prints, "blockd/daemon.py", "print('ready')"),
    (names_stay_as_they_are, "blockd/daemon/daemon.py", "os.path.abspath(name)"),
    (names_stay_as_they_are, "blockd/daemon/daemon.py", "from os.path import normpath\nnormpath(name)"),
    (names_stay_as_they_are, "blockd/daemon/daemon.py", "Path(name).absolute()"),
    (names_stay_as_they_are, "blockd/block/image_paths.py", "Path(name).resolve()"),
    (loop_is_never_put_to_sleep, "blockd/daemon.py", "time.sleep(1)"),
    (functions_are_short, "blockd/daemon.py", LONG_FUNCTION),
    (files_are_short, "tests/test_long.py", "\n" * (FILE_LINES_MAX + 1)),
]


@pytest.mark.parametrize(("rule", "path", "source"), BREACHES)
def test_rule_sees_a_breach(rule: Rule, path: str, source: str) -> None:
    found = list(rule(Module.parse(path, source)))
    assert found
    assert all(breach.startswith(path) for breach in found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("blockd/jobs/stream.py", "from blockd.block.node import BlockNode\nfrom blockd.jobs.job import Job"),
        ("blockd/daemon.py", "from blockd.config import Config\nimport pydantic"),
        ("blockd/extents.py", "from blockd.units import KIB"),
        ("blockd/jobs/sample.py", "async def f(tasks):\n    tasks.create_task(g())"),
        (
            "blockd/formats/sample.py",
            "@uninterrupted\nasync def f(self):\n    await in_thread(g)\n    self.size = 1",
        ),
        ("blockd/formats/sample.py", "async def f(self):\n    self.size = 1\n    await in_thread(g)"),
        ("blockd/jobs/sample.py", CLEAN_UP.format(caught="BaseException")),
        ("blockd/jobs/sample.py", CLEAN_UP.format(caught="asyncio.CancelledError")),
        ("blockd/cli/blockctl.py", "print('ready')\nimport uvloop"),
        ("blockd/__init__.py", "from blockd import anything"),
        ("blockd/daemon/daemon.py", "from blockd.filenames import absolute\nabsolute(name)"),
        ("blockd/filenames.py", "os.path.realpath(name)"),
    ],
)
def test_rules_let_good_code_pass(path: str, source: str) -> None:
    module = Module.parse(path, source)
    assert [breach for rule in RULES for breach in rule(module)] == []
