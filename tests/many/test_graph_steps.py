"""What a command costs does not depend on how many disks there are: steps are counted at two sizes."""

from pathlib import Path

import pytest

from tests import qemu_img
from tests.control.running import running
from tests.many.steps import counted
from tests.qmp_client import QmpClient

MIB = 1 << 20
FEW, MANY = 4, 24


class Disks:
    """Overlays of one base, each added and exported; with their bases open once, or once for each."""

    def __init__(self, client: QmpClient, folder: Path, *, is_shared: bool) -> None:
        self._client, self._folder, self._is_shared = client, folder, is_shared
        self._base = qemu_img.create(folder / "base.qcow2", MIB)
        self.count = 0

    async def add_base(self) -> None:
        if self._is_shared:
            file = {"driver": "file", "filename": str(self._base)}
            await self._client.command(
                "blockdev-add", {"driver": "qcow2", "node-name": "base", "read-only": True, "file": file}
            )

    async def add(self) -> str:
        name = f"disk{self.count}"
        self.count += 1
        path = qemu_img.create(self._folder / f"{name}.qcow2", MIB, backing=self._base)
        options: dict[str, object] = {"driver": "qcow2", "node-name": name}
        options["file"] = {"driver": "file", "filename": str(path)}
        if self._is_shared:
            options["backing"] = "base"
        await self._client.command("blockdev-add", options)
        await self._client.command(
            "block-export-add", {"type": "nbd", "id": name, "node-name": name, "writable": True}
        )
        return name

    async def snapshot(self, *names: str) -> None:
        actions = [
            {
                "type": "blockdev-snapshot-sync",
                "data": {
                    "node-name": name,
                    "snapshot-file": str(self._folder / f"{name}-over.qcow2"),
                    "snapshot-node-name": f"{name}-over",
                },
            }
            for name in names
        ]
        await self._client.command("transaction", actions=actions)

    async def remove(self, name: str) -> None:
        await self._client.command("block-export-del", id=name)
        await self._client.command("blockdev-del", {"node-name": name})

    async def costs(self) -> dict[str, int]:
        """The steps that each kind of command takes with one disk more than there are."""
        found = {}
        with counted() as steps:
            name = await self.add()
        found["add and export"] = steps.count
        with counted() as steps:
            await self.snapshot(name)
        found["snapshot"] = steps.count
        with counted() as steps:
            await self._client.command(
                "block-stream", {"job-id": name, "device": f"{name}-over", "base-node": name, "speed": 1}
            )
        found["stream"] = steps.count
        name = await self.add()
        with counted() as steps:
            await self.remove(name)
        found["remove"] = steps.count
        return found


@pytest.mark.parametrize("has_journal", [False, True])
@pytest.mark.parametrize("is_shared", [False, True])
async def test_a_command_costs_the_same_beside_many_disks(
    tmp_path: Path, *, is_shared: bool, has_journal: bool
) -> None:
    options: list[str | Path] = ["--state-dir", tmp_path / "state"] if has_journal else []
    async with running(tmp_path, *options) as daemon:
        disks = Disks(await daemon.qmp(), tmp_path, is_shared=is_shared)
        await disks.add_base()
        for _ in range(FEW):
            await disks.add()
        await disks.costs()  # what is loaded late is loaded now
        few = await disks.costs()
        while disks.count < MANY:
            await disks.add()
        many = await disks.costs()
    for what, count in few.items():
        assert many[what] <= 1.02 * count, f"{what}: {count} steps, then {many[what]}"


async def test_a_transaction_costs_what_its_snapshots_do(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        disks = Disks(await daemon.qmp(), tmp_path, is_shared=False)
        names = [await disks.add() for _ in range(FEW + MANY + 1)]
        await disks.snapshot(names.pop())
        costs = {}
        for count in (FEW, MANY):
            with counted() as steps:
                await disks.snapshot(*(names.pop() for _ in range(count)))
            costs[count] = steps.count / count
    assert costs[MANY] <= 1.02 * costs[FEW]
