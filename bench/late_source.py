"""How long a guest's writes take while a disk is streamed from a source that answers late.

    python -m bench.late_source --rounds 3

The base is behind the `faults` driver, which delays every read of it. A guest writes at a steady pace, a
fixed number of writes to random places, parts of clusters or whole ones, while a stream runs. Its speed is
one that the latest source can hold, so that it copies beside every write, and nothing but the delay differs.
After each run the image must hold what the guest wrote, and the base's data everywhere else.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.lab import DATA_SIZE, Lab
from bench.peers import BLOCKD, Image, Running, running
from blockd.units import KIB, MIB

FOLDER = Path(__file__).parent
DELAYS_MS = (0, 10, 100, 1000)
BLOCKS = {"4 KiB, parts of clusters": 4 * KIB, "64 KiB, whole clusters": 64 * KIB}
STREAM_SPEED = 8 * MIB
# For ten seconds: many more in all than may wait for the latest source at once.
WRITE_COUNT = 1000
WRITES_PER_S = 100
PATTERN = bytes.fromhex("b10cd0ff")


@dataclass(frozen=True)
class _LateImage(Image):
    """A raw image whose reads are answered late."""

    delay_ms: int = 0

    def options(self, prefix: str = "") -> str:
        file = f"{prefix}file."
        words = [f"{prefix}driver=raw", f"{file}driver=faults", f"{file}image.driver=file"]
        words.append(f"{file}image.filename={self.path}")
        if self.delay_ms:
            words += [f"{file}delay.0.event=none", f"{file}delay.0.milliseconds={self.delay_ms}"]
        return ",".join(words)


def _p99_us(lab: Lab, delay_ms: int, block: int) -> float:
    base = _LateImage(lab.raw_base.path, "raw", delay_ms=delay_ms)
    overlay = lab.overlay(base)
    with running(BLOCKD, overlay, lab.folder) as daemon:
        daemon.qmp.command("block-stream", {"job-id": "stream", "device": "disk", "speed": STREAM_SPEED})
        p99_us = _write(daemon, block)
        if daemon.qmp.command("query-jobs"):
            daemon.qmp.command("block-job-cancel", {"device": "stream"})
    _compare(lab, overlay, block)
    return p99_us


def _write(daemon: Running, block: int) -> float:
    command = [
        *("fio", "--name=guest", "--ioengine=nbd", f"--uri={daemon.nbd_uri}", "--output-format=json"),
        *("--rw=randwrite", f"--bs={block}", f"--size={DATA_SIZE}", f"--io_size={WRITE_COUNT * block}"),
        *(f"--rate_iops={WRITES_PER_S}", f"--buffer_pattern=0x{PATTERN.hex()}", "--end_fsync=1", "--thread"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    account = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["write"]
    return float(account["clat_ns"]["percentile"]["99.000000"]) / 1e3


def _compare(lab: Lab, image: Image, block: int) -> None:
    """Compare the whole disk: so many blocks as the guest wrote hold its pattern, all others the base's data.

    Raises:   RuntimeError: they do not.
    """
    lab.check(image)
    found = lab.folder / "found.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image.path, found], check=True)
    pattern, written_count = PATTERN * (block // len(PATTERN)), 0
    with found.open("rb") as disk, lab.raw_base.path.open("rb") as base:
        while expected := base.read(block):
            content = disk.read(block)
            if content == pattern:
                written_count += 1
            elif content != expected:
                raise RuntimeError(f"the block before {disk.tell():#x} is neither old nor what was written")
    if written_count != WRITE_COUNT:
        raise RuntimeError(f"{WRITE_COUNT} blocks were written, {written_count} are there")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs for each figure (default 3)")
    rounds = parser.parse_args().rounds
    table = Table("guest writes, p99 in µs", *(f"source after {delay} ms" for delay in DELAYS_MS))
    with Lab.prepared(FOLDER) as lab:
        for name, block in BLOCKS.items():
            samples: dict[int, list[float]] = {delay: [] for delay in DELAYS_MS}
            for _ in range(rounds):
                for delay, taken in samples.items():
                    taken.append(_p99_us(lab, delay, block))
            table.add_row(name, *(_cell(taken) for taken in samples.values()))
    Console(width=200).print(table)
    return 0


def _cell(taken: list[float]) -> str:
    return f"{statistics.median(taken):,.0f} ({min(taken):,.0f}–{max(taken):,.0f})"


if __name__ == "__main__":
    sys.exit(main())
