"""Guest I/O over NBD, with fio as the guest.

Writes go to every block exactly once and with one pattern, so that a lost or misplaced write is seen
when the image is read afterwards.
"""

import json
import subprocess
from collections.abc import Callable
from functools import partial
from statistics import quantiles
from typing import NamedTuple

from bench.lab import DATA_SIZE, Lab
from bench.peers import Image, Peer, Running, Work, running
from bench.rows import Figure, Row, Sample
from bench.rows.copy_loop import write_into_clusters
from bench.used import USED_DISKS
from blockd.units import KIB, MIB

IOPS = Figure("rate", "IOPS", is_more_better=True)
THROUGHPUT = Figure("throughput", "MB/s", is_more_better=True)
P99 = Figure("p99", "µs", is_more_better=False)

READ_TIME_S = 2
WARM_UP_TIME_S = 1
PATTERN = 0xB10CD0FF
CLUSTER_SIZE = 64 * KIB
# How much is written: enough to last for seconds, the same for every peer.
WRITE_SIZES = {1: 96 * MIB, 16: DATA_SIZE}


class Disk(NamedTuple):
    """What a guest works on: how its image is made for a sample, with what it reads as before."""

    name: str
    make: Callable[[Lab], tuple[Image, Image]]
    work: Work = Work.QCOW2

    def row_name(self, name: str) -> str:
        return f"{name}, {self.name}" if self.name else name


FULL = Disk("", lambda lab: (lab.filled(), lab.raw_base))
EMPTY = Disk("", lambda lab: (lab.overlay(lab.raw_base), lab.raw_base))
# For servers that know no qcow2.
RAW = Disk("raw file", lambda lab: (lab.filled("raw"), lab.raw_base), Work.RAW)
USED = [Disk(recipe.name, recipe.make) for recipe in USED_DISKS]


def fio(daemon: Running, *options: str) -> dict[str, object]:
    """Run fio against the export and return its account of the one job."""
    command = [
        *("fio", "--name=guest", "--ioengine=nbd", f"--uri={daemon.nbd_uri}", "--thread"),
        *("--output-format=json", *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    job: dict[str, object] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return job


def _figures(job: dict[str, object], direction: str) -> Sample:
    account = job[direction]
    assert isinstance(account, dict)
    return {
        IOPS.name: account["iops"],
        THROUGHPUT.name: account["bw_bytes"] / 1e6,
        P99.name: account["clat_ns"]["percentile"]["99.000000"] / 1e3,
    }


def _warm_up(daemon: Running) -> None:
    """Let caches, allocators and the connection code of both sides reach their stride."""
    fio(
        daemon,
        "--rw=randread",
        "--bs=4k",
        "--iodepth=16",
        f"--size={DATA_SIZE}",
        "--time_based",
        "--runtime=1",
    )


def _read(lab: Lab, peer: Peer, *, disk: Disk, pattern: str, block: int, depth: int) -> Sample:
    image, content = disk.make(lab)
    with running(peer, image, lab.folder) as daemon:
        job = fio(
            daemon,
            *(
                f"--rw={pattern}",
                f"--bs={block}",
                f"--iodepth={depth}",
                f"--size={DATA_SIZE}",
                "--norandommap",
            ),
            *("--time_based", f"--ramp_time={WARM_UP_TIME_S}", f"--runtime={READ_TIME_S}"),
        )
        lab.compare(daemon.nbd_uri, content, "raw")
    return _figures(job, "read")


def _write(lab: Lab, peer: Peer, *, disk: Disk, pattern: str, block: int, depth: int) -> Sample:
    image, content = disk.make(lab)
    size = DATA_SIZE if pattern == "write" else WRITE_SIZES[depth]
    with running(peer, image, lab.folder) as daemon:
        _warm_up(daemon)
        job = fio(
            daemon,
            *(f"--rw={pattern}", f"--bs={block}", f"--iodepth={depth}", f"--size={size}"),
            f"--buffer_pattern={PATTERN:#x}",
        )
    _expect_written(lab, image, content, written_of_unit=block, unit=block, size=size)
    return _figures(job, "write")


def _allocating_write(lab: Lab, peer: Peer, *, disk: Disk, depth: int) -> Sample:
    """Write 4 KiB at the start of every cluster, most of which the image does not have."""
    image, content = disk.make(lab)
    block = 4 * KIB
    with running(peer, image, lab.folder) as daemon:
        _warm_up(daemon)
        job = fio(
            daemon,
            # After each block skip to the start of the next cluster.
            *(f"--rw=write:{CLUSTER_SIZE - block}", f"--bs={block}", f"--iodepth={depth}"),
            *(f"--size={DATA_SIZE}", f"--io_size={DATA_SIZE // CLUSTER_SIZE * block}"),
            f"--buffer_pattern={PATTERN:#x}",
        )
    _expect_written(lab, image, content, written_of_unit=block, unit=CLUSTER_SIZE, size=DATA_SIZE)
    return _figures(job, "write")


def _bare_allocating_write(lab: Lab) -> Sample:
    """The same reads and writes of files, by nobody for nobody: the page cache's own price."""
    lab.settle()
    stamp = PATTERN.to_bytes(4, "big") * KIB
    durations = write_into_clusters(lab.raw_base.path, lab.folder / "copied.raw", CLUSTER_SIZE, stamp)
    return {IOPS.name: len(durations) / sum(durations), P99.name: quantiles(durations, n=100)[98] * 1e6}


def _expect_written(
    lab: Lab, image: Image, content: Image, *, written_of_unit: int, unit: int, size: int
) -> None:
    """Check that the first bytes of each unit up to `size` hold the pattern, and all else what was there.

    Raises:   RuntimeError: a byte differs.
    """
    lab.check(image)
    expected = Image(lab.folder / "expected.raw", "raw")
    stamp = PATTERN.to_bytes(4, "big") * (written_of_unit // 4)
    with content.path.open("rb") as source, expected.path.open("wb") as target:
        for offset in range(0, DATA_SIZE, unit):
            data = source.read(unit)
            target.write(stamp + data[written_of_unit:] if offset < size else data)
    lab.compare(image.path, expected, image.format)


def _random(disk: Disk, direction: str, depth: int) -> Row:
    measure = partial(
        _read if direction == "read" else _write,
        disk=disk,
        pattern=f"rand{direction}",
        block=4 * KIB,
        depth=depth,
    )
    name = disk.row_name(f"random {direction} 4 KiB, depth {depth}")
    return Row(name, (IOPS, P99), measure, work=disk.work)


def _sequential(disk: Disk, direction: str) -> Row:
    measure = partial(
        _read if direction == "read" else _write, disk=disk, pattern=direction, block=MIB, depth=4
    )
    name = disk.row_name(f"sequential {direction} 1 MiB, depth 4")
    return Row(name, (THROUGHPUT,), measure, work=disk.work)


def _allocating(disk: Disk, depth: int) -> Row:
    return Row(
        disk.row_name(f"allocating write 4 KiB, depth {depth}"),
        (IOPS, P99),
        partial(_allocating_write, disk=disk, depth=depth),
        _bare_allocating_write if disk is EMPTY else None,
        disk.work,
    )


def _rows(full: Disk, empty: Disk) -> list[Row]:
    return [
        *(_random(full, direction, depth) for direction in ("read", "write") for depth in (1, 16)),
        *(_allocating(empty, depth) for depth in (1, 16)),
        *(_sequential(full, direction) for direction in ("read", "write")),
    ]


ROWS = [
    *_rows(FULL, EMPTY),
    *(row for disk in USED for row in _rows(disk, disk)),
    # Two will do: each takes half a minute of a run.
    *(_random(RAW, direction, 16) for direction in ("read", "write")),
]
