"""What commands cost beside many disks in one daemon: `python -m bench.many_disks`.

Each disk is an overlay of its own with an image below it, added and exported over QMP. Times are per command
or per disk; CPU is the daemon's, all threads, and says more than time where others use the machine.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.lab import qemu_img
from bench.peers import BLOCKD, ENVIRONMENT, POLL_INTERVAL_S, START_TIMEOUT_S
from bench.qmp import Qmp
from blockd.units import MIB

FOLDER = Path(__file__).parent
# How many commands of a kind are measured, beside as many disks as there are.
COMMAND_COUNT = 10


class Daemon:
    """One run of blockd, and how much of a processor it has used."""

    def __init__(self, folder: Path, *, has_journal: bool) -> None:
        socket = folder / "qmp.sock"
        socket.unlink(missing_ok=True)
        command = [*BLOCKD.program, "--chardev", f"socket,id=qmp,path={socket},server=on,wait=off"]
        command += ["--monitor", "chardev=qmp", "--nbd-server", f"addr.type=unix,addr.path={folder}/nbd.sock"]
        command += ["--state-dir", str(folder / "state")] if has_journal else []
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
        self.qmp = self._connect(socket)

    def _connect(self, socket: Path) -> Qmp:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                return Qmp(socket)
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(POLL_INTERVAL_S)
        raise RuntimeError("blockd did not start")

    def cpu_ms(self) -> float:
        tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6

    def stop(self) -> None:
        self.qmp.command("quit")
        self.qmp.close()
        if self._process.wait(START_TIMEOUT_S):
            raise RuntimeError("blockd ended with an error")


Figures = dict[str, tuple[float, float]]


@contextmanager
def _measured(figures: Figures, name: str, daemon: Daemon, count: int) -> Iterator[None]:
    """Note time and CPU in milliseconds of one of `count` things."""
    cpu_before, begun = daemon.cpu_ms(), time.perf_counter()
    yield
    took = (time.perf_counter() - begun) * 1e3
    figures[name] = (took / count, (daemon.cpu_ms() - cpu_before) / count)


def _add(daemon: Daemon, folder: Path, name: str) -> None:
    file = {"driver": "file", "filename": str(folder / f"{name}.qcow2")}
    daemon.qmp.command("blockdev-add", {"driver": "qcow2", "node-name": name, "file": file})
    export = {"type": "nbd", "id": name, "node-name": name, "writable": True}
    daemon.qmp.command("block-export-add", export)


def _snapshot(folder: Path, name: str) -> dict[str, object]:
    file = str(folder / f"{name}-over.qcow2")
    data = {"node-name": name, "snapshot-file": file, "snapshot-node-name": f"{name}-over"}
    return {"type": "blockdev-snapshot-sync", "data": data}


def measure(folder: Path, count: int, *, has_journal: bool) -> Figures:
    """Everything beside `count` disks."""
    names = [f"disk{number}" for number in range(count + COMMAND_COUNT)]
    base, first = folder / "base.qcow2", folder / "first.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, str(MIB))
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", first)
    for name in names:
        shutil.copyfile(first, folder / f"{name}.qcow2")
    figures: Figures = {}
    daemon = Daemon(folder, has_journal=has_journal)
    for name in names[:count]:
        _add(daemon, folder, name)
    with _measured(figures, "add and export", daemon, COMMAND_COUNT):
        for name in names[count:]:
            _add(daemon, folder, name)
    with _measured(figures, "query-named-block-nodes", daemon, 1):
        daemon.qmp.command("query-named-block-nodes")
    if has_journal:
        daemon.stop()
        figures["start, no disks"] = _start_alone(folder)
        figures["restart, a disk of two images"] = _restart(figures, folder, len(names))
        daemon = Daemon(folder, has_journal=True)
    actions = [_snapshot(folder, name) for name in names]
    with _measured(figures, "one snapshot", daemon, 1):
        daemon.qmp.command("transaction", {"actions": actions[:1]})
    with _measured(figures, "a snapshot of a transaction of all", daemon, len(actions) - 1):
        daemon.qmp.command("transaction", {"actions": actions[1:]})
    with _measured(figures, "start a stream", daemon, COMMAND_COUNT):
        for name in names[:COMMAND_COUNT]:
            daemon.qmp.command("block-stream", {"job-id": name, "device": f"{name}-over", "speed": 1})
    begun = time.perf_counter()
    daemon.stop()
    figures["stop, all disks"] = ((time.perf_counter() - begun) * 1e3, 0.0)
    if has_journal:
        figures["restart, a disk of three images"] = _restart(figures, folder, len(names))
    return figures


def _start_alone(folder: Path) -> tuple[float, float]:
    alone = folder / "alone"
    alone.mkdir()
    _start(alone)  # makes a journal
    return _start(alone)


def _restart(figures: Figures, folder: Path, count: int) -> tuple[float, float]:
    """How much longer the start of a daemon takes for each of `count` disks in its journal."""
    (took, cpu), (time_alone, cpu_alone) = _start(folder), figures["start, no disks"]
    return (took - time_alone) / count, (cpu - cpu_alone) / count


def _start(folder: Path) -> tuple[float, float]:
    """Time and CPU in milliseconds until a daemon with a journal has answered a command."""
    begun = time.perf_counter()
    daemon = Daemon(folder, has_journal=True)
    daemon.qmp.command("query-jobs")
    figures = (time.perf_counter() - begun) * 1e3, daemon.cpu_ms()
    daemon.stop()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.many_disks", description=__doc__)
    parser.add_argument("counts", type=int, nargs="*", default=[10, 100, 1000], metavar="DISKS")
    counts = parser.parse_args().counts
    for has_journal in (False, True):
        columns: list[Figures] = []
        for count in counts:
            with TemporaryDirectory(prefix="run-", dir=FOLDER) as folder:
                columns.append(measure(Path(folder), count, has_journal=has_journal))
        _print_table(columns, counts, "with" if has_journal else "without")


def _print_table(columns: list[Figures], counts: list[int], with_or_without: str) -> None:
    show: Callable[[tuple[float, float]], str] = lambda pair: f"{pair[0]:,.1f} / {pair[1]:,.1f}"  # noqa: E731
    headings = "".join(f" | {count} disks" for count in counts)
    print(f"| {with_or_without} a journal: time / CPU, ms{headings} |")
    print("|---" + "|--:" * len(counts) + "|")
    for name in columns[0]:
        print("".join([f"| {name}", *(f" | {show(column[name])}" for column in columns), " |"]))
    print()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
