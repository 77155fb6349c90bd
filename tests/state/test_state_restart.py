"""What a daemon with --state-dir is after a restart: the same, whether it was stopped or killed."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockd.units import KIB, MIB
from tests import qemu_img
from tests.chains import Chain, make
from tests.control.running import refusal
from tests.qmp_client import QmpClient
from tests.state.restarts import Restarts, events_to_the_end

CLUSTER = 64 * KIB
LAYERS = ["ABCDEFGH" * 4, "-X--0---" * 4]
SIZE = 32 * CLUSTER
SLOW = 2 * CLUSTER  # bytes per second: nothing completes while a test looks

End = Callable[[Restarts], Awaitable[object]]


async def killed(daemon: Restarts) -> None:
    await daemon.kill()


async def stopped(daemon: Restarts) -> None:
    assert await daemon.stop() == 0


async def quit_(daemon: Restarts) -> None:
    async with await daemon.qmp() as client:
        await client.command("quit")
    assert await daemon.wait() == 0


slow = pytest.mark.slow
every_end = pytest.mark.parametrize(
    "end", [killed, pytest.param(stopped, marks=slow), pytest.param(quit_, marks=slow)]
)


async def disk(folder: Path) -> tuple[Chain, Restarts]:
    chain = await make(folder, LAYERS)
    return chain, Restarts(folder, "--device", f"vda={chain.active}")


def overlay(chain: Chain, name: str = "copy.qcow2") -> Path:
    return qemu_img.create(chain.active.with_name(name), SIZE, backing=chain.active)


async def jobs(client: QmpClient) -> list[dict[str, object]]:
    found: list[dict[str, object]] = await client.command("query-block-jobs")
    return found


# -- disks and exports -------------------------------------------------------------------------


@every_end
async def test_all_that_was_added_at_run_time_is_there_again(tmp_path: Path, end: End) -> None:
    chain, daemon = await disk(tmp_path)
    other = await make_other(tmp_path)
    client = await daemon.run()
    limits = {"limits": {"iops-total": 5000}}
    await client.command("object-add", {"qom-type": "throttle-group", "id": "t", **limits})
    await client.command("blockdev-add", {"driver": "file", "node-name": "f", "filename": str(other)})
    await client.command("blockdev-add", {"driver": "qcow2", "node-name": "q", "file": "f", "backing": None})
    slow = {"driver": "throttle", "node-name": "slow", "file": "q", "throttle-group": "t"}
    await client.command("blockdev-add", slow)
    export = {"type": "nbd", "id": "e", "node-name": "slow", "name": "other", "description": "d"}
    flags = {"writable": True, "writethrough": True, "allocation-depth": True}
    await client.command("block-export-add", {**export, **flags})
    [record] = [record for record in daemon.journal["exports"] if record["id"] == "e"]
    await client.command("qom-set", path="t", property="limits", value={"iops-total": 7000})
    before = await everything(client)
    await end(daemon)
    daemon.be_alone()
    client = await daemon.run()
    assert await everything(client) == before
    assert record in daemon.journal["exports"]
    assert record["is-writethrough"] and record["tells-depth"]
    limits_now = await client.command("qom-get", path="t", property="limits")
    assert limits_now["iops-total"] == 7000
    assert await daemon.content() == chain.content
    async with await daemon.guest("other") as guest:
        await guest.write(0, b"written")
    assert "e" in {offer["id"] for offer in await client.command("query-block-exports")}
    await client.command("block-export-del", id="e", mode="hard")
    await client.command("blockdev-del", {"node-name": "slow"})
    assert await daemon.stop() == 0
    assert daemon.stderr == ""


async def everything(client: QmpClient) -> list[object]:
    nodes = await client.command("query-named-block-nodes")
    nodes.sort(key=lambda node: str(node["node-name"]))
    return [await client.command("query-block"), await client.command("query-block-exports"), nodes]


async def make_other(folder: Path) -> Path:
    (folder / "other").mkdir()
    return qemu_img.create(folder / "other" / "disk.qcow2", MIB)


@slow
async def test_nbd_server_of_the_run_time_listens_again(tmp_path: Path) -> None:
    chain, daemon = await disk(tmp_path)
    client = await daemon.run()
    await client.command("nbd-server-stop")
    place = {"type": "unix", "data": {"path": str(tmp_path / "elsewhere.sock")}}
    await client.command("nbd-server-start", {"addr": place, "max-connections": 3})
    export = {"type": "nbd", "id": "e", "node-name": daemon.journal["devices"][0]["node"], "name": "vda"}
    await client.command("block-export-add", export)
    await daemon.kill()
    await daemon.start()
    daemon.nbd_path = tmp_path / "elsewhere.sock"
    assert await daemon.content() == chain.content
    assert daemon.journal["nbd-server"]["max-connections"] == 3
    assert await daemon.stop() == 0


@slow
async def test_what_was_removed_is_not_brought_back_and_what_is_new_is_added(tmp_path: Path) -> None:
    chain, daemon = await disk(tmp_path)
    daemon.arguments += ["--blockdev", f"driver=file,node-name=f,filename={await make_other(tmp_path)}"]
    client = await daemon.run()
    await client.command("block-export-del", id="vda", mode="hard")
    await client.command("blockdev-del", {"node-name": "f"})
    await daemon.kill()
    daemon.arguments += [
        "--blockdev",
        f"driver=raw,node-name=r,file.driver=file,file.filename={chain.paths[0]}",
    ]
    daemon.arguments[-1] += ",read-only=on"
    client = await daemon.run()
    assert await client.command("query-block-exports") == []
    names = {node["node-name"] for node in await client.command("query-named-block-nodes")}
    assert "r" in names
    assert "f" not in names
    assert "the node f was removed while blockd ran, and is not brought back" in daemon.stderr
    assert await daemon.stop() == 0
    assert len(daemon.stderr.splitlines()) == 1


async def test_journal_wins_over_another_command_line(tmp_path: Path) -> None:
    chain, daemon = await disk(tmp_path)
    other = await make_other(tmp_path)
    await daemon.start()
    await daemon.kill()
    daemon.arguments = [word.replace(str(chain.active), str(other)) for word in daemon.arguments]
    await daemon.start()
    assert await daemon.content() == chain.content
    assert (
        f"--device vda={other}: the device vda stays as it is in the journal, where it began as: "
        f"--device vda={chain.active}"
    ) in daemon.stderr
    assert await daemon.stop() == 0


@slow
async def test_backing_file_that_was_changed_meanwhile_is_followed(tmp_path: Path) -> None:
    chain, daemon = await disk(tmp_path)
    await daemon.start()
    assert await daemon.stop() == 0
    moved = chain.paths[0].rename(tmp_path / "moved.qcow2")
    qemu_img.qemu("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", moved.name, chain.active)
    await make(tmp_path, LAYERS[:1])  # another file is where the journal would look
    await daemon.start()
    assert await daemon.content() == chain.content
    assert f"'{chain.active}' records the backing file 'moved.qcow2' now" in daemon.stderr
    assert str(moved) in str(daemon.journal["nodes"])
    assert await daemon.stop() == 0


async def test_second_daemon_on_the_directory_is_refused(tmp_path: Path) -> None:
    _, daemon = await disk(tmp_path)
    await daemon.start()
    (tmp_path / "b").mkdir()
    second = Restarts(tmp_path / "b")
    second.arguments = ["--state-dir", str(tmp_path / "state")]
    await second.launch()
    assert await second.wait() == 1
    assert second.stderr == (
        f"blockd: Could not use '{tmp_path}/state' as state directory: another blockd uses it, "
        f"process {daemon.pid}\n"
    )
    assert await daemon.stop() == 0


async def test_bad_journal_is_an_error_and_nothing_is_opened(tmp_path: Path) -> None:
    _, daemon = await disk(tmp_path)
    await daemon.start()
    await daemon.kill()
    journal = tmp_path / "state" / "journal.json"
    journal.write_bytes(journal.read_bytes()[:-100])
    daemon.pidfile.unlink()
    await daemon.launch()
    assert await daemon.wait() == 1
    assert daemon.stderr.startswith(f"blockd: '{journal}' is damaged: bring it back from a backup, or ")
    assert not daemon.pidfile.exists()


async def test_directory_alone_needs_a_journal(tmp_path: Path) -> None:
    daemon = Restarts(tmp_path)
    daemon.be_alone()
    await daemon.launch()
    assert await daemon.wait() == 1
    assert "nothing to serve: there is no journal yet" in daemon.stderr


# -- switches ----------------------------------------------------------------------------------


@every_end
async def test_disk_goes_on_in_the_image_it_was_switched_to(tmp_path: Path, end: End) -> None:
    chain, daemon = await disk(tmp_path)
    client = await daemon.run()
    expected = bytearray(chain.content)
    for number in range(2):
        copy = qemu_img.create(tmp_path / f"copy{number}.qcow2", SIZE, backing=Path(active(daemon)))
        await client.command("block_switch", device="vda", filename=str(copy))
        async with await daemon.guest() as guest:
            await guest.write(number * CLUSTER, b"after the switch")
            await guest.flush()
        expected[number * CLUSTER : number * CLUSTER + 16] = b"after the switch"
    assert qemu_img.content(chain.active) == chain.content
    await end(daemon)
    await daemon.start()
    assert await daemon.content() == expected
    assert active(daemon) == str(tmp_path / "copy1.qcow2")
    assert "the device vda goes on in" in daemon.stderr
    assert await daemon.stop() == 0
    assert qemu_img.content(tmp_path / "copy1.qcow2") == expected


def active(daemon: Restarts) -> str:
    """The file that the journal has as the disk's active image."""
    nodes = {node["options"]["node-name"]: node["options"] for node in daemon.journal["nodes"]}
    return str(nodes[nodes[daemon.journal["devices"][0]["node"]]["file"]]["filename"])


# -- jobs --------------------------------------------------------------------------------------


@every_end
@pytest.mark.parametrize("is_paused", [False, True])
async def test_job_goes_on_under_its_id_with_its_options(tmp_path: Path, end: End, is_paused: bool) -> None:
    chain, daemon = await disk(tmp_path)
    client = await daemon.run()
    options = {"speed": SLOW, "on-error": "stop", "auto-finalize": False, "auto-dismiss": False}
    await client.command("block-stream", {"job-id": "j", "device": "vda", **options})
    if is_paused:
        await client.command("job-pause", id="j")
    async with await daemon.guest() as guest:
        await guest.write(5 * CLUSTER, b"guest")
        await guest.flush()
    await end(daemon)
    client = await daemon.run()
    [job] = await jobs(client)
    assert job["paused"] is is_paused
    kept = {name: job[name] for name in ("device", "speed", "auto-finalize", "auto-dismiss")}
    assert kept == {"device": "j", **{name: options[name] for name in options if name != "on-error"}}
    assert daemon.journal["jobs"][0]["on-error"] == "stop"
    await client.command("block-job-set-speed", device="j", speed=0)
    if is_paused:
        await client.command("job-resume", id="j")
    await client.event("BLOCK_JOB_PENDING")
    await client.command("job-finalize", id="j")
    await client.event("BLOCK_JOB_COMPLETED")
    expected = bytearray(chain.content)
    expected[5 * CLUSTER : 5 * CLUSTER + 5] = b"guest"
    assert await daemon.content() == expected
    chain.paths[0].rename(tmp_path / "away")
    assert qemu_img.content(chain.active) == expected
    assert await daemon.stop() == 0


async def test_what_was_durable_is_not_copied_again(tmp_path: Path) -> None:
    _, daemon = await disk(tmp_path)
    client = await daemon.run()
    stream = {"job-id": "j", "device": "vda", "speed": 64 * CLUSTER, "auto-finalize": False}
    await client.command("block-stream", stream)
    await copied_at_least(client, 4 * CLUSTER)
    await client.command("job-pause", id="j")
    await client.event("JOB_STATUS_CHANGE", status="paused")
    copied = (await client.command("block_stream_status"))[0]["copied"]
    async with await daemon.guest() as guest:
        await guest.flush()
    await daemon.kill()
    client = await daemon.run()
    await client.command("job-resume", id="j")
    await client.event("BLOCK_JOB_PENDING")
    copied_again = (await client.command("block_stream_status"))[0]["copied"]
    assert 4 * CLUSTER <= copied < LACKING
    assert copied + copied_again == LACKING
    await daemon.kill()


# How much of the base the active image lacks: where it has neither data nor zeroes of its own.
LACKING = (SIZE // CLUSTER - 8) * CLUSTER


async def copied_at_least(client: QmpClient, length: int) -> None:
    async with asyncio.timeout(100):
        while (await client.command("block_stream_status"))[0]["copied"] < length:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@slow
async def test_job_whose_work_somebody_else_has_done_is_told_as_done(tmp_path: Path) -> None:
    """The image names the base in another way than the stream would have: the file is the same."""
    chain = await make(tmp_path, ["ABCDEFGH" * 4, "-X--0---" * 4, "--Y-----" * 4])
    daemon = Restarts(tmp_path, "--device", f"vda={chain.active}")
    client = await daemon.run()
    base = next(iter(chain.paths))
    await client.command("block_stream", device="vda", base=str(base), speed=1)
    assert await daemon.stop() == 0
    (tmp_path / "link").symlink_to(base)
    named: list[str | Path] = ["-b", tmp_path / "link", "-F", chain.formats[0]]
    qemu_img.qemu("qemu-img", "rebase", "-f", "qcow2", *named, chain.active)
    client = await daemon.run()
    completed = await client.event("BLOCK_STREAM_COMPLETED")
    assert "error" not in completed, completed
    assert await client.command("query-jobs") == []
    assert await daemon.content() == chain.content
    assert await daemon.stop() == 0


@slow
async def test_concluded_job_stays_until_it_is_dismissed_and_is_told_once(tmp_path: Path) -> None:
    _, daemon = await disk(tmp_path)
    client = await daemon.run()
    await client.command("block-stream", {"job-id": "j", "device": "vda", "auto-dismiss": False})
    await client.event("JOB_STATUS_CHANGE", status="concluded")
    before = await client.command("query-jobs")
    for end in (killed, stopped):
        await end(daemon)
        client = await daemon.run()
        assert await client.command("query-jobs") == before
        assert client.events == []
    await client.command("job-dismiss", id="j")
    await daemon.kill()
    client = await daemon.run()
    assert await client.command("query-jobs") == []
    assert client.events == []
    assert await daemon.stop() == 0


@slow
async def test_failed_and_cancelled_jobs_stay_as_they_ended(tmp_path: Path) -> None:
    _, daemon = await disk(tmp_path)
    client = await daemon.run()
    stream = {"device": "vda", "auto-dismiss": False, "speed": SLOW}
    await client.command("block-stream", {"job-id": "cancelled", **stream})
    await client.command("block-job-cancel", device="cancelled")
    await client.event("JOB_STATUS_CHANGE", status="concluded")
    before = await jobs(client)
    await daemon.kill()
    client = await daemon.run()
    assert await jobs(client) == before
    assert before[0]["error"] == "Operation canceled"
    # The image is free for another stream.
    await client.command("block_stream", device="vda")
    await client.event("BLOCK_STREAM_COMPLETED")
    assert await daemon.stop() == 0


@slow
async def test_grouped_streams_are_grouped_again(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    chain, daemon = await disk(tmp_path)
    second = await make(tmp_path / "b", LAYERS)
    daemon.arguments += ["--device", f"vdb={second.active}"]
    client = await daemon.run()
    actions = [
        {"type": "x-block-stream", "data": {"job-id": name, "device": name, "speed": SLOW}}
        for name in ("vda", "vdb")
    ]
    await client.command("transaction", {"actions": actions, "properties": {"completion-mode": "grouped"}})
    await daemon.kill()
    client = await daemon.run()
    await client.command("block-job-set-speed", device="vda", speed=0)
    await client.event("JOB_STATUS_CHANGE", id="vda", status="waiting")
    await client.command("block-job-cancel", device="vdb")
    await client.event("BLOCK_JOB_CANCELLED", device="vda")
    await client.event("BLOCK_JOB_CANCELLED", device="vdb")
    assert await daemon.content() == chain.content
    assert await daemon.stop() == 0


@slow
async def test_completion_that_nobody_heard_is_told_to_the_first_who_comes(tmp_path: Path) -> None:
    """The job ends after the restart and before a client is there; even two restarts do not lose that."""
    chain, daemon = await disk(tmp_path)
    client = await daemon.run()
    await client.command("block_stream", device="vda", speed=64 * CLUSTER)
    await daemon.kill()
    await daemon.start()
    async with asyncio.timeout(100):
        while "backing file:" in qemu_img.qemu("qemu-img", "info", "-U", chain.active):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    for end in (stopped, killed):
        await end(daemon)
        await daemon.start()
    client = await daemon.qmp()
    done = {"device": "vda", "len": SIZE, "offset": SIZE}
    assert await client.event("BLOCK_JOB_COMPLETED") == {**done, "speed": 64 * CLUSTER, "type": "stream"}
    assert await client.event("BLOCK_STREAM_COMPLETED") == done
    await client.event("JOB_STATUS_CHANGE", status="null")
    assert await client.command("query-jobs") == []
    await daemon.kill()
    client = await daemon.run()
    assert await client.command("query-jobs") == []
    assert client.events == []
    assert await daemon.content() == chain.content
    assert await daemon.stop() == 0


async def test_killed_by_who_heard_of_the_completion(tmp_path: Path) -> None:
    _, daemon = await disk(tmp_path)
    client = await daemon.run()
    await client.command("block_stream", device="vda")
    await client.event("BLOCK_JOB_COMPLETED")
    await daemon.kill()
    client = await daemon.run()
    assert await client.command("query-jobs") == []
    assert client.events == []
    await daemon.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(None, marks=slow)])
async def test_end_keeps_jobs_and_says_so(tmp_path: Path, number: signal.Signals | None) -> None:
    _, daemon = await disk(tmp_path)
    client = await daemon.run()
    await client.command("block_stream", device="vda", speed=SLOW)
    if number is None:
        await client.send(b'{"execute": "quit"}')
    else:
        daemon.process.send_signal(number)
    names = await events_to_the_end(client)
    assert names == ["JOB_STATUS_CHANGE:created", "JOB_STATUS_CHANGE:running", "JOB_STATUS_CHANGE:paused"]
    assert await daemon.wait() == 0
    client = await daemon.run()
    assert (await jobs(client))[0]["status"] == "running"
    assert await refusal(client, "block_stream", device="vda") == (
        "DeviceInUse",
        "Device 'vda' is in use",
    )
    await daemon.stop()
