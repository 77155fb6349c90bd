"""Operations on cold files, compared with a model, for as long as it takes.

    make model-sweep OPERATIONS=10000000
    python -m tests.model_sweep --operations 10000000 --seed 7

Lives of all kinds take turns: see tests/model_life.py. One that goes wrong is told with its seed, and
`--seed N --lives 1` leads to the same life again.
"""

import argparse
import asyncio
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

from tests import qemu_img
from tests.model_life import KINDS, SHAPES, ModelLife

OPERATIONS_PER_LIFE = 2000
# One life of so many is compared in QEMU at its end.
QEMU_EVERY = 50


class Kind(NamedTuple):
    """What differs between lives besides their seed."""

    shape: str
    has_backing: bool
    has_snapshot: bool
    cold_share: float

    @property
    def may_leak(self) -> bool:
        """Whether leaks are looked for beside guests."""
        return SHAPES[self.shape].image_format == "qcow2"


def _kinds() -> Iterator[Kind]:
    for cold_share in (1.0, 0.5):
        for shape in SHAPES:
            for has_backing in (True, False):
                yield Kind(shape, has_backing, False, cold_share)
                if SHAPES[shape].image_format == "qcow2":
                    yield Kind(shape, has_backing, True, cold_share)


KINDS_OF_LIVES = list(_kinds())


def live(seed: int, operation_count: int = OPERATIONS_PER_LIFE) -> Counter[str]:
    """Live the life of a seed.

    Raises:   AssertionError: it goes wrong; says how, and the seed.
    """
    kind = KINDS_OF_LIVES[seed % len(KINDS_OF_LIVES)]
    life = ModelLife(
        seed,
        kind.shape,
        has_backing=kind.has_backing,
        has_snapshot=kind.has_snapshot,
        cold_share=kind.cold_share,
        has_leaks=kind.may_leak and seed // len(KINDS_OF_LIVES) % 2 == 1,
    )
    try:
        asyncio.run(life.live(operation_count))
        if seed % QEMU_EVERY == 0 and life.shape.image_format != "add-cow":
            _ask_qemu(life)
            life.counts["in QEMU"] += 1
    except Exception as error:
        raise AssertionError(f"the life of seed {seed} ({kind}) goes wrong: {error!r}") from error
    return life.counts


def _ask_qemu(life: ModelLife) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for file in (life.file, *life.files_below):
            (Path(folder) / file.filename).write_bytes(file.content)
        path = Path(folder) / life.file.filename
        qemu_img.assert_sound(path, life.shape.image_format)
        content = qemu_img.content(path, life.shape.image_format)
    for start, window in life.oracle.content.items():
        life.oracle.compare(start, start, content[start : start + len(window)])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", type=int, default=100_000, help="how many guest operations")
    parser.add_argument("--lives", type=int, help="how many lives instead")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many at once")
    given = parser.parse_args()
    seeds = range(given.seed, given.seed + given.lives) if given.lives else count(given.seed)
    started = reported = time.monotonic()
    total = Counter[str]()
    with multiprocessing.Pool(given.processes) as pool:
        for counts in pool.imap_unordered(live, _not_too_early(seeds, given.operations)):
            total += counts
            if time.monotonic() - reported > 1:
                reported = time.monotonic()
                print(_figures(total, reported - started), flush=True)
    print(_figures(total, time.monotonic() - started))
    return 0


def _not_too_early(seeds: Iterator[int] | range, operation_count: int) -> Iterator[int]:
    """As many seeds as it takes."""
    for number, seed in enumerate(seeds):
        if isinstance(seeds, count) and number * OPERATIONS_PER_LIFE >= operation_count:
            return
        yield seed


def _figures(total: Counter[str], passed_s: float) -> str:
    operation_count = sum(total[kind] for kind in KINDS)
    parts = [f"{number} {name}" for name, number in sorted(total.items())]
    rate = operation_count / passed_s
    return f"{passed_s:6.0f} s  {operation_count} operations, {rate:.0f}/s: {', '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
