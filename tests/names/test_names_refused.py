"""Names that cannot be kept are refused when they are given, by every command alike; nothing is changed."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockd.cli.image.convert import Source, convert_image
from blockd.cli.image.create import NewImage, create_image
from blockd.cli.image.opening import opened_file, opened_image
from blockd.cli.options import parse_command_line
from blockd.daemon import Daemon
from blockd.errors import BlockdError
from tests import qemu_img
from tests.control.running import refusal, running
from tests.hostile_names import put_name, stand_in
from tests.qmp_client import QmpClient

SIZE = 64 * 1024

CONTROL, NUL, LONG, PROTOCOL = "a\x1b[31mred\n", "base.raw\0/etc/passwd", "x" * 1024, "nbd:localhost:1"
BAD_NAMES = {
    CONTROL: "has control characters in it",
    NUL: "has a NUL character in it|has control characters in it",
    LONG: "name is 1024 bytes long, more than 1023",
    PROTOCOL: r"Unknown protocol 'nbd' \(a file of that name is './NAME'\)",
    "file:": "is empty|names no file",
    "sub/": "names no file",
    "..": "names no file",
}
# Names of files to open or to make may be as long as the kernel allows; it also refuses `..`.
BAD_FILES = {name: text for name, text in BAD_NAMES.items() if name not in (LONG, "sub/", "..")}
# As an option of a node, a name is a name: it has no protocol.
BAD_NODES = {name: text for name, text in BAD_FILES.items() if name in (CONTROL, NUL)}


async def created(client: QmpClient, options: dict[str, object]) -> tuple[str, str]:
    """The error that a job of blockdev-create ends with."""
    await client.command("blockdev-create", {"job-id": "c", "options": options})
    await client.event("JOB_STATUS_CHANGE", id="c", status="concluded")
    (job,) = await client.command("query-jobs")
    await client.command("job-dismiss", id="c")
    return "GenericError", job["error"]


Attempt = Callable[[QmpClient, str], Awaitable[tuple[str, str]]]

_IN_FILE = {"driver": "file", "filename": "empty"}
RECORDING: dict[str, Attempt] = {
    "change-backing-file": lambda client, name: refusal(
        client, "change-backing-file", device="top", image_node_name="top", backing_file=name
    ),
    "block-stream": lambda client, name: refusal(
        client, "block-stream", job_id="j", device="top", base_node="base", backing_file=name
    ),
    **{
        f"blockdev-create {driver}": lambda client, name, driver=driver: created(  # type: ignore[misc]
            client,
            {"driver": driver, "file": _IN_FILE, "size": SIZE, "backing-file": name, "backing-fmt": "raw"},
        )
        for driver in ("qcow2", "qed", "add-cow")
    },
    "blockdev-create, image": lambda client, name: created(
        client, {"driver": "add-cow", "file": _IN_FILE, "size": SIZE, "image-file": name}
    ),
}
NAMING: dict[str, Attempt] = {
    "block_switch": lambda client, name: refusal(client, "block_switch", device="vda", filename=name),
    "blockdev-snapshot-sync": lambda client, name: refusal(
        client, "blockdev-snapshot-sync", device="vda", snapshot_file=name
    ),
    "existing": lambda client, name: refusal(
        client, "blockdev-snapshot-sync", device="vda", snapshot_file=name, mode="existing"
    ),
}
NODES: dict[str, Attempt] = {
    "blockdev-add": lambda client, name: refusal(
        client, "blockdev-add", driver="file", node_name="n", filename=name
    ),
    "blockdev-create": lambda client, name: created(
        client, {"driver": "file", "filename": name, "size": SIZE}
    ),
    "blockdev-reopen": lambda client, name: refusal(
        client, "blockdev-reopen", options=[{"driver": "file", "node-name": "f", "filename": name}]
    ),
}


async def test_by_every_qmp_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base.raw", "other.raw"):
        Path(name).write_bytes(bytes(SIZE))
    for name in ("disk.qcow2", "mid.qcow2", "top.qcow2"):
        backing = {"disk.qcow2": "other.raw", "mid.qcow2": "base.raw", "top.qcow2": "mid.qcow2"}[name]
        qemu_img.create(tmp_path / name, SIZE, backing=Path(backing), backing_format=Path(backing).suffix[1:])
    Path("empty").touch()
    Path("f").touch()
    async with running(tmp_path, "--device", "vda=disk.qcow2", "--state-dir", "st") as daemon:
        client = await daemon.qmp()
        base = {"driver": "raw", "node-name": "base", "file": {"driver": "file", "filename": "base.raw"}}
        mid = {"driver": "qcow2", "file": {"driver": "file", "filename": "mid.qcow2"}, "backing": base}
        file = {"driver": "file", "filename": "top.qcow2"}
        await client.command(
            "blockdev-add", {"driver": "qcow2", "node-name": "top", "file": file, "backing": mid}
        )
        await client.command("blockdev-add", {"driver": "file", "node-name": "f", "filename": "f"})
        before = {path: path.read_bytes() for path in tmp_path.glob("*") if path.is_file()}
        for attempts, names in ((RECORDING, BAD_NAMES), (NAMING, BAD_FILES), (NODES, BAD_NODES)):
            for command, attempt in attempts.items():
                for name, text in names.items():
                    error = await attempt(client, name)
                    expected = "Cannot change the option" if command == "blockdev-reopen" else text
                    assert matches(error[1], expected), (command, name, error)
                    assert error[1].isprintable()
        assert {path: path.read_bytes() for path in tmp_path.glob("*") if path.is_file()} == before
    async with running(tmp_path, "--state-dir", "st") as daemon:
        assert {"top", "f"} < set(daemon.services.graph.nodes)


def matches(error: str, expected: str) -> bool:
    return any(part.replace("\\", "") in error for part in expected.split("|"))


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("image_format", ["qcow2", "qed", "add-cow"])
async def test_by_create(tmp_path: Path, image_format: str, name: str) -> None:
    path = tmp_path / "new"
    with pytest.raises(BlockdError, match=BAD_NAMES[name]):
        await create_image(str(path), NewImage(image_format, SIZE, name, "raw"))
    if image_format == "add-cow":
        with pytest.raises(BlockdError, match=BAD_NAMES[name]):
            await create_image(str(path), NewImage("add-cow", SIZE, options={"image_file": name}))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", BAD_FILES)
async def test_by_every_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.raw").write_bytes(bytes(SIZE))
    source = Source("base.raw", "raw", [])

    async def describe() -> None:
        async with opened_image(name, "raw", []):
            """Not reached."""

    async def check() -> None:
        async with opened_file(name, "qcow2", read_only=True):
            """Not reached."""

    async def serve() -> None:
        config = parse_command_line(["--device", f"vda={name}"]).config
        await Daemon().run(config, lambda _served: None)

    for attempt in (
        create_image(name, NewImage("qcow2", SIZE)),
        convert_image(source, name, NewImage("qcow2"), lambda _status: None),
        convert_image(Source(name, "raw", []), "new", NewImage("qcow2"), lambda _status: None),
        describe(),
        check(),
        serve(),
    ):
        with pytest.raises(BlockdError, match=BAD_FILES[name]):
            await attempt
    assert [path.name for path in tmp_path.iterdir()] == ["base.raw"]


@pytest.mark.parametrize("name", ["\udcff\udcfe.raw", "\u202e.raw", "./file:x", "é " * 80])
async def test_journal_keeps_what_images_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also names that are not UTF-8, which no client can give."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / name
    base.write_bytes(b"base" * (SIZE // 4))
    for top in ("top.qcow2", "other.qcow2"):
        qemu_img.create(tmp_path / top, SIZE, backing=Path(stand_in(name)), backing_format="raw")
        put_name(tmp_path / top, name)
    async with running(tmp_path, "--device", "vda=top.qcow2", "--state-dir", "st") as daemon:
        client = await daemon.qmp()
        file = {"driver": "file", "filename": "other.qcow2"}
        await client.command(
            "blockdev-add", {"driver": "qcow2", "node-name": "n", "file": file, "backing": None}
        )
        (told,) = await client.command("query-block")
        assert told["inserted"]["backing_file_depth"] == 1
    async with running(tmp_path, "--state-dir", "st") as daemon:
        guest = await daemon.guest("vda")
        assert await guest.read(0, SIZE) == base.read_bytes()
        assert daemon.services.graph["n"].backing is None
