"""Images that were used, as tools see them: `blockctl image` beside qemu-img, and what NBD clients do.

The images are made once: nothing here changes them, or what is written is not compared.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from bench.lab import Lab, qemu_img
from bench.peers import BLOCKD, ENVIRONMENT, Image, Peer, Running, running
from bench.rows import Figure, Row, Sample
from bench.rows.guest_io import IOPS, fio
from bench.used import Recipe, scattered
from blockd.units import GIB, KIB

TIME = Figure("time", "s", is_more_better=False)
CPU_TIME = Figure("CPU time", "s", is_more_better=False)

CHAIN = Recipe("five layers", scattered(1 / 8, 2), size=GIB, layer_count=5)
SMALL_CLUSTERS = Recipe(
    "five layers, 4 KiB clusters",
    scattered(1 / 8, 2, unit=4 * KIB),
    size=GIB,
    layer_count=5,
    options=("cluster_size=4k",),
)
RECIPES = (CHAIN, SMALL_CLUSTERS)


@cache
def _made(lab: Lab, recipe: Recipe) -> tuple[Image, Image]:
    """The image of a recipe, made when first asked for, and what it reads as."""
    folder = lab.folder / f"kept-{RECIPES.index(recipe)}"
    folder.mkdir()
    kept = Lab(folder)
    kept.raw_base = lab.raw_base
    return recipe.make(kept)


@cache
def _compressed(lab: Lab) -> Image:
    image, _ = _made(lab, CHAIN)
    path = lab.folder / "compressed.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", image.path, path)
    return Image(path, "qcow2")


def _image(lab: Lab, recipe: Recipe | None) -> Image:
    return _compressed(lab) if recipe is None else _made(lab, recipe)[0]


def _run_tool(peer: Peer, *words: str | Path) -> Sample:
    """Run `blockctl image` or qemu-img, and tell what it took."""
    program = (sys.executable, "-m", "blockd.cli.blockctl", "image") if peer is BLOCKD else ("qemu-img",)
    used, started = _cpu_of_children(), time.perf_counter()
    command = [*program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    duration_s = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return {TIME.name: duration_s, CPU_TIME.name: _cpu_of_children() - used}


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _tool(lab: Lab, peer: Peer, *words: str, recipe: Recipe | None) -> Sample:
    return _run_tool(peer, *words, _image(lab, recipe).path)


def _convert(lab: Lab, peer: Peer, image_format: str, recipe: Recipe | None) -> Sample:
    source, target = _image(lab, recipe), lab.folder / f"converted.{image_format}"
    target.unlink(missing_ok=True)
    lab.settle()
    found = _run_tool(peer, "convert", "-O", image_format, source.path, target)
    lab.compare(target, _made(lab, recipe or CHAIN)[1], image_format)
    target.unlink()
    return found


def _from_export(lab: Lab, peer: Peer, client: Callable[[Lab, Running], None], recipe: Recipe) -> Sample:
    """What a client takes that reads an export, and the daemon's CPU time meanwhile."""
    with running(peer, _made(lab, recipe)[0], lab.folder) as daemon:
        used, started = daemon.cpu_seconds(), time.perf_counter()
        client(lab, daemon)
        return {TIME.name: time.perf_counter() - started, CPU_TIME.name: daemon.cpu_seconds() - used}


def _list_status(_: Lab, daemon: Running) -> None:
    subprocess.run(["nbdinfo", "--map", daemon.nbd_uri], stdout=subprocess.DEVNULL, check=True)


def _copy(_: Lab, daemon: Running) -> None:
    subprocess.run(["nbdcopy", daemon.nbd_uri, "null:"], check=True)


def _convert_export(lab: Lab, daemon: Running) -> None:
    target = lab.folder / "converted.raw"
    qemu_img("convert", "-f", "raw", "-O", "raw", daemon.nbd_uri, target)
    target.unlink()


def _mixed(lab: Lab, peer: Peer, pattern: str) -> Sample:
    """Requests of 4 to 128 KiB on a fresh image over a used chain."""
    below, _ = _made(lab, CHAIN)
    path = lab.folder / "mixed.qcow2"
    path.unlink(missing_ok=True)
    qemu_img("create", "-q", "-f", "qcow2", "-b", below.path, "-F", "qcow2", path)
    with running(peer, Image(path, "qcow2", below), lab.folder) as daemon:
        job = fio(
            daemon,
            *(f"--rw={pattern}", "--bsrange=4k-128k", "--iodepth=8", f"--size={GIB}", "--norandommap"),
            *("--randseed=3", "--time_based", "--ramp_time=1", "--runtime=2"),
        )
    lab.check(Image(path, "qcow2"))
    accounts = (job["read"], job["write"])
    return {IOPS.name: sum(float(account["iops"]) for account in accounts if isinstance(account, dict))}


def _rows_of(recipe: Recipe | None) -> list[Row]:
    name = recipe.name if recipe else "compressed"
    commands: list[tuple[str, Callable[[Lab, Peer], Sample]]] = [
        (f"image {' '.join(words)}", partial(_tool_of, words=words, recipe=recipe))
        for words in (("info",), ("map", "--output=json"), ("check",))
    ]
    commands += [
        (f"image convert -O {target}", partial(_convert, image_format=target, recipe=recipe))
        for target in ("raw", "qcow2")
    ]
    return [Row(f"{command}: {name}", (TIME, CPU_TIME), measure) for command, measure in commands]


def _tool_of(lab: Lab, peer: Peer, words: tuple[str, ...], recipe: Recipe | None) -> Sample:
    return _tool(lab, peer, *words, recipe=recipe)


_CLIENTS = {
    "nbdinfo --map": _list_status,
    "nbdcopy": _copy,
    "qemu-img convert from the export": _convert_export,
}

ROWS = [
    *(row for recipe in (*RECIPES, None) for row in _rows_of(recipe)),
    *(
        Row(f"{name}: {recipe.name}", (TIME, CPU_TIME), partial(_from_export, client=client, recipe=recipe))
        for name, client in _CLIENTS.items()
        for recipe in RECIPES
    ),
    *(
        Row(
            f"{pattern} 4–128 KiB, depth 8: five layers",
            (IOPS,),
            partial(_mixed, pattern=pattern),
        )
        for pattern in ("randread", "randrw")
    ),
]
