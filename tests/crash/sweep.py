"""Sweep for as long as it takes: random lives of disks, until so many states have been judged.

    make sweep STATES=2000000
    python -m tests.crash.sweep --states 2000000 --seed 7

A life that goes wrong is told with its seed; the same seed leads to the same life again.
"""

import argparse
import asyncio
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from tests.crash.judge import Judge
from tests.crash.lives import Life, draw, judge_life
from tests.crash.variants import VARIANTS, Options

STEP_COUNT = 25
# One disk of so many different ones is compared in QEMU.
QEMU_EVERY = 2000
# Lives that a process takes at a time.
BLOCK_LENGTH = 20
# What images are made as, one life after the other; QED and add-cow have no smaller clusters than 4 KiB.
KINDS: list[tuple[str, Options]] = [
    ("qcow2", ()),
    *(("qcow2", options) for options in VARIANTS.values()),
    ("qed", ()),
    ("add-cow", ()),
]
LARGE_CLUSTER, LARGE_COUNT_MAX = 4096, 12


def drawn_life(seed: int) -> Life:
    """The life of a seed."""
    life = draw(random.Random(seed), STEP_COUNT)
    life.image_format, life.options = KINDS[seed % len(KINDS)]
    if life.image_format != "qcow2":
        life.geometry = (LARGE_CLUSTER, min(life.geometry[1], LARGE_COUNT_MAX))
    return life


def sweep_block(first_seed: int) -> Counter[str]:
    """Judge some lives, from a seed on.

    Raises:   AssertionError: with the seed in its text, if a state is not what it may be.
    """
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(rerun_every=16, folder=Path(folder))
        for seed in range(first_seed, first_seed + BLOCK_LENGTH):
            try:
                life = drawn_life(seed)
                judge.qemu_every = 0 if life.image_format == "add-cow" else QEMU_EVERY  # QEMU has none
                asyncio.run(judge_life(judge, life, seed))
            except Exception as error:
                raise AssertionError(f"the life of seed {seed} goes wrong: {error!r}") from error
    return Counter(
        lives=BLOCK_LENGTH,
        states=judge.state_count,
        disks=judge.disk_count,
        streamed=judge.rerun_count,
        in_qemu=judge.qemu_count,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--states", type=int, default=100_000, help="how many states to judge")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many at once")
    given = parser.parse_args()
    started, total = time.monotonic(), Counter[str]()
    with multiprocessing.Pool(given.processes) as pool:
        for counts in pool.imap_unordered(sweep_block, _first_seeds(given.seed, given.states)):
            total += counts
            print(f"{time.monotonic() - started:6.0f} s  {_figures(total)}", flush=True)
            if total["states"] >= given.states:
                pool.terminate()
                return 0
    return 1


def _first_seeds(first: int, state_count: int) -> Iterator[int]:
    """More than enough: a life has some hundred states."""
    for number in count():
        if number * BLOCK_LENGTH > state_count // 10 + 10 * BLOCK_LENGTH:
            return
        yield first + number * BLOCK_LENGTH


def _figures(total: Counter[str]) -> str:
    return (
        f"{total['lives']} lives, {total['states']} states of {total['disks']} different disks, "
        f"{total['streamed']} streamed again, {total['in_qemu']} compared in QEMU"
    )


if __name__ == "__main__":
    sys.exit(main())
