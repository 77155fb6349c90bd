"""No journal holds a change that is half done, and an error of the journal hides no error of a command."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockd.block.node import OverlayNode
from blockd.daemon.changes import Json
from blockd.daemon.recorder import Recorder
from blockd.daemon.state_dir import StateDir
from blockd.devices.overlays import PutOverlay
from blockd.devices.stream_changes import StartStream
from blockd.errors import StorageError
from blockd.units import KIB
from tests import qemu_img
from tests.chains import Chain, make
from tests.control.running import refusal, running, until

CLUSTER = 64 * KIB
LAYERS = ["ABCDEFGH", "-X--0---"]
SIZE = 8 * CLUSTER


def run(folder: Path, chain: Chain) -> Any:
    return running(folder, "--state-dir", folder / "s", "--device", f"vda={chain.active}")


async def test_state_is_taken_when_no_change_is_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A switch has opened its overlay; a command of another client that is done by then is recorded later."""
    written: list[dict[str, Any]] = []
    write_new: Callable[[StateDir, Json], None] = StateDir.write_new

    def note(directory: StateDir, state: Any) -> None:
        written.append(state)
        write_new(directory, state)

    is_half_done, may_go_on = asyncio.Event(), asyncio.Event()
    make_durable = PutOverlay._make_durable

    async def wait(change: PutOverlay, overlay: OverlayNode) -> None:
        is_half_done.set()
        await may_go_on.wait()
        await make_durable(change, overlay)

    monkeypatch.setattr(PutOverlay, "_make_durable", wait)
    monkeypatch.setattr(StateDir, "write_new", note)
    monkeypatch.setattr(StateDir, "needs_whole", True)
    chain = await make(tmp_path, LAYERS)
    copy = qemu_img.create(tmp_path / "copy.qcow2", SIZE, backing=chain.active)
    async with run(tmp_path, chain) as daemon:
        first, second = await daemon.qmp(), await daemon.qmp()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(first.command("block_switch", device="vda", filename=str(copy)))
            await is_half_done.wait()
            adding = tasks.create_task(
                second.command("object-add", {"qom-type": "throttle-group", "id": "t"})
            )
            await until(lambda: daemon.services.objects.get("t") is not None)
            # Who only looks is answered.
            assert await (await daemon.qmp()).command("block_stream_status") == []
            assert not adding.done()
            may_go_on.set()
    for state in written:
        images = [node for node in state["nodes"] if node["options"].get("filename") == str(copy)]
        on_copy = [device for device in state["devices"] if device["node"] != state["devices"][0]["node"]]
        assert on_copy == []
        assert bool(images) == (state is not written[0])
    assert len(written) >= 2
    async with run(tmp_path, chain) as daemon:
        assert daemon.services.devices.get("vda").active.filename == str(copy)


async def test_streams_of_a_transaction_are_in_its_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after the changes are recorded, before the streams begin: nothing is half done."""
    chain = await make(tmp_path, LAYERS)
    copy = qemu_img.create(tmp_path / "copy.qcow2", SIZE, backing=chain.active)
    states: list[Any] = []
    make_final = StartStream.make_final

    def note(change: StartStream) -> None:
        states.append((tmp_path / "s" / "journal.json").read_bytes())
        make_final(change)

    monkeypatch.setattr(StartStream, "make_final", note)
    switch = {"type": "x-block-switch", "data": {"device": "vda", "filename": str(copy)}}
    stream = {"type": "x-block-stream", "data": {"device": "vda", "speed": 1}}
    async with run(tmp_path, chain) as daemon:
        client = await daemon.qmp()
        grouped = {"completion-mode": "grouped"}
        await client.command("transaction", actions=[switch, stream], properties=grouped)
    (tmp_path / "s" / "journal.json").write_bytes(states[0])
    async with run(tmp_path, chain) as daemon:
        [job] = await (await daemon.qmp()).command("query-block-jobs")
        assert (job["device"], job["speed"]) == ("vda", 1)
        assert daemon.services.devices.get("vda").active.filename == str(copy)


@pytest.mark.parametrize("is_after", [False, True])
async def test_image_that_is_told_another_backing_file_is_found_again_under_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_after: bool
) -> None:
    """Killed before or after the header is written, before the command is recorded."""
    chain = await make(tmp_path, LAYERS)
    copy = tmp_path / "later.qcow2"  # no such file yet: only the journal knows what the backing is
    journals: list[bytes] = []
    async with run(tmp_path, chain) as daemon:
        active = daemon.services.devices.get("vda").active
        kind = type(active)
        change_backing = kind.change_backing

        async def note(image: OverlayNode, filename: str | None, backing_format: str | None) -> None:
            if is_after:
                await change_backing(image, filename, backing_format)
            journals.append((tmp_path / "s" / "journal.json").read_bytes())
            if not is_after:
                raise StorageError("power cut")

        monkeypatch.setattr(kind, "change_backing", note)
        client = await daemon.qmp()
        names = {"device": "vda", "image-node-name": active.node_name, "backing-file": str(copy)}
        if is_after:
            await client.command("change-backing-file", names)
        else:
            await refusal(client, "change-backing-file", **names)
    monkeypatch.undo()
    (tmp_path / "s" / "journal.json").write_bytes(journals[0])
    async with run(tmp_path, chain) as daemon:
        assert await (await daemon.qmp()).command("query-left-out") == []
        assert await (await daemon.guest("vda")).read(0, SIZE) == chain.content


async def test_error_of_a_command_is_not_hidden_by_one_of_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chain = await make(tmp_path, LAYERS)
    async with run(tmp_path, chain) as daemon:
        client = await daemon.qmp()
        with monkeypatch.context() as patched:

            async def fail(_recorder: Recorder) -> None:
                raise StorageError("Could not write 'journal.json': No space left on device")

            patched.setattr(Recorder, "save", fail)
            error = await refusal(client, "blockdev-del", node_name="none")
            assert error == ("GenericError", "Failed to find node with node-name='none'")
            assert "the journal may be out of date: Could not write" in caplog.text
            error = await refusal(client, "object-add", qom_type="throttle-group", id="t")
            done = "object-add was carried out, but a restart would not know of it"
            assert error == (
                "GenericError",
                f"Could not write 'journal.json': No space left on device; {done}",
            )


async def test_command_that_runs_when_the_daemon_is_told_to_end_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reply says that it is done, so it has to be there after the restart."""
    is_writing, may_write = threading.Event(), threading.Event()
    chain = await make(tmp_path, LAYERS)
    copy = qemu_img.create(tmp_path / "copy.qcow2", SIZE, backing=chain.active)
    async with run(tmp_path, chain) as daemon:

        def wait(filename: str) -> None:
            is_writing.set()
            assert may_write.wait(10)

        monkeypatch.setattr("blockd.devices.overlays.sync_folder", wait)
        client = await daemon.qmp()
        async with asyncio.TaskGroup() as tasks:
            switching = tasks.create_task(client.command("block_switch", device="vda", filename=str(copy)))
            await until(is_writing.is_set)
            daemon.stop()
            await asyncio.sleep(0)
            may_write.set()
            assert await switching == {}
    async with run(tmp_path, chain) as daemon:
        assert daemon.services.devices.get("vda").active.filename == str(copy)
