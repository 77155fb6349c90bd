"""The QMP clients of a storm: each does random things, most of which are refused, and notes what was done."""

import asyncio
from pathlib import Path
from typing import Any

from tests.qmp_client import QmpClient
from tests.storm.disk import CLUSTER, DEPTH_MAX, SIZE_MAX, Disk, make_overlay
from tests.storm.life import Life


async def direct(life: Life, disk: Disk, others: list[Disk]) -> None:
    """Start streams, put overlays on top, make the disk larger."""
    client, rng = await life.daemon.qmp(), life.rng
    while True:
        if disk.depth < DEPTH_MAX and rng.random() < 0.5:
            await rng.choice([switch, snapshot, transaction])(life, client, disk, others)
        elif rng.random() < 0.15:
            await resize(life, client, disk)
        else:
            await stream(life, client, disk)
        await asyncio.sleep(rng.choice([0, 0, 0.001, 0.02]))


async def stream(life: Life, client: QmpClient, disk: Disk) -> None:
    rng, arguments = life.rng, {"device": disk.name, "speed": life.rng.choice([0, 0, 1, 40 * CLUSTER])}
    if is_job := rng.random() < 0.5:
        arguments |= {"auto-finalize": rng.random() < 0.7, "auto-dismiss": rng.random() < 0.7}
    if rng.random() < 0.3:
        arguments["base"] = str(disk.folder / f"{disk.name}-base.raw")
    disk.asked_count += 1
    disk.is_paused = None
    if await life.ask(client, "block-stream" if is_job else "block_stream", arguments):
        disk.begun_count += 1
    else:
        disk.asked_count -= 1


async def new_overlay(disk: Disk) -> Path:
    path = disk.new_path(disk.format)
    await make_overlay(path, disk.format, disk.model.size, disk.active, disk.active.suffix[1:])
    return path


def took_place(disk: Disk, path: Path, is_done: bool) -> None:
    if is_done:
        disk.active = path
        disk.depth += 1
    disk.next_active = None


async def switch(life: Life, client: QmpClient, disk: Disk, _others: list[Disk]) -> None:
    async with disk.changing:
        path = await new_overlay(disk)
        life.go_on()
        disk.next_active = path
        arguments = {"device": disk.name, "filename": str(path), "format": disk.format}
        took_place(disk, path, await life.ask(client, "block_switch", arguments))


async def snapshot(life: Life, client: QmpClient, disk: Disk, _others: list[Disk]) -> None:
    async with disk.changing:
        life.go_on()
        path = disk.next_active = disk.new_path("qcow2")
        arguments = {"device": disk.name, "snapshot-file": str(path), "format": "qcow2"}
        took_place(disk, path, await life.ask(client, "blockdev-snapshot-sync", arguments))


async def transaction(life: Life, client: QmpClient, disk: Disk, others: list[Disk]) -> None:
    """Switch two disks and stream into one of them, all or nothing."""
    first, second = sorted([disk, life.rng.choice(others)], key=lambda one: one.name)
    async with first.changing, second.changing:
        actions: list[dict[str, Any]] = []
        paths = [await new_overlay(one) for one in (first, second)]
        life.go_on()
        for one, path in zip((first, second), paths, strict=True):
            one.next_active = path
            data = {"device": one.name, "filename": str(path), "format": one.format}
            actions.append({"type": "x-block-switch", "data": data})
        stream_data = {"device": first.name, "speed": 40 * CLUSTER}
        actions.append({"type": "x-block-stream", "data": stream_data})
        first.asked_count += 1
        first.is_paused = None
        grouped = {"completion-mode": "grouped"}
        is_done = await life.ask(client, "transaction", {"actions": actions, "properties": grouped})
        first.begun_count += is_done
        first.asked_count -= not is_done
        for one, path in zip((first, second), paths, strict=True):
            took_place(one, path, is_done)


async def resize(life: Life, client: QmpClient, disk: Disk) -> None:
    async with disk.changing:
        size = disk.model.size + CLUSTER
        if size > SIZE_MAX:
            return
        life.go_on()
        disk.next_size = size
        if await life.ask(client, "block_resize", {"device": disk.name, "size": size}):
            disk.model.begin_resize(size)
            disk.model.finish_resize()
        disk.next_size = None


async def meddle(life: Life, disk: Disk) -> None:
    """Ask all kinds of things of the disk's job, and about it."""
    client, rng = await life.daemon.qmp(), life.rng
    by_device, by_id = {"device": disk.name}, {"id": disk.name}
    while True:
        verbs: list[tuple[str, dict[str, Any], bool | None]] = [
            ("block_stream_cancel", by_device, None),
            ("job-cancel", by_id, None),
            ("block-job-cancel", by_device | {"force": True}, None),
            *[("job-pause", by_id, True), ("block-job-pause", by_device, True)] * 2,
            *[("job-resume", by_id, False), ("block-job-resume", by_device, False)] * 2,
            *[("block-job-set-speed", by_device | {"speed": 0}, None)] * 3,
            *[("job-finalize", by_id, None), ("job-dismiss", by_id, None)] * 2,
            ("query-block", {}, None),
            ("query-named-block-nodes", {}, None),
            ("block_stream_status", {}, None),
            ("query-block-exports", {}, None),
        ]
        command, arguments, is_paused = rng.choice(verbs)
        disk.verb_count += 1
        is_done = await life.ask(client, command, arguments)
        disk.verb_count -= 1
        if is_done and is_paused is not None:
            disk.is_paused = is_paused
        await asyncio.sleep(rng.choice([0, 0.001, 0.01, 0.03]))


class Gardener:
    """Adds, changes and removes nodes, exports and throttle groups of its own."""

    def __init__(self, folder: Path) -> None:
        self.images = [folder / f"garden-{number}.raw" for number in range(3)]
        # What is there, by kind and name; and the thing of which a command is not answered yet.
        self.there: set[tuple[str, str]] = set()
        self.doubtful: tuple[str, str] | None = None

    def make(self) -> None:
        for image in self.images:
            image.write_bytes(bytes(4 * CLUSTER))

    async def live(self, life: Life) -> None:
        client, rng = await life.daemon.qmp(), life.rng
        steps = [self._node, self._node, self._delete_node, self._export, self._delete_export, self._reopen]
        while True:
            await rng.choice([*steps, self._group])(life, client)
            await asyncio.sleep(rng.choice([0, 0.001, 0.01]))

    async def _do(
        self, life: Life, client: QmpClient, thing: tuple[str, str], command: str, arguments: dict[str, Any]
    ) -> None:
        """A command that adds a thing, or removes it if it is there."""
        self.doubtful = thing
        if await life.ask(client, command, arguments):
            self.there ^= {thing}
        self.doubtful = None

    async def _node(self, life: Life, client: QmpClient) -> None:
        number = life.rng.randrange(len(self.images))
        file = {"driver": "file", "filename": str(self.images[number])}
        options = {"driver": "raw", "node-name": f"g{number}", "file": file}
        if ("node", f"g{number}") not in self.there:
            await self._do(life, client, ("node", f"g{number}"), "blockdev-add", options)

    async def _delete_node(self, life: Life, client: QmpClient) -> None:
        number = life.rng.randrange(len(self.images))
        name = {"node-name": f"g{number}"}
        if ("node", f"g{number}") in self.there:
            await self._do(life, client, ("node", f"g{number}"), "blockdev-del", name)

    async def _export(self, life: Life, client: QmpClient) -> None:
        number = life.rng.randrange(len(self.images))
        export = {"type": "nbd", "id": f"e{number}", "node-name": f"g{number}"}
        if ("export", f"e{number}") not in self.there:
            await self._do(life, client, ("export", f"e{number}"), "block-export-add", export)

    async def _delete_export(self, life: Life, client: QmpClient) -> None:
        number = life.rng.randrange(len(self.images))
        if ("export", f"e{number}") in self.there:
            await self._do(life, client, ("export", f"e{number}"), "block-export-del", {"id": f"e{number}"})

    async def _reopen(self, life: Life, client: QmpClient) -> None:
        number = life.rng.randrange(len(self.images))
        file = {"driver": "file", "filename": str(self.images[number])}
        options = {"driver": "raw", "node-name": f"g{number}", "file": file}
        await life.ask(
            client, "blockdev-reopen", {"options": [options | {"read-only": life.rng.random() < 0.5}]}
        )

    async def _group(self, life: Life, client: QmpClient) -> None:
        name = f"t{life.rng.randrange(2)}"
        if ("group", name) in self.there:
            await self._do(life, client, ("group", name), "object-del", {"id": name})
        else:
            options = {"qom-type": "throttle-group", "id": name}
            await self._do(life, client, ("group", name), "object-add", options)

    async def check(self, client: QmpClient) -> None:
        """Compare what is there with what was acknowledged."""
        found = {("node", node["node-name"]) for node in await client.command("query-named-block-nodes")}
        found |= {("export", export["id"]) for export in await client.command("query-block-exports")}
        found |= {("group", entry["name"]) for entry in await client.command("qom-list", path="/objects")}
        own = {
            thing for thing in found if thing[1][0] in "get" and thing[1][1:].isdigit() and len(thing[1]) == 2
        }
        assert own ^ self.there <= {self.doubtful}, f"there: {own}, known: {self.there}, {self.doubtful}"
        self.there, self.doubtful = own, None
