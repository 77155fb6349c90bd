"""A guest that writes at a modest pace, and how long that takes before and while a stream runs at full speed.

The guest is fio, writing at random to clusters that the active image has. It logs every write with its
time, so that those during the stream can be told from those before.

It writes one at a time, so while one takes long it does not write those that would have been next. They count
in the figure of what was due (the usual correction for "coordinated omission").
"""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from statistics import quantiles
from typing import NamedTuple

from bench.lab import Lab, qemu, qemu_img
from bench.peers import Image, Peer, Running, running
from bench.rows import Figure, Row, Sample
from bench.used import USED_DISKS, USED_QED, Recipe
from blockd.units import GIB, KIB, MIB

IDLE_P99 = Figure("p99 idle", "µs", is_more_better=False)
STREAM_P99 = Figure("p99 during a stream", "µs", is_more_better=False)
DUE_P99 = Figure("p99 of all that were due", "µs", is_more_better=False)
LONGEST = Figure("longest", "µs", is_more_better=False)
THROUGHPUT = Figure("stream throughput", "MB/s", is_more_better=True)

WRITES_PER_S = 1000
BLOCK = 4 * KIB
# The guest starts, gets into its stride and writes alone for so long.
IDLE_TIME_S = 2.5
WARM_UP_TIME_S = 0.5
# What the active image has from the start, where the guest writes.
MAPPED_SIZE = 64 * MIB
OLD = bytes.fromhex("5c")
NEW = bytes.fromhex("b10cd0ff")
TIMEOUT_S = 300.0


class _Write(NamedTuple):
    """One write of the guest, by the clock; in seconds."""

    started: float
    finished: float

    @property
    def duration(self) -> float:
        return self.finished - self.started


def _measure(size: int, lab: Lab, peer: Peer) -> Sample:
    base = lab.large_base(size)
    return _measure_image(lab, peer, lab.overlay(base), base, size)


def _measure_used(recipe: Recipe, lab: Lab, peer: Peer) -> Sample:
    return _measure_image(lab, peer, *recipe.make(lab), recipe.size)


def _measure_image(lab: Lab, peer: Peer, overlay: Image, content: Image, size: int) -> Sample:
    """`content`: what the overlay of this size reads as."""
    qemu("qemu-io", "-c", f"write -P 0x{OLD.hex()} 0 {MAPPED_SIZE}", overlay.path)
    lab.settle()
    with running(peer, overlay, lab.folder) as daemon:
        guest = _start_guest(lab, daemon)
        try:
            time.sleep(IDLE_TIME_S)
            started = time.time()
            daemon.qmp.command("block-stream", {"job-id": "stream", "device": "disk"})
            completed = daemon.qmp.event("BLOCK_JOB_COMPLETED")
            finished = time.time()
        finally:
            guest.send_signal(signal.SIGINT)  # it ends as if its time were over, and gives its account
            account, _ = guest.communicate(timeout=TIMEOUT_S)
    if "error" in completed:
        raise RuntimeError(f"{peer.name}: the stream failed: {completed['error']}")
    writes = _logged(lab)
    _compare(lab, overlay, content, len(writes), account)
    idle_from = writes[0].started + WARM_UP_TIME_S
    before = [write.duration for write in writes if idle_from < write.started < started]
    beside = [write.duration for write in writes if started < write.finished and write.started < finished]
    return {
        IDLE_P99.name: _p99_us(before),
        STREAM_P99.name: _p99_us(beside),
        DUE_P99.name: _p99_us([wait for duration in beside for wait in _waits_of_due(duration)]),
        LONGEST.name: max(beside) * 1e6,
        THROUGHPUT.name: (size - MAPPED_SIZE) / (finished - started) / 1e6,
    }


def _start_guest(lab: Lab, daemon: Running) -> subprocess.Popen[str]:
    command = [
        *("fio", "--name=guest", "--ioengine=nbd", f"--uri={daemon.nbd_uri}", "--thread"),
        *("--rw=randwrite", f"--bs={BLOCK}", f"--size={MAPPED_SIZE}", f"--buffer_pattern=0x{NEW.hex()}"),
        *(f"--rate_iops={WRITES_PER_S}", "--write_lat_log=guest", "--log_unix_epoch=1"),
        "--output-format=json",
    ]
    return subprocess.Popen(command, cwd=lab.folder, stdout=subprocess.PIPE, text=True)


def _logged(lab: Lab) -> list[_Write]:
    """The guest's writes in order; lines are the time of the end in ms, the duration in ns, and more."""
    writes = []
    for line in (lab.folder / "guest_clat.1.log").read_text().splitlines():
        finished_ms, duration_ns = (int(word) for word in line.split(",")[:2])
        writes.append(_Write(finished_ms / 1e3 - duration_ns / 1e9, finished_ms / 1e3))
    return writes


def _waits_of_due(duration: float) -> Iterator[float]:
    """How long a write took, and each that was due meanwhile waited for its end."""
    while duration > 0:
        yield duration
        duration -= 1 / WRITES_PER_S


def _p99_us(durations: list[float]) -> float:
    return quantiles(durations, n=100)[98] * 1e6


def _compare(lab: Lab, overlay: Image, base: Image, write_count: int, account: str) -> None:
    """Compare the whole disk: as many blocks as the guest wrote hold its pattern, the others what was there.

    Raises:   RuntimeError: they do not.
    """
    issued_count = json.loads(account[account.index("{") :])["jobs"][0]["write"]["total_ios"]
    if issued_count != write_count:
        raise RuntimeError(f"the guest wrote {issued_count} blocks and logged {write_count}")
    lab.check(overlay)
    found = lab.folder / "found.raw"
    qemu_img("convert", "-O", "raw", overlay.path, found)
    with found.open("rb") as disk, base.path.open("rb") as source:
        blocks = [disk.read(BLOCK) for _ in range(MAPPED_SIZE // BLOCK)]
        new_count = blocks.count(NEW * (BLOCK // len(NEW)))
        old_count = blocks.count(OLD * BLOCK)
        if new_count != write_count or old_count != len(blocks) - write_count:
            raise RuntimeError(f"{write_count} blocks were written, {new_count} are there")
        source.seek(MAPPED_SIZE)
        while expected := source.read(MIB):
            if disk.read(MIB) != expected:
                raise RuntimeError(f"what was streamed differs before {disk.tell():#x}")
    found.unlink()


FIGURES = (IDLE_P99, STREAM_P99, DUE_P99, LONGEST, THROUGHPUT)

# The smaller one fits into the page cache of most machines, the larger one keeps their disk busy.
ROWS = [
    *(
        Row(f"guest write 4 KiB beside a stream of {size // GIB} GiB", FIGURES, partial(_measure, size))
        for size in (1 * GIB, 4 * GIB)
    ),
    *(
        Row(f"guest write 4 KiB beside a stream, {recipe.name}", FIGURES, partial(_measure_used, recipe))
        for recipe in [*USED_DISKS, USED_QED]
    ),
]
