"""How long the event loop makes others wait while a disk is slow: `python -m bench.lag`.

A guest writes with 16 requests in flight to a disk that answers at once, or each time after a delay (the
`faults` driver). Meanwhile QMP commands are sent, one after the other: each is answered by the event
loop as soon as it comes round, so the histogram of round trips is that of the loop's lag.
"""

import argparse
import threading
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.lab import qemu_img
from bench.peers import BLOCKD, Image, Running, running
from bench.rows.guest_io import fio
from blockd.units import GIB

FOLDER = Path(__file__).parent
WRITE_TIME_S = 3
DELAYS_MS = (0, 10, 100)


def _add_disk(daemon: Running, path: Path, delay_ms: int) -> None:
    file: dict[str, object] = {"driver": "file", "filename": str(path)}
    if delay_ms:
        rules = [
            {"event": "none", "iotype": name, "milliseconds": delay_ms} for name in ("read", "write", "flush")
        ]
        file = {"driver": "faults", "image": file, "delay": rules}
    daemon.qmp.command("blockdev-add", {"driver": "qcow2", "node-name": "slow", "file": file})
    export = {"type": "nbd", "id": "slow", "node-name": "slow", "name": "slow", "writable": True}
    daemon.qmp.command("block-export-add", export)


def _round_trips(daemon: Running, guest: threading.Thread) -> list[float]:
    """Seconds for each command until the guest is done."""
    found = []
    while guest.is_alive():
        started = time.perf_counter()
        daemon.qmp.command("query-version")
        found.append(time.perf_counter() - started)
        time.sleep(0.001)
    return found


def _measure(delay_ms: int) -> list[float]:
    with TemporaryDirectory(prefix="run-", dir=FOLDER) as name:
        folder = Path(name)
        for image in ("disk.qcow2", "slow.qcow2"):
            qemu_img("create", "-q", "-f", "qcow2", folder / image, str(GIB))
        with running(BLOCKD, Image(folder / "disk.qcow2", "qcow2"), folder) as daemon:
            _add_disk(daemon, folder / "slow.qcow2", delay_ms)
            uri = f"--uri={daemon.nbd_uri.replace('/disk', '/slow', 1)}"
            options = ("--rw=randwrite", "--bs=4k", "--iodepth=16", f"--size={GIB}", "--norandommap")
            limit = ("--time_based", f"--runtime={WRITE_TIME_S}")
            guest = threading.Thread(target=fio, args=(daemon, uri, *options, *limit))
            guest.start()
            found = _round_trips(daemon, guest)
            guest.join()
        qemu_img("check", "-q", folder / "slow.qcow2")
    return found


def _histogram(samples: list[float]) -> Counter[int]:
    """By powers of two of milliseconds: the key is the upper bound."""
    bounds: Counter[int] = Counter()
    for sample in samples:
        bound = 1
        while sample * 1e3 > bound:
            bound *= 2
        bounds[bound] += 1
    return bounds


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.lag", description=__doc__).parse_args()
    found = {delay_ms: _histogram(_measure(delay_ms)) for delay_ms in DELAYS_MS}
    bounds = sorted({bound for histogram in found.values() for bound in histogram})
    print("| the disk answers after | " + " | ".join(f"≤ {bound} ms" for bound in bounds) + " |")
    print("|--:" * (len(bounds) + 1) + "|")
    for delay_ms, histogram in found.items():
        shares = (f"{100 * histogram[bound] / histogram.total():.2f} %" for bound in bounds)
        print(f"| {delay_ms} ms | " + " | ".join(shares) + " |")


if __name__ == "__main__":
    main()
