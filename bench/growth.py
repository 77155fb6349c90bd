"""How time and memory grow with the work, and with what is no work: `python -m bench.growth`.

Each experiment changes one thing and keeps the work the same: so much data is streamed, so many seconds
are read. What should not matter then shows as a level line. All bytes are compared afterwards.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.lab import qemu, qemu_img
from bench.peers import BLOCKD, Image, Running, running
from bench.plot import Line, draw
from bench.rows.guest_io import fio
from bench.used import Write, write_all
from blockd.units import GIB, KIB, MIB, TIB

FOLDER = Path(__file__).parent
PLOT_FOLDER = FOLDER.parent / "docs" / "growth"

# What is streamed in each experiment, in stripes of one pattern each.
DATA_SIZE = 256 * MIB
SPARSE_DATA_SIZE = 16 * MIB
STRIPE = 1 * MIB
# A cluster of an overlay with many of them.
FRAGMENT = 4 * KIB
READ_TIME_S = 2


@dataclass(frozen=True)
class Point:
    """What one step of an experiment took."""

    x: float
    time_ms: float
    cpu_ms: float
    memory_mib: float


def _pattern(number: int) -> int:
    return 1 + number % 251


def _write(path: Path, stripes: Iterator[tuple[int, int]]) -> None:
    """Write stripes, each a number and an offset, into a qcow2 image."""
    commands = [f"write -P {_pattern(number)} {offset} {STRIPE}" for number, offset in stripes]
    qemu(
        "qemu-io", "-t", "unsafe", "-f", "qcow2", *(word for each in commands for word in ("-c", each)), path
    )


def _expect(path: Path, stripes: Iterator[tuple[int, int]]) -> None:
    """Raises RuntimeError: not these stripes are in the image."""
    commands = [f"read -P {_pattern(number)} {offset} {STRIPE}" for number, offset in stripes]
    qemu("qemu-io", "-r", "-f", "qcow2", *(word for each in commands for word in ("-c", each)), path)
    qemu_img("check", "-q", path)


def _create(path: Path, size: int, backing: Image | None = None) -> Image:
    link: list[str | Path] = ["-b", backing.path, "-F", backing.format] if backing else []
    qemu_img("create", "-q", "-f", "qcow2", *link, path, str(size))
    return Image(path, "qcow2", backing)


def _stream(daemon: Running, x: float, nodes: list[str]) -> Point:
    """Stream into all nodes at once."""
    cpu_before, started = daemon.cpu_seconds(), time.perf_counter()
    for node in nodes:
        daemon.qmp.command("block-stream", {"job-id": f"job-{node}", "device": node})
    for _ in nodes:
        completed = daemon.qmp.event("BLOCK_JOB_COMPLETED")
        if "error" in completed:
            raise RuntimeError(f"a stream failed: {completed['error']}")
    duration_s = time.perf_counter() - started
    cpu_s = daemon.cpu_seconds() - cpu_before
    return Point(x, duration_s * 1e3, max(cpu_s * 1e3, 1), daemon.memory_bytes("VmHWM") / MIB)


def virtual_size(folder: Path, size_gib: int) -> Point:
    """The same data, spread over a disk of another size."""
    size = size_gib * GIB
    count = SPARSE_DATA_SIZE // STRIPE
    stripes = [(number, number * (size // count)) for number in range(count)]
    base = _create(folder / "base.qcow2", size)
    _write(base.path, iter(stripes))
    overlay = _create(folder / "overlay.qcow2", size, base)
    with running(BLOCKD, overlay, folder) as daemon:
        point = _stream(daemon, size / TIB, ["disk"])
    base.path.unlink()
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", overlay.path)
    _expect(overlay.path, iter(stripes))
    return point


def chain_depth(folder: Path, depth: int) -> Point:
    """The same data, spread over another number of backing images."""
    image: Image | None = None
    stripes = [(number, number * STRIPE) for number in range(DATA_SIZE // STRIPE)]
    for layer in range(depth):
        image = _create(folder / f"layer{layer}.qcow2", DATA_SIZE, image)
        _write(image.path, iter(stripes[layer::depth]))
    overlay = _create(folder / "overlay.qcow2", DATA_SIZE, image)
    with running(BLOCKD, overlay, folder) as daemon:
        point = _stream(daemon, depth, ["disk"])
    _expect(overlay.path, iter(stripes))
    return point


def devices(folder: Path, count: int) -> Point:
    """The same data, spread over disks that are streamed at once."""
    stripes = [(number, number * STRIPE) for number in range(DATA_SIZE // STRIPE // count)]
    overlays = []
    for number in range(count):
        base = _create(folder / f"base{number}.qcow2", len(stripes) * STRIPE)
        _write(base.path, iter(stripes))
        overlays.append(_create(folder / f"overlay{number}.qcow2", len(stripes) * STRIPE, base))
    with running(BLOCKD, overlays[0], folder) as daemon:
        for number, overlay in enumerate(overlays[1:], 1):
            daemon.qmp.command("blockdev-add", {"node-name": f"disk{number}"} | overlay.members())
        point = _stream(daemon, count, ["disk", *(f"disk{number}" for number in range(1, count))])
    for overlay in overlays:
        _expect(overlay.path, iter(stripes))
    return point


def fragments(folder: Path, count: int) -> Point:
    """An overlay in which every other one of its small clusters is written, over a base full of data."""
    size = 2 * count * FRAGMENT
    base, expected = folder / "base.raw", folder / "expected.raw"
    block = random.Random(count).randbytes(MIB)
    with base.open("wb") as file:
        for position in range(0, size, MIB):
            file.write(block[: size - position])
    overlay = Image(folder / "overlay.qcow2", "qcow2", Image(base, "raw"))
    options = ("-b", base, "-F", "raw", "-o", f"cluster_size={FRAGMENT}")
    qemu_img("create", "-q", "-f", "qcow2", *options, overlay.path)
    write_all(overlay.path, "qcow2", (Write(start, FRAGMENT) for start in range(0, size, 2 * FRAGMENT)))
    qemu_img("convert", "-O", "raw", overlay.path, expected)
    with running(BLOCKD, overlay, folder) as daemon:
        point = _stream(daemon, count, ["disk"])
    qemu_img("check", "-q", overlay.path)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", overlay.path, expected)
    return point


def connections(folder: Path, count: int) -> Point:
    """Guests that each read 4 KiB at a time; the time is that of one request times the connections."""
    image = _create(folder / "disk.qcow2", DATA_SIZE)
    _write(image.path, ((number, number * STRIPE) for number in range(DATA_SIZE // STRIPE)))
    with running(BLOCKD, image, folder) as daemon:
        cpu_before = daemon.cpu_seconds()
        job = fio(
            daemon,
            *("--rw=randread", f"--bs={4 * KIB}", "--iodepth=1", f"--size={DATA_SIZE}", "--norandommap"),
            *(f"--numjobs={count}", "--group_reporting", "--time_based", f"--runtime={READ_TIME_S}"),
        )
        cpu_s = daemon.cpu_seconds() - cpu_before
        memory = daemon.memory_bytes("VmHWM") / MIB
    account = job["read"]
    assert isinstance(account, dict)
    requests = account["total_ios"]
    return Point(count, 1e6 / account["iops"], cpu_s * 1e6 / requests, memory)


@dataclass(frozen=True)
class Experiment:
    """One thing that changes; `unit` is that of times."""

    name: str
    x_name: str
    unit: str
    steps: tuple[int, ...]
    measure: Callable[[Path, int], Point]


DOUBLINGS = (1, 2, 4, 8, 16, 32)
FRAGMENT_COUNTS = (1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000)
EXPERIMENTS = [
    Experiment(
        f"stream {SPARSE_DATA_SIZE // MIB} MiB of data",
        "virtual size, TiB",
        "ms",
        (1, 64, KIB, 8 * KIB, 64 * KIB),
        virtual_size,
    ),
    Experiment(f"stream {DATA_SIZE // MIB} MiB", "backing images", "ms", DOUBLINGS, chain_depth),
    Experiment(f"stream {DATA_SIZE // MIB} MiB", "disks at once", "ms", DOUBLINGS, devices),
    Experiment("stream into a used overlay", "ranges to copy", "ms", FRAGMENT_COUNTS, fragments),
    Experiment("random read 4 KiB", "NBD connections", "µs a request", (1, 4, 16, 64), connections),
]


def _median(points: list[Point]) -> Point:
    return Point(
        points[0].x,
        median(point.time_ms for point in points),
        median(point.cpu_ms for point in points),
        median(point.memory_mib for point in points),
    )


def _run(experiment: Experiment, rounds: int) -> list[Point]:
    found: dict[int, list[Point]] = {step: [] for step in experiment.steps}
    for _ in range(rounds):
        for step in experiment.steps:
            with TemporaryDirectory(prefix="run-", dir=FOLDER) as folder:
                found[step].append(experiment.measure(Path(folder), step))
    return [_median(points) for points in found.values()]


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def _table(experiment: Experiment, points: list[Point]) -> str:
    rows = [
        f"| {_number(point.x)} | {point.time_ms:,.0f} | {point.cpu_ms:,.0f} | {point.memory_mib:.1f} |"
        for point in points
    ]
    heading = f"| {experiment.x_name} | time, {experiment.unit} | CPU, {experiment.unit} | memory, MiB |"
    return "\n".join([f"{experiment.name}:", "", heading, "|--:|--:|--:|--:|", *rows, ""])


def _plot(experiment: Experiment, points: list[Point]) -> str:
    lines = [
        Line(f"time, {experiment.unit}", [(point.x, point.time_ms) for point in points]),
        Line(f"CPU, {experiment.unit}", [(point.x, point.cpu_ms) for point in points]),
        Line("memory, MiB", [(point.x, point.memory_mib) for point in points]),
    ]
    return draw(experiment.name, experiment.x_name, "", lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", metavar="TEXT", help="just what changes something named TEXT")
    arguments = parser.parse_args()
    PLOT_FOLDER.mkdir(parents=True, exist_ok=True)
    for experiment in EXPERIMENTS:
        if arguments.only not in experiment.measure.__name__:
            continue
        points = _run(experiment, arguments.rounds)
        print(_table(experiment, points), flush=True)
        (PLOT_FOLDER / f"{experiment.measure.__name__}.svg").write_text(_plot(experiment, points))


if __name__ == "__main__":
    main()
