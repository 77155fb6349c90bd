"""block_stream, block_stream_cancel, block_stream_status on a whole daemon over a real QMP socket."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.devices.stream_request import JobOptions, StreamRequest
from blockd.errors import RequestError
from blockd.jobs.states import JobStatus
from blockd.units import KIB
from tests import qemu_img
from tests.chains import Chain, make
from tests.control.running import refusal, running, until
from tests.qmp_client import QmpClient

LAYERS = ["AB0-A-AB", "-C-C--0-", "----D---"]

BEFORE_REPLY = ["JOB_STATUS_CHANGE:created", "JOB_STATUS_CHANGE:running"]
AFTER_REPLY = [
    *("JOB_STATUS_CHANGE:waiting", "JOB_STATUS_CHANGE:pending", "BLOCK_JOB_COMPLETED"),
    *("BLOCK_STREAM_COMPLETED", "JOB_STATUS_CHANGE:concluded", "JOB_STATUS_CHANGE:null"),
]
CANCELLED = [
    *("JOB_STATUS_CHANGE:aborting", "BLOCK_JOB_CANCELLED"),
    *("JOB_STATUS_CHANGE:concluded", "JOB_STATUS_CHANGE:null"),
]


async def ended(client: QmpClient) -> None:
    await client.event("JOB_STATUS_CHANGE", status="null")


def backing_of(path: Path) -> str | None:
    text = qemu_img.qemu("qemu-img", "info", "-U", path)
    lines = [line for line in text.splitlines() if line.startswith("backing file:")]
    return lines[0].removeprefix("backing file: ").split(" (actual")[0] if lines else None


def relink(chain: Chain, number: int) -> None:
    """Record the backing file of a layer relative to its folder."""
    backing = chain.paths[number - 1]
    qemu_img.qemu(
        "qemu-img", "rebase", "-u", "-b", backing.name, "-F", chain.formats[number - 1], chain.paths[number]
    )


@pytest.mark.parametrize("base_format", ["qcow2", "raw"])
async def test_stream_of_everything(tmp_path: Path, base_format: str) -> None:
    chain = await make(tmp_path, LAYERS, base_format=base_format)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda")
        assert client.event_names() == BEFORE_REPLY
        await ended(client)
        assert client.event_names() == BEFORE_REPLY + AFTER_REPLY
        size = len(chain.content)
        completed = await client.event("BLOCK_JOB_COMPLETED")
        assert completed == {"type": "stream", "device": "vda", "len": size, "offset": size, "speed": 0}
        classic = await client.event("BLOCK_STREAM_COMPLETED")
        copied = 4 * 64 * KIB  # A, C, C and B; zeroes are not copied
        assert classic == {"device": "vda", "len": size, "offset": size, "copied": copied}
        assert backing_of(chain.active) is None
        # The layers below are closed, the guest goes on.
        assert len(await client.command("query-named-block-nodes")) == 2
        guest = await daemon.guest("vda")
        assert await guest.read(0, size) == chain.content
    qemu_img.assert_sound(chain.active)
    assert qemu_img.content(chain.active) == chain.content


NAMINGS: dict[str, Callable[[Chain], str]] = {
    "as recorded": lambda chain: chain.paths[0].name,
    "absolute": lambda chain: str(chain.paths[0]),
    "same file": lambda chain: f"{chain.paths[0].parent}/alias",
    "relative to us": lambda chain: os.path.relpath(chain.paths[0]),
}


@pytest.mark.parametrize("naming", NAMINGS)
async def test_stream_down_to_a_base(tmp_path: Path, naming: str) -> None:
    chain = await make(tmp_path, LAYERS)
    relink(chain, 1)
    relink(chain, 2)
    (tmp_path / "alias").symlink_to(chain.paths[0])
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda", base=NAMINGS[naming](chain))
        status = await client.command("block_stream_status", device="vda")
        assert [Path(entry["base"]).resolve() for entry in status] == [chain.paths[0].resolve()]
        await ended(client)
        assert backing_of(chain.active) == chain.paths[0].name
        nodes = await client.command("query-named-block-nodes")
        assert {Path(node["file"]) for node in nodes} == {chain.paths[0], chain.active}
    assert qemu_img.content(chain.active) == chain.content


async def test_backing_name_leads_to_a_base_elsewhere(tmp_path: Path) -> None:
    """The old link was relative, but the base is in another folder: an absolute name is recorded."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    below = await make(elsewhere, LAYERS[:1])
    chain = await make(tmp_path, LAYERS[:2])
    qemu_img.qemu("qemu-img", "rebase", "-u", "-b", below.active, "-F", "qcow2", chain.active)
    top = qemu_img.create(tmp_path / "top.qcow2", len(chain.content), backing=Path(chain.active.name))
    options = ("--image-paths", elsewhere, "--device", f"vda={top}")
    async with running(tmp_path, *options) as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda", base=str(below.active))
        await ended(client)
    assert backing_of(top) == str(below.active)


async def test_nothing_to_stream_is_done_before_the_reply(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS[:2])
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda", base=str(chain.paths[0]))
        assert client.event_names() == BEFORE_REPLY + AFTER_REPLY
        assert backing_of(chain.active) == str(chain.paths[0])


async def test_a_stream_that_is_paused_says_of_no_time_that_it_is_left(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda", speed=1)  # one piece, and no other for hours
        async with asyncio.timeout(60):
            while (await client.command("block_stream_status", device="vda"))[0].get("seconds-left") is None:
                pass
        await client.command("block-job-pause", device="vda")
        [status] = await client.command("block_stream_status", device="vda")
        assert status.get("seconds-left") is None
        await client.command("block-job-resume", device="vda")
        [status] = await client.command("block_stream_status", device="vda")
        assert status["seconds-left"] > 0
        await client.command("block_stream_cancel", device="vda")


async def test_refusals_change_nothing(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    (tmp_path / "raw.raw").write_bytes(bytes(65536))
    options = ("--device", f"vda={chain.active}", "--device", f"plain={tmp_path}/raw.raw")
    async with running(tmp_path, *options) as daemon:
        client = await daemon.qmp()
        for command in ("block_stream", "block_stream_cancel", "block_stream_status", "query-block-stream"):
            found = await refusal(client, command, device="nope")
            assert found == ("DeviceNotFound", "Device 'nope' not found")
        found = await refusal(client, "block_switch", device="nope", filename="x")
        assert found == ("DeviceNotFound", "Device 'nope' not found")
        found = await refusal(client, "block_stream", device="vda", base="nope.img")
        assert found == ("GenericError", "Can't find 'nope.img' in the backing chain")
        found = await refusal(client, "block_stream", device="vda", base=str(chain.active))
        assert found == ("GenericError", f"Can't find '{chain.active}' in the backing chain")
        found = await refusal(client, "block_stream", device="vda", speed=-1)
        assert found == ("GenericError", "Parameter 'speed' expects a non-negative value")
        found = await refusal(client, "block_stream", device="vda", on_error="zap")
        assert found == ("GenericError", "Parameter 'on-error' does not accept value 'zap'")
        found = await refusal(client, "block_stream", device="plain")
        assert found[0] == "NotSupported"
        found = await refusal(client, "block_stream_cancel", device="vda")
        assert found == ("DeviceNotActive", "No active stream on device 'vda'")
        assert client.events == []
        assert await client.command("block_stream_status") == []
        guest = await daemon.guest("vda")
        assert await guest.read(0, len(chain.content)) == chain.content


async def test_a_second_stream_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda", speed=65536)
        assert await refusal(client, "block_stream", device="vda") == (
            "DeviceInUse",
            "Device 'vda' is in use",
        )
        found = await refusal(client, "block-stream", job_id="other", device="vda")
        assert found[1].endswith("is busy: block device is in use by block job: stream")
        assert len(await client.command("query-jobs")) == 1
        await client.command("block-job-set-speed", device="vda", speed=0)
        await ended(client)
    assert qemu_img.content(chain.active) == chain.content


async def test_two_clients_start_the_same_stream_at_once(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        one, two = await daemon.qmp(), await daemon.qmp()
        async with daemon.services.devices.changing:  # both pass their checks before either changes anything
            both = asyncio.gather(
                one.command("block_stream", device="vda"),
                two.command("block_stream", device="vda"),
                return_exceptions=True,
            )
            for _ in range(20):
                await asyncio.sleep(0.001)
        results = await both
        assert sorted(map(str, results)) == ["DeviceInUse: Device 'vda' is in use", "{}"]
        await ended(one)


async def test_what_went_away_while_a_command_waited_is_not_used(tmp_path: Path) -> None:
    """Between a client's look-up and its turn, another client has removed the base, or the node."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, streams = await daemon.qmp(), daemon.services.streams
        top = daemon.services.devices.get("vda").node
        base = top.backing
        await client.command("block_stream", device="vda")
        await ended(client)
        with pytest.raises(RequestError, match=r"Can't find '.*layer1.qcow2' in the backing chain"):
            await streams.start(StreamRequest(top, "late", base=base))
        assert base is not None
        with pytest.raises(RequestError, match="Cannot find device='' nor node-name='#block"):
            await streams.start(StreamRequest(base, "late"))
        with pytest.raises(RequestError, match="Cannot find device='' nor node-name='#block"):
            await daemon.services.exports.add("late", base, name="late")
        assert list(daemon.services.jobs) == []


async def test_length_is_real_from_the_first_status(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await client.send(
            b'{"execute":"block_stream","arguments":{"device":"vda","speed":65536},"id":1}'
            b'{"execute":"query-block-stream","id":2}'
        )
        while (reply := await client.receive()).get("id") != 2:
            pass
        status = reply["return"][0]
        assert status["len"] == len(chain.content)
        expected = {"device": "vda", "type": "stream", "speed": 65536, "status": "running", "io-status": "ok"}
        assert expected.items() <= status.items()
        assert {"copied", "skipped", "zero", "guest-written", "rate"} <= status.keys()
        await client.command("block-job-set-speed", device="vda", speed=0)
        await ended(client)


async def test_counters_add_up(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await client.command("block-stream", {"device": "vda", "auto-finalize": False})
        await client.event("BLOCK_JOB_PENDING")
        status = (await client.command("block_stream_status", device="vda"))[0]
        assert status["offset"] == status["len"] == len(chain.content)
        assert status["copied"] + status["skipped"] + status["zero"] == status["len"]
        assert status["status"] == "pending"
        await client.command("job-finalize", id="vda")


async def test_cancel_keeps_the_backing_and_a_new_stream_can_follow(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda", speed=1)
        await client.command("block_stream_cancel", device="vda")
        await ended(client)
        assert client.event_names() == BEFORE_REPLY + CANCELLED
        assert backing_of(chain.active) == str(chain.paths[1])
        found = await refusal(client, "block_stream_cancel", device="vda")
        assert found == ("DeviceNotActive", "No active stream on device 'vda'")
        await client.command("block_stream", device="vda")
        await ended(client)
        assert backing_of(chain.active) is None
    assert qemu_img.content(chain.active) == chain.content


async def test_cancel_twice_is_refused_while_the_first_is_under_way(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda", speed=1)
        async with daemon.services.devices.changing:  # the end of the job waits for this
            await client.command("block_stream_cancel", device="vda")
            found = await refusal(client, "block_stream_cancel", device="vda")
            assert found == ("DeviceInUse", "Device 'vda' is in use")
        await ended(client)


async def test_on_done_is_called_once_by_the_python_api(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        services = daemon.services
        calls: list[tuple[bool, bool]] = []
        for speed in (1, 0):
            async with asyncio.timeout(100):
                request = StreamRequest(
                    services.devices.get("vda").node,
                    f"speed{speed}",
                    options=JobOptions(speed=speed),
                    on_done=lambda job: calls.append((job.is_cancelled, job.error is None)),
                )
                job = await services.streams.start(request)
                if speed:
                    job.cancel()
                await job.wait_ended()
        assert calls == [(True, True), (False, True)]
        assert services.devices.get("vda").active.backing is None


async def test_guest_stays_connected_and_its_writes_win(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        await client.command("block_stream", device="vda", speed=65536)
        await guest.write(65536 + 1000, b"guest" * 1000)
        assert await guest.read(0, 65536) == chain.content[:65536]
        await client.command("block-job-set-speed", device="vda", speed=0)
        await ended(client)
        expected = bytearray(chain.content)
        expected[65536 + 1000 : 65536 + 6000] = b"guest" * 1000
        assert await guest.read(0, len(expected)) == expected
        await guest.flush()
    assert qemu_img.content(chain.active) == bytes(expected)


async def test_paused_stream_is_not_in_the_way_of_the_end_of_the_daemon(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda", speed=1)
        await client.command("job-pause", id="vda")
        job = daemon.services.jobs.get("vda")
        assert job is not None
        await until(lambda: job.status is JobStatus.PAUSED)
        await client.command("quit")
        assert client.event_names()[-5:] == ["JOB_STATUS_CHANGE:running", *CANCELLED]
        with pytest.raises(EOFError):
            await client.receive()
    assert qemu_img.content(chain.active) == chain.content
