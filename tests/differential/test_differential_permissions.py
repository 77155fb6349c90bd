"""What may be done to a node in a role, while others use the nodes around it: the same as with QSD."""

import json
import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from tests.differential.images import make_images
from tests.differential.pair import FOLDER, IMAGES, Send, blockd, copied
from tests.differential.permission_cases import NODES, ROLES, RULES, USES, Case, cases
from tests.qmp_client import QmpClient, QmpError
from tests.qsd import qsd

CASE_COUNT_MIN = 700

Start = Callable[[Path], AbstractAsyncContextManager[Path]]


async def reply(client: QmpClient, folder: Path, request: Send) -> str:
    """What is said to a request."""
    message = json.loads(request.request.replace(FOLDER, str(folder)))
    try:
        await client.command(message["execute"], message.get("arguments"))
    except QmpError as error:
        return f"{error.error_class}: {error.description}".replace(str(folder), FOLDER)
    return "accepted"


async def undo(client: QmpClient) -> None:
    """Take away what a case has made."""
    if any(export["id"] == "new" for export in await client.command("query-block-exports")):
        await client.command("block-export-del", {"id": "new", "mode": "hard"})
    if any(job["id"] == "new" for job in await client.command("query-jobs")):
        await client.event("JOB_STATUS_CHANGE", id="new", status="null")
    nodes = await client.command("query-named-block-nodes", {"flat": True})
    if any(node["node-name"] == "new" for node in nodes):
        await client.command("blockdev-del", {"node-name": "new"})


async def run(start: Start, images: Path, folder: Path, use: str) -> dict[tuple[str, str], str]:
    """The replies to all cases, each told the same nodes and users."""
    found: dict[tuple[str, str], str] = {}
    pending = list(cases())
    while pending:
        copied(images, folder)
        async with start(folder) as path, await QmpClient.connect(path) as client:
            for request in [*NODES, *USES[use]]:
                assert await reply(client, folder, request) == "accepted"
            if use == "a stream":
                await client.event("BLOCK_JOB_PENDING")
            while pending:
                case = pending.pop(0)
                text = await reply(client, folder, case.request)
                # In QSD a filter with a name of its own is in the place of the node by then.
                found[case.name, case.node] = re.sub(r"#block\d+", case.node, text)
                if text == "accepted":
                    await undo(client)
                    if case.changes_nodes:
                        break
    return found


def unexplained(case: Case, theirs: str, ours: str) -> bool:
    return theirs != ours and not any(rule.explains(case, theirs, ours) for rule in RULES)


@pytest.mark.parametrize("use", USES)
async def test_permissions_are_those_of_qemu(tmp_path: Path, use: str) -> None:
    make_images(tmp_path / IMAGES)
    theirs = await run(qsd, tmp_path / IMAGES, tmp_path / "theirs", use)
    ours = await run(blockd, tmp_path / IMAGES, tmp_path / "blockd", use)
    faults = [
        f"{case.name}: {ROLES[case.node]}\nQSD:    {theirs[key]}\nblockd: {ours[key]}"
        for case in cases()
        if unexplained(case, theirs[key := (case.name, case.node)], ours[key])
    ]
    assert not faults, "\n\n".join(faults)
    assert len(theirs) * len(USES) >= CASE_COUNT_MIN
