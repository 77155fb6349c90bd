"""Streaming: from the command to its completion event."""

import asyncio
import time
from dataclasses import dataclass
from functools import partial

from bench.lab import DATA_SIZE, SPARSE_DATA_SIZE, Lab
from bench.peers import Image, Peer, Running, running
from bench.rows import Figure, Row, Sample
from bench.rows.copy_loop import copy_with_two_threads
from blockd.protocols.nbd_client import NbdClient
from blockd.units import GIB, MIB

THROUGHPUT = Figure("throughput", "MB/s", is_more_better=True)
FLUSHED = Figure("throughput until durable", "MB/s", is_more_better=True)
CPU = Figure("CPU", "s/GiB", is_more_better=False)
DURATION = Figure("time", "s", is_more_better=False)
MEMORY = Figure("memory", "MiB", is_more_better=False)

# More than a page cache takes without writing it to the disk.
LONG_SIZE = 4 * GIB


@dataclass(frozen=True)
class Stream:
    """What one stream took: time to COMPLETED, time until a flush after that is answered, and the rest."""

    duration_s: float
    flushed_s: float
    cpu_s: float
    memory_bytes: int


def _stream(lab: Lab, peer: Peer, base: Image) -> Stream:
    """Stream `base` into a fresh overlay."""
    return stream_into(lab, peer, lab.overlay(base), base)


def stream_into(lab: Lab, peer: Peer, overlay: Image, expected: Image) -> Stream:
    """Stream into an overlay, which then has to be as expected."""
    with running(peer, overlay, lab.folder) as daemon:
        cpu_before = daemon.cpu_seconds()
        started = time.perf_counter()
        daemon.qmp.command("block-stream", {"job-id": "stream", "device": "disk"})
        completed = daemon.qmp.event("BLOCK_JOB_COMPLETED")
        duration_s = time.perf_counter() - started
        if "error" in completed:
            raise RuntimeError(f"{peer.name}: the stream failed: {completed['error']}")
        cpu_s = daemon.cpu_seconds() - cpu_before
        asyncio.run(_flush(daemon))
        flushed_s = time.perf_counter() - started
        found = Stream(duration_s, flushed_s, cpu_s, daemon.memory_bytes("VmHWM"))
    lab.check(overlay)
    lab.compare(overlay.path, expected, overlay.format)
    return found


async def _flush(daemon: Running) -> None:
    async with await NbdClient.connect_unix(str(daemon.nbd_path), "disk") as guest:
        await guest.flush()


def _stream_data(lab: Lab, peer: Peer, base: str) -> Sample:
    stream = _stream(lab, peer, {"raw": lab.raw_base, "qcow2": lab.qcow2_base}[base])
    return _throughputs(DATA_SIZE, stream.duration_s, stream.flushed_s, stream.cpu_s)


def _stream_long(lab: Lab, peer: Peer) -> Sample:
    stream = _stream(lab, peer, lab.large_base(LONG_SIZE))
    return _throughputs(LONG_SIZE, stream.duration_s, stream.flushed_s, stream.cpu_s)


def _throughputs(size: int, duration_s: float, flushed_s: float, cpu_s: float) -> Sample:
    return {
        THROUGHPUT.name: size / duration_s / 1e6,
        FLUSHED.name: size / flushed_s / 1e6,
        CPU.name: cpu_s * GIB / size,
    }


def _stream_sparse(lab: Lab, peer: Peer) -> Sample:
    stream = _stream(lab, peer, lab.sparse_base)
    return {DURATION.name: stream.duration_s, MEMORY.name: stream.memory_bytes / MIB}


def _copy_loop(lab: Lab, size: int = DATA_SIZE) -> Sample:
    base = lab.raw_base if size == DATA_SIZE else lab.large_base(size)
    lab.settle()
    duration_s, cpu_s = copy_with_two_threads(base.path, lab.folder / "copied.raw")
    lab.compare(lab.folder / "copied.raw", base, "raw")
    (lab.folder / "copied.raw").unlink()
    return _throughputs(size, duration_s, duration_s, cpu_s)


ROWS = [
    Row("stream raw → qcow2", (THROUGHPUT, FLUSHED, CPU), partial(_stream_data, base="raw"), _copy_loop),
    Row("stream qcow2 → qcow2", (THROUGHPUT, FLUSHED, CPU), partial(_stream_data, base="qcow2"), _copy_loop),
    Row(
        f"stream raw → qcow2, {LONG_SIZE // GIB} GiB",
        (THROUGHPUT, FLUSHED, CPU),
        _stream_long,
        partial(_copy_loop, size=LONG_SIZE),
    ),
]
SPARSE_ROWS = [
    Row(f"stream 1 TiB sparse, {SPARSE_DATA_SIZE // MIB} MiB data", (DURATION, MEMORY), _stream_sparse),
]
