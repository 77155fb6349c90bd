"""Files that a client adds are locked as far as they are used, here and for other processes."""

import random
import re
import subprocess
from itertools import combinations
from pathlib import Path

import pytest

from blockd.block.permissions import NOTHING, RESIZE, WRITE, writes
from blockd.drivers import NodeGraph
from blockd.drivers.permissions import Claim
from blockd.drivers.sharing import use_of
from blockd.errors import RequestError, StorageError
from blockd.protocols.file import FileNode
from blockd.protocols.image_lock import Use
from blockd.protocols.used_file import UsedFile
from tests import qemu_img
from tests.conftest import StartDaemon
from tests.control.running import Running, refusal, running
from tests.iotests_ideas.nodes import Options, add, export, file, finished, qcow2, reopen, stream
from tests.locks.holders import HOLDERS
from tests.qmp_client import QmpClient, QmpError

SIZE = 1 << 20
WRITE_LOCK = 'Failed to get "write" lock'
# Some programs share what they write.
LOCK = re.compile('Failed to get (shared )?"write" lock')


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(b"b" * SIZE)
    return path


def raw(name: str, below: object, **more: object) -> Options:
    return qcow2(name, below, **more) | {"driver": "raw"}


def overlay_of(base: Path, name: str = "over") -> Path:
    return qemu_img.create(base.with_name(f"{name}.qcow2"), SIZE, backing=base, backing_format="raw")


def can_be_written(path: Path) -> bool:
    """Whether another program gets the file for writing."""
    words = ["qemu-io", "-f", "raw", "-c", "read 0 512", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=qemu_img.TIMEOUT_S, check=False)
    assert done.returncode == 0 or "Is another process using" in done.stderr
    return done.returncode == 0


async def can_be_read(path: Path) -> bool:
    """Whether another one that wants nobody to write meanwhile gets the file for reading."""
    other = NodeGraph()
    try:
        await other.open_image(str(path), "raw", read_only=True)
    except RequestError as error:
        assert LOCK.search(error.message)
        return False
    finally:
        await other.close()
    return True


def _is_locked(path: Path) -> bool:
    inode = path.stat().st_ino
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return any(words[1] == "OFDLCK" and words[5].endswith(f":{inode}") for words in lines)


async def refused_export(client: QmpClient, node: str, *, writable: bool) -> str:
    arguments = {"type": "nbd", "id": "refused", "node_name": node, "writable": writable}
    return (await refusal(client, "block-export-add", **arguments))[1]


async def unexport(client: QmpClient, node: str) -> None:
    await client.command("block-export-del", id=f"export-{node}", mode="hard")
    await client.event("BLOCK_EXPORT_DELETED", id=f"export-{node}")


@pytest.mark.parametrize("order", [("r", "over"), ("over", "r")])
async def test_the_base_of_an_overlay_may_be_a_writable_node_and_is_not_written(
    base: Path, order: tuple[str, str]
) -> None:
    nodes = {"r": raw("r", base), "over": qcow2("over", overlay_of(base))}
    async with running(base.parent) as daemon:
        client = await daemon.qmp()
        await add(client, *(nodes[name] for name in order))
        await export(client, "over")
        guest = await daemon.guest("over")
        text = await refused_export(client, "r", writable=True)
        assert text.startswith(f"Could not open '{base}': {WRITE_LOCK}: the file is in use by node '#block")
        found = await refusal(client, "block_resize", node_name="r", size=2 * SIZE)
        assert WRITE_LOCK in found[1]
        await export(client, "r", writable=False)
        await guest.write(0, b"guest")
        await unexport(client, "r")
        await stream(client, "j", "over")
        assert "error" not in await finished(client, "j")
        # Nobody needs it any more.
        await export(client, "r")
        await (await daemon.guest("r")).write(0, b"base")
        assert await guest.read(0, 5) == b"guest"


async def test_what_is_written_does_not_become_a_base_under_another_name(base: Path) -> None:
    overlay = overlay_of(base)
    async with running(base.parent) as daemon:
        client = await daemon.qmp()
        await add(client, raw("r", base))
        await export(client, "r")
        found = await refusal(client, "blockdev-add", **qcow2("over", overlay))
        assert f"{WRITE_LOCK}: the file is in use by node '#block" in found[1]
        await unexport(client, "r")
        await add(client, qcow2("over", overlay))


async def test_a_format_has_its_file_as_long_as_it_is_there(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "disk.qcow2", SIZE)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, file(path, node_name="f"), qcow2("q", path), file(path, node_name="g"))
        for below in ("f", "g"):
            found = await refusal(client, "blockdev-add", **qcow2("second", below))
            assert WRITE_LOCK in found[1]
            for writable in (False, True):
                assert WRITE_LOCK in await refused_export(client, below, writable=writable)
        await client.command("blockdev-del", {"node-name": "q"})
        assert not _is_locked(path)
        await add(client, qcow2("second", "f"))
        assert _is_locked(path)


async def test_two_daemons_have_a_file_and_one_writes_it(base: Path, start_daemon: StartDaemon) -> None:
    node = f"driver=raw,node-name=r,file.driver=file,file.filename={base}"
    one, two = clients = [await (await start_daemon("--blockdev", node)).qmp() for _ in range(2)]
    assert not _is_locked(base)
    await export(one, "r")
    for writable in (False, True):
        text = await refused_export(two, "r", writable=writable)
        assert text.endswith(f"lock. Is another process using the image [{base}]?")
    await unexport(one, "r")
    for client in clients:
        await export(client, "r", writable=False)
    assert _is_locked(base)
    await unexport(one, "r")
    await unexport(two, "r")
    await export(two, "r")
    assert WRITE_LOCK in await refused_export(one, "r", writable=True)


@pytest.mark.parametrize("is_restored", [False, True])
async def test_what_is_not_used_after_the_start_is_not_locked(
    base: Path, tmp_path: Path, is_restored: bool
) -> None:
    options = ("--state-dir", tmp_path / "state")
    node = ("--blockdev", f"driver=file,node-name=f,filename={base}")
    async with running(tmp_path, *options, *node):
        assert not _is_locked(base)
    if is_restored:
        async with running(tmp_path, *options) as daemon:
            assert "f" in daemon.services.graph.nodes
            assert not _is_locked(base)


@pytest.mark.parametrize("holder", ["qemu-io", "a second blockd"])
async def test_commands_that_write_a_file_are_refused_while_another_program_has_it(
    base: Path, holder: str
) -> None:
    other = base.with_name("other.raw")
    other.write_bytes(b"o" * SIZE)
    async with running(base.parent) as daemon:
        client = await daemon.qmp()
        await add(client, file(base, node_name="f"), raw("r", "f"), raw("o", file(other, node_name="g")))
        await export(client, "o")
        guest = await daemon.guest("o")
        with HOLDERS[holder](base, "raw", False):
            text = await refused_export(client, "r", writable=True)
            assert f"Is another process using the image [{base}]?" in text
            for command, arguments in (
                ("block_resize", {"node_name": "r", "size": 2 * SIZE}),
                ("blockdev-reopen", {"options": [raw("o", "f")]}),
                ("blockdev-add", qcow2("q", "f")),
            ):
                assert LOCK.search((await refusal(client, command, **arguments))[1])
            options = {"driver": "qcow2", "file": "f", "size": SIZE}
            await client.command("blockdev-create", {"job-id": "c", "options": options})
            await client.event("JOB_STATUS_CHANGE", id="c", status="concluded")
            [job] = await client.command("query-jobs")
            assert LOCK.search(job["error"])
        assert base.read_bytes() == b"b" * SIZE
        assert await guest.read(0, 1) == b"o"
        await client.command("block_resize", {"node-name": "r", "size": 2 * SIZE})
        assert can_be_written(base)
        await reopen(client, raw("o", "g"))


async def test_locks_move_with_an_image_that_goes_on_in_another_file(base: Path) -> None:
    other = base.with_name("other.raw")
    other.write_bytes(b"o" * SIZE)
    async with running(base.parent) as daemon:
        client = await daemon.qmp()
        await add(client, file(base, node_name="f"), file(other, node_name="g"), raw("r", "f"))
        await export(client, "r")
        assert (can_be_written(base), can_be_written(other)) == (False, True)
        await reopen(client, raw("r", "g"))
        assert (can_be_written(base), can_be_written(other)) == (True, False)


async def test_an_image_that_becomes_a_backing_is_kept_from_writers(base: Path) -> None:
    """Nobody uses either: it is the link that counts."""
    overlay = overlay_of(base)
    async with running(base.parent) as daemon:
        client = await daemon.qmp()
        await add(client, file(base, node_name="f"), raw("r", "f"), qcow2("over", overlay, backing=None))
        assert can_be_written(base)
        await client.command("blockdev-snapshot", node="r", overlay="over")
        assert not can_be_written(base)


async def test_an_image_does_not_become_a_backing_that_another_program_writes(base: Path) -> None:
    overlay = overlay_of(base)
    async with running(base.parent) as daemon:
        client = await daemon.qmp()
        await add(client, file(base, node_name="f"), raw("r", "f"), qcow2("over", overlay, backing=None))
        with HOLDERS["a second blockd"](base, "raw", False):
            _, text = await refusal(client, "blockdev-snapshot", node="r", overlay="over")
            assert text.startswith(f"Could not open '{base}': Failed to get shared \"write\" lock.")
        assert daemon.services.graph["over"].backing is None
        assert not daemon.services.graph["r"].read_only


async def test_a_node_that_nobody_uses_becomes_writable_again_beside_one_that_is_read(base: Path) -> None:
    """It is told so, or a snapshot of it is undone, as another one of the transaction cannot be taken."""
    one, other = overlay_of(base), overlay_of(base, "other")
    async with running(base.parent) as daemon:
        client = await daemon.qmp()
        await add(client, raw("r", base), raw("read", base), qcow2("over", one, backing="read"))
        await reopen(client, raw("r", base, read_only=True))
        await reopen(client, raw("r", base))
        await add(client, qcow2("s", other, backing=None))
        snapshots = [
            {"type": "blockdev-snapshot", "data": {"node": node, "overlay": "s"}} for node in ("r", "over")
        ]
        _, text = await refusal(client, "transaction", actions=snapshots)
        assert text == "The overlay is already in use"
        assert not daemon.services.graph["r"].read_only
        assert WRITE_LOCK in await refused_export(client, "r", writable=True)
        await client.command("blockdev-del", {"node-name": "over"})
        await client.command("blockdev-del", {"node-name": "read"})
        await export(client, "r")


async def test_an_image_is_let_go_of_only_when_a_snapshot_of_it_cannot_be_undone_any_more(base: Path) -> None:
    overlay = overlay_of(base)
    async with running(base.parent) as daemon:
        client, devices = await daemon.qmp(), daemon.services.devices
        await add(client, raw("r", base), qcow2("over", overlay, backing=None))
        await export(client, "r")
        may_be_read: list[bool] = []

        async def fail() -> None:
            may_be_read.append(await can_be_read(base))
            raise StorageError("the journal cannot be written")

        devices.record, record = fail, devices.record
        await refusal(client, "blockdev-snapshot", node="r", overlay="over")
        assert may_be_read == [False]
        assert not await can_be_read(base)
        devices.record = record
        await client.command("blockdev-snapshot", node="r", overlay="over")
        assert await can_be_read(base)


async def test_recording_another_name_for_a_backing_gives_the_lock_back(base: Path) -> None:
    """The image is a backing itself, and written for that."""
    middle, top = overlay_of(base, "middle"), overlay_of(base, "top")
    async with running(base.parent) as daemon:
        client = await daemon.qmp()
        await add(client, raw("b", base), qcow2("m", middle, backing="b"), qcow2("t", top, backing=None))
        await client.command("blockdev-snapshot", node="m", overlay="t")
        await stream(client, "j", "m", base_node="b", backing_file="./base.raw")
        await finished(client, "j")
        assert qemu_img.info(middle)["backing-filename"] == "./base.raw"
        check_locks(daemon)
        assert await can_be_read(middle)


async def test_a_file_that_cannot_be_locked_keeps_no_other_one_locked(base: Path) -> None:
    """However it came to be used without having been locked for that."""
    other = base.with_name("other.raw")
    other.write_bytes(bytes(SIZE))
    async with running(base.parent) as daemon:
        client, graph = await daemon.qmp(), daemon.services.graph
        await add(client, file(base, node_name="f"), file(other, node_name="g"))
        with HOLDERS["a second blockd"](base, "raw", False):
            graph.permissions.claim(Claim(graph["f"], WRITE))
            await export(client, "g")
            await unexport(client, "g")
            assert can_be_written(other)


async def test_what_another_program_has_made_of_a_file_is_known_when_it_is_used(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "disk.qcow2", SIZE)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, file(path, node_name="f"))
        qemu_img.write(path, "write -P 1 0 1M")
        await add(client, qcow2("q", "f"))
        assert await daemon.services.graph["q"].read(0, SIZE) == b"\1" * SIZE
    qemu_img.assert_sound(path)


async def test_two_views_of_a_file_may_be_there_from_the_start(base: Path, start_daemon: StartDaemon) -> None:
    view = f"driver=raw,node-name=r,file.driver=file,file.filename={base}"
    daemon = await start_daemon("--blockdev", view, "--device", f"vda={overlay_of(base)}")
    async with await daemon.qmp() as client:
        assert WRITE_LOCK in await refused_export(client, "r", writable=True)


async def test_what_was_accepted_is_accepted_again_after_a_restart(base: Path) -> None:
    state = ("--state-dir", base.with_name("state"))
    async with running(base.parent, *state) as daemon:
        client = await daemon.qmp()
        await add(client, raw("r", base), qcow2("over", overlay_of(base)), raw("last", base))
        await export(client, "over")
    async with running(base.parent, *state) as daemon:
        client = await daemon.qmp()
        assert await client.command("query-left-out") == []
        assert await (await daemon.guest("over")).read(0, 1) == b"b"
        assert WRITE_LOCK in await refused_export(client, "last", writable=True)


# -- at random --------------------------------------------------------------------------------------


class Client:
    """Sends commands at random to nodes of a few files; what is refused must have changed nothing."""

    def __init__(self, daemon: Running, client: QmpClient, folder: Path, rng: random.Random) -> None:
        self._daemon, self._client, self._rng = daemon, client, rng
        names = {"raw": "base.raw", "qcow2": "over.qcow2", "other": "other.raw"}
        self._paths = {kind: folder / name for kind, name in names.items()}
        self._number = 0

    async def step(self) -> None:
        steps = [self._add, self._add, self._delete, self._export, self._export, self._unexport]
        steps += [self._resize, self._reopen, self._snapshot, self._stream]
        try:
            await self._rng.choice(steps)()
        except QmpError as error:
            assert "nternal error" not in error.description

    def _name(self) -> str:
        names = [*self._daemon.services.graph.nodes, "none"]
        return str(self._rng.choice(names))

    async def _add(self) -> None:
        self._number += 1
        kind, name, read_only = self._rng.choice([*self._paths, "file"]), f"n{self._number}", self._flip()
        if kind == "file":
            node = file(self._rng.choice([*self._paths.values()]), node_name=name)
        else:
            below = self._paths[kind] if self._flip() else self._name()
            node = raw(name, below) if kind != "qcow2" else qcow2(name, below)
            if kind == "qcow2" and self._flip():
                node["backing"] = self._rng.choice([None, self._name()])
        await add(self._client, node | {"read-only": read_only})

    def _flip(self) -> bool:
        return self._rng.random() < 0.5

    async def _delete(self) -> None:
        await self._client.command("blockdev-del", {"node-name": self._name()})

    async def _export(self) -> None:
        await export(self._client, self._name(), writable=self._flip())

    async def _unexport(self) -> None:
        await self._client.command("block-export-del", id=f"export-{self._name()}", mode="hard")

    async def _resize(self) -> None:
        await self._client.command("block_resize", {"node-name": self._name(), "size": SIZE})

    async def _reopen(self) -> None:
        graph = self._daemon.services.graph
        node = graph.nodes.get(self._name())
        if node is None:
            return
        options = {**graph.options(node), "node-name": node.node_name, "read-only": self._flip()}
        for role in node.children():
            options[role] = self._name()
        await reopen(self._client, options)

    async def _snapshot(self) -> None:
        await self._client.command("blockdev-snapshot", node=self._name(), overlay=self._name())

    async def _stream(self) -> None:
        await stream(self._client, f"j{self._number}", self._name())
        await finished(self._client, f"j{self._number}")


def check_locks(daemon: Running) -> None:
    """Each file is locked as it is used, and nobody writes what somebody else uses."""
    nodes = daemon.services.graph.nodes
    files = [node for node in nodes.values() if isinstance(node, FileNode)]
    for node in files:
        wanted = nodes.permissions.uses.wanted(node)
        is_written = writes(wanted) or RESIZE in wanted.need
        needed = Use.WRITING if is_written else Use.NONE if wanted == NOTHING else Use.READING
        is_right = use_of(node) == needed if isinstance(node, UsedFile) else use_of(node) >= needed
        assert is_right, (node.node_name, use_of(node), needed)
    for one, other in combinations(files, 2):
        is_same = one.identity() == other.identity()
        assert not (is_same and use_of(one).meets(use_of(other))), (one.node_name, other.node_name)


@pytest.mark.parametrize("seed", range(6))
async def test_files_are_locked_as_they_are_used_whatever_is_done(base: Path, seed: int) -> None:
    overlay_of(base)
    base.with_name("other.raw").write_bytes(b"o" * SIZE)
    async with running(base.parent) as daemon:
        client = Client(daemon, await daemon.qmp(), base.parent, random.Random(seed))
        for _ in range(150):
            await client.step()
            check_locks(daemon)
