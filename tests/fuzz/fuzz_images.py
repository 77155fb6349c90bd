"""Spoil images of every format and use them: `python -m tests.fuzz.fuzz_images [COUNT] [--seed N]`.

Each image goes through check, repair, open, map, read, write and stream. No crash, no error but blockd's own,
none that does not name the file, no answer that takes a second of processor time, no memory beyond 256 MiB,
no file touched outside its folder. A failure names the number that makes its image again. As root it becomes
`nobody` first.
"""

import argparse
import asyncio
import codecs
import faulthandler
import gc
import os
import pwd
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from blockd.protocols import writeback
from blockd.units import MIB
from tests.fuzz.image_arena import IMAGES, Arena, Guard
from tests.fuzz.image_mutations import Mutator
from tests.fuzz.image_ordeal import Figures, Ordeal
from tests.fuzz.image_seeds import BASE, make_seeds
from tests.fuzz.memory import peak_memory
from tests.inline_threads import immediate_threads

COUNT = 2000
MEMORY_MAX = 256 * MIB
ANSWER_S_MAX = 1.0
# One image takes milliseconds: this is for those that would never end.
HANG_S = 100
BYSTANDERS_EVERY = 200


def main() -> None:
    parser = argparse.ArgumentParser(description="Spoil disk images and use them.")
    parser.add_argument("count", nargs="?", type=int, default=COUNT, help=f"how many images ({COUNT})")
    parser.add_argument("--seed", type=int, default=0, help="number of the first image (0)")
    parser.add_argument("--until", type=float, default=0, help="stop at this time, in seconds since 1970")
    parser.add_argument("--errors", action="store_true", help="tell which errors there were")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="blockd-fuzz-", ignore_cleanup_errors=True) as folder:
        _run(Path(folder), options)


def _run(folder: Path, options: argparse.Namespace) -> None:
    began, used = time.monotonic(), time.process_time()
    arena = Arena(folder)
    mutator = Mutator(make_seeds(arena.folder))
    figures = Figures()
    ordeal = Ordeal(arena, figures)
    guard = Guard()
    # What reaches the disk when is not the question here.
    os.fdatasync = lambda fd: None
    writeback.finish = lambda fd, offset=0, length=0: None

    async def work() -> None:
        with immediate_threads():
            for seed in mutator.seeds:  # sound ones, which also loads all code there is
                await ordeal.survive(seed.image_format, seed.content, len(seed.content), Random(0), seed.name)
            _become_nobody(folder)
            _limit_memory()
            bystanders = arena.bystanders()
            for number in range(options.seed, options.seed + options.count):
                with _told(number, mutator), guard.watching(arena.folder):
                    await _one(ordeal, mutator, number)
                if number % BYSTANDERS_EVERY == 0:
                    assert arena.bystanders() == bystanders, f"{number} or one before changed another file"
                    if options.until and time.time() > options.until:
                        break
            assert arena.bystanders() == bystanders

    asyncio.run(work())
    _tell(figures, time.monotonic() - began, time.process_time() - used, options)


async def _one(ordeal: Ordeal, mutator: Mutator, number: int) -> None:
    seed, mutant, random = mutator.mutant(number)
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    told = f"image {number}, {seed.name}: {mutant.told}"
    await ordeal.survive(seed.image_format, mutant.content, mutant.length, random, told)
    faulthandler.cancel_dump_traceback_later()


@contextmanager
def _told(number: int, mutator: Mutator) -> Iterator[None]:
    """Say which image it was that went wrong."""
    try:
        yield
    except BaseException:
        seed, mutant, _ = mutator.mutant(number)
        print(f"image {number}, {seed.name}: {mutant.told}", file=sys.stderr)
        raise


def _become_nobody(folder: Path) -> None:
    if os.geteuid() != 0:
        return
    nobody = pwd.getpwnam("nobody")
    codecs.lookup("unicode_escape")  # loaded when first used, perhaps from where nobody may not read
    for path in (folder, *folder.rglob("*")):
        os.chown(path, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)
    (folder / IMAGES / BASE).chmod(0o444)  # an image may name it as one that it writes to
    os.setgroups([])
    os.setresgid(nobody.pw_gid, nobody.pw_gid, nobody.pw_gid)
    os.setresuid(nobody.pw_uid, nobody.pw_uid, nobody.pw_uid)


def _limit_memory() -> None:
    """Let a MemoryError say who wants more than is left up to the limit."""
    gc.collect()
    pages, resident = map(int, Path("/proc/self/statm").read_text().split()[:2])
    limit = (pages - resident) * resource.getpagesize() + MEMORY_MAX
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _tell(figures: Figures, seconds: float, used_s: float, options: argparse.Namespace) -> None:
    peak = peak_memory()
    print(
        f"{figures.images:,} images, {figures.answers:,} answers, {figures.errors.total():,} errors of "
        f"{len(figures.errors):,} kinds in {seconds:.0f} s ({used_s:.0f} s of processor time); "
        f"peak memory {peak // MIB} MiB; slowest answer {figures.slowest_s * 1000:.0f} ms "
        f"({figures.slowest})"
    )
    for text, count in figures.errors.most_common() if options.errors else ():
        print(f"{count:12,}  {text}")
    assert figures.slowest_s < ANSWER_S_MAX, "an answer took too long"
    assert peak < MEMORY_MAX, "too much memory"


if __name__ == "__main__":
    main()
