"""A restart where not all is as it was: what cannot be brought back is left out, kept, and tried again."""

import json
from pathlib import Path
from typing import Any

import pytest

from blockd.cli.options import parse_command_line
from blockd.daemon.state import State, parse_state
from blockd.daemon.state_dir import StateDir
from blockd.errors import BlockdError, RequestError
from blockd.units import KIB
from tests import qemu_img
from tests.chains import Chain, make
from tests.control.running import Running, running

CLUSTER = 64 * KIB
LAYERS = ["ABCDEFGH", "-X--0---"]
SIZE = 8 * CLUSTER
STRICT = ("--state-restore", "strict")


class Place:
    """Two disks of a daemon with a state directory: `vda` has a base that can be taken away."""

    def __init__(self, folder: Path, chain: Chain, other: Chain) -> None:
        self.folder = folder
        self.chain = chain
        self.other = other

    def run(self, *more: str) -> Any:
        devices = ["--device", f"vda={self.chain.active}", "--device", f"vdb={self.other.active}"]
        return running(self.folder, "--state-dir", self.folder / "s", *devices, *more)

    def take_away(self) -> None:
        self.chain.paths[0].rename(self.folder / "away")

    def bring_back(self) -> None:
        (self.folder / "away").rename(self.chain.paths[0])

    def journal(self) -> State:
        directory = StateDir.open(str(self.folder / "s"))
        try:
            members = directory.load()
        finally:
            directory.close()
        assert members is not None
        return parse_state(members, "s")


@pytest.fixture
async def place(tmp_path: Path) -> Place:
    (tmp_path / "other").mkdir()
    return Place(tmp_path, await make(tmp_path, LAYERS), await make(tmp_path / "other", LAYERS))


async def left_out(daemon: Running) -> list[tuple[str, str]]:
    found = await (await daemon.qmp()).command("query-left-out")
    return [(thing["type"], thing["name"]) for thing in found]


async def names(daemon: Running) -> tuple[list[str], list[str]]:
    client = await daemon.qmp()
    devices = sorted(block["device"] for block in await client.command("query-block"))
    return devices, sorted(export["id"] for export in await client.command("query-block-exports"))


async def begin(place: Place) -> None:
    """A paused stream on vda, some data on both."""
    async with place.run() as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda", speed=1)
        await client.command("job-pause", id="vda")
        for name in ("vda", "vdb"):
            guest = await daemon.guest(name)
            await guest.write(0, name.encode())
            await guest.flush()
    assert [(job.id, job.is_kept) for job in daemon.stopped] == [("vda", True)]


async def test_disk_whose_file_is_missing_does_not_keep_the_others_from_being_served(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    await begin(place)
    place.take_away()
    for _ in range(2):  # whatever this run writes, the next one knows as much
        caplog.clear()
        async with place.run() as daemon:
            assert await names(daemon) == (["vdb"], ["vdb"])
            guest = await daemon.guest("vdb")
            assert await guest.read(0, SIZE) == b"vdb" + place.other.content[3:]
            found = await left_out(daemon)
            assert {("device", "vda"), ("export", "vda"), ("job", "vda")} <= set(found)
            assert {kind for kind, _ in found} == {"device", "export", "job", "node"}
            client = await daemon.qmp()
            assert await client.command("query-jobs") == []
            # Another journal, several times.
            await client.command("object-add", {"qom-type": "throttle-group", "id": "t"})
            await client.command("object-del", id="t")
        assert "layer0.qcow2': No such file or directory" in caplog.text
        [error] = [record.message for record in caplog.records if record.levelname == "ERROR"]
        assert error.startswith("device 'vda', export 'vda', job 'vda', node '#block")
        assert " are not restored, and stay in the journal: Could not open '" in error
        assert "was removed while blockd ran" not in caplog.text
    place.bring_back()
    async with place.run() as daemon:
        assert await left_out(daemon) == []
        assert await names(daemon) == (["vda", "vdb"], ["vda", "vdb"])
        assert await (await daemon.guest("vda")).read(0, SIZE) == b"vda" + place.chain.content[3:]
        client = await daemon.qmp()
        [job] = await client.command("query-block-jobs")
        assert (job["device"], job["paused"], job["speed"]) == ("vda", True, 1)
        await client.command("block-job-set-speed", device="vda", speed=0)
        await client.command("job-resume", id="vda")
        await client.event("JOB_STATUS_CHANGE", status="null")
    assert place.journal().left_out is None


async def test_strict_is_strict(place: Place) -> None:
    await begin(place)
    before = place.journal()
    place.take_away()
    with pytest.raises(BaseExceptionGroup) as caught:
        async with place.run(*STRICT):
            pass
    [error] = caught.value.exceptions
    assert isinstance(error, RequestError)
    assert error.message.startswith(f"--state-dir {place.folder / 's'}: node '#block")
    assert place.journal() == before
    place.bring_back()
    async with place.run(*STRICT) as daemon:
        assert await names(daemon) == (["vda", "vdb"], ["vda", "vdb"])


async def test_what_is_given_up_does_not_come_back(place: Place) -> None:
    await begin(place)
    place.take_away()
    async with place.run() as daemon:
        client = await daemon.qmp()
        found = await client.command("query-left-out")
        await client.command("job-dismiss", id="vda")
        await client.command("block-export-del", id="vda")
        [node] = {thing["node-name"] for thing in found if thing["type"] == "device"}
        await client.command("blockdev-del", {"node-name": node})
        assert all(kind == "node" for kind, _ in await left_out(daemon))
    place.bring_back()
    async with place.run() as daemon:
        assert await names(daemon) == (["vdb"], ["vdb"])


async def test_a_node_that_is_added_under_its_old_name_takes_the_place_of_the_one_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chain = await make(tmp_path, LAYERS[:1])
    file = {"driver": "file", "node-name": "f", "filename": str(chain.active)}
    words = ["--blockdev", json.dumps(file), "--blockdev", "qcow2,node-name=q,file=f"]
    words += ["--device", "id=vda,node-name=q", "--export", "nbd,id=e,node-name=q,name=vda,writable=on"]
    state = ("--state-dir", tmp_path / "s")
    async with running(tmp_path, *state, *words):
        pass
    moved = chain.active.rename(tmp_path / "moved.qcow2")
    async with running(tmp_path, *state, *words) as daemon:
        assert set(await left_out(daemon)) == {
            ("node", "f"),
            ("node", "q"),
            ("device", "vda"),
            ("export", "e"),
        }
        client = await daemon.qmp()
        await client.command("blockdev-add", {**file, "filename": str(moved)})
        assert set(await left_out(daemon)) == {("node", "q"), ("device", "vda"), ("export", "e")}
        assert "node 'f' could not be restored, and is forgotten now" in caplog.text
    async with running(tmp_path, *state, *words) as daemon:
        assert await left_out(daemon) == []
        assert await (await daemon.guest("vda")).read(0, SIZE) == chain.content


async def test_a_mistake_of_ours_in_one_thing_leaves_out_that_thing(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await begin(place)
    with monkeypatch.context() as patched:
        patched.setattr("blockd.daemon.restoring._restore_device", fail_for_vda)
        async with place.run() as daemon:
            assert [thing for thing in await left_out(daemon) if thing[0] == "device"] == [("device", "vda")]
            assert (await names(daemon))[0] == ["vdb"]
    assert "never mind" in caplog.text
    async with place.run() as daemon:
        assert await left_out(daemon) == []
        assert (await names(daemon))[0] == ["vda", "vdb"]


async def test_new_options_that_name_what_is_left_out_are_left_out_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chain = await make(tmp_path, LAYERS[:1])
    (tmp_path / "other").mkdir()
    other = await make(tmp_path / "other", LAYERS)
    state = ("--state-dir", tmp_path / "s")
    group = '{"qom-type": "throttle-group", "id": "t"}'
    words = ["--object", group, "--blockdev", f"file,node-name=f,filename={chain.active}"]
    words += ["--blockdev", "qcow2,node-name=q,file=f"]
    async with running(tmp_path, *state, *words):
        pass
    words += ["--blockdev", "throttle,node-name=limit,throttle-group=t,file=q"]
    words += ["--device", "id=new,node-name=limit", "--device", f"vdb={other.active}"]
    words += ["--export", "nbd,id=e,node-name=q,name=q"]
    away = chain.active.rename(tmp_path / "away")
    for _ in range(2):
        caplog.clear()
        async with running(tmp_path, *state, *words) as daemon:
            new = {("node", "limit"), ("device", "new"), ("export", "e")}
            assert set(await left_out(daemon)) == {("node", "f"), ("node", "q"), *new}
            assert await names(daemon) == (["vdb"], ["vdb"])
        assert "--device id=new,node-name=limit: left out: the node 'limit' is not restored: " in caplog.text
        assert "--export nbd,id=e,node-name=q,name=q: left out: the node 'q' is not restored: " in caplog.text
    away.rename(chain.active)
    async with running(tmp_path, *state, *words) as daemon:
        assert await left_out(daemon) == []
        assert await names(daemon) == (["new", "vdb"], ["e", "vdb"])


async def fail_for_vda(services: Any, device: Any) -> None:
    if device.name == "vda":
        raise AssertionError("never mind")
    services.devices.add(device.name, services.graph[device.node])


async def test_group_of_jobs_is_left_out_together(place: Place) -> None:
    def stream(name: str) -> dict[str, Any]:
        return {"type": "x-block-stream", "data": {"device": name, "speed": 1}}

    async with place.run() as daemon:
        client = await daemon.qmp()
        properties = {"completion-mode": "grouped"}
        actions = [stream("vda"), stream("vdb")]
        await client.command("transaction", actions=actions, properties=properties)
    place.take_away()
    async with place.run() as daemon:
        jobs = [thing for thing in await left_out(daemon) if thing[0] == "job"]
        assert jobs == [("job", "vda"), ("job", "vdb")]
        assert (await names(daemon))[0] == ["vdb"]
    place.bring_back()
    async with place.run() as daemon:
        client = await daemon.qmp()
        for name in ("vda", "vdb"):
            await client.command("block-job-set-speed", device=name, speed=0)
        for name in ("vda", "vdb"):
            await client.event("JOB_STATUS_CHANGE", id=name, status="null")
        assert client.event_names().count("BLOCK_JOB_COMPLETED") == 2
    for chain in (place.chain, place.other):
        assert qemu_img.content(chain.active) == chain.content


def test_option_says_strict_or_partial(tmp_path: Path) -> None:
    words = ["--state-dir", str(tmp_path), "--state-restore"]
    assert parse_command_line([*words, "strict"]).config.is_restore_strict
    assert not parse_command_line([*words, "partial"]).config.is_restore_strict
    with pytest.raises(BlockdError, match="expected partial or strict"):
        parse_command_line([*words, "lenient"])
    with pytest.raises(BlockdError, match="--state-restore: nothing to restore without --state-dir DIR"):
        parse_command_line(["--device", "a=b", *words[2:], "partial"])
