"""Short ways to write the nodes of a test."""

from pathlib import Path

from tests.chains import Chain
from tests.qmp_client import Json, QmpClient

Options = dict[str, object]


def file(path: Path | str, **more: object) -> Options:
    return {"driver": "file", "filename": str(path), **_dashed(more)}


def qcow2(name: str, below: object, **more: object) -> Options:
    """Options of a qcow2 node; `below` is its file: a path, a node name, or options."""
    options = file(below) if isinstance(below, Path) else below
    return {"driver": "qcow2", "node-name": name, "file": options, **_dashed(more)}


def throttle(name: str, below: object, group: str) -> Options:
    return {"driver": "throttle", "node-name": name, "throttle-group": group, "file": below}


def _dashed(more: Options) -> Options:
    return {name.replace("_", "-"): value for name, value in more.items()}


async def add(client: QmpClient, *nodes: Options) -> None:
    for node in nodes:
        await client.command("blockdev-add", node)


async def add_chain(client: QmpClient, chain: Chain) -> None:
    """Every layer as a node of its own, writable, named n0 (the base), n1, ..."""
    for number, path in enumerate(chain.paths):
        below: Options = {"driver": chain.formats[number], "node-name": f"n{number}", "file": file(path)}
        await add(client, below if not number else {**below, "backing": f"n{number - 1}"})


async def reopen(client: QmpClient, *nodes: Options) -> None:
    await client.command("blockdev-reopen", options=list(nodes))


async def export(client: QmpClient, node: str, *, writable: bool = True) -> None:
    options = {"type": "nbd", "id": f"export-{node}", "node-name": node, "name": node, "writable": writable}
    await client.command("block-export-add", options)


async def stream(client: QmpClient, job_id: str, device: str, **more: object) -> None:
    await client.command("block-stream", {"job-id": job_id, "device": device, **_dashed(more)})


async def finished(client: QmpClient, job_id: str) -> Json:
    """Wait for the end of a job; returns the data of its completion."""
    await client.event("JOB_STATUS_CHANGE", id=job_id, status="null")
    for event in reversed(client.events):
        is_end = event["event"] in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
        if is_end and event["data"]["device"] == job_id:
            return event["data"]
    raise AssertionError(f"job {job_id} ended without saying so")


async def nodes_of(client: QmpClient) -> dict[str, Json]:
    found = await client.command("query-named-block-nodes", flat=True)
    return {node["node-name"]: node for node in found}
