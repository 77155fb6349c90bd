"""A population of images with a past, and whether blockd says of each what qemu-img says.

    python -m tests.interop.population --images 2000 --seed 7

Each image is made with options drawn from a seed, written, and then resized, amended, rebased, committed,
given snapshots and bitmaps, in any order, by QEMU's tools. `check`, `info` and `map` of both must agree.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blockd.block.chain import chain
from blockd.cli.image.check import check_image, report_object
from blockd.cli.image.info import describe
from blockd.cli.image.map import chain_entries, entry_json
from blockd.cli.image.opening import opened_image
from blockd.errors import BlockdError
from blockd.units import KIB, MIB, SECTOR_SIZE
from tests.interop.peer import commands
from tests.qemu_img import qemu

Answers = dict[str, Any]

# qemu-img 7.2 hangs when it is to amend some images.
TOOL_TIMEOUT_S = 100

# What qemu-img is not asked about, or what only we tell.
OUR_OWN = {"findings"}


class Member:
    """One image of the population, made from a seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.folder = folder
        self.format = self.rng.choices(["qcow2", "qed", "raw"], weights=[12, 3, 1])[0]
        self.path = folder / f"disk.{self.format}"
        self.size = self.rng.randrange(1, 6 * MIB // SECTOR_SIZE) * SECTOR_SIZE
        # What was done, for the message of a failure.
        self.past: list[str] = []
        # Names that were given to snapshots and bitmaps.
        self.names: list[str] = []

    def make(self) -> None:
        """Make it, and let QEMU's tools work on it; what they refuse is left out."""
        options = self._options()
        backing = self._backing() if self.format != "raw" and self.rng.random() < 0.6 else []
        chosen = ["-o", ",".join(options)] if options else []
        self._tool("create", "-q", "-f", self.format, *chosen, *backing, self.path, self.size)
        if not self.path.exists():  # these options do not go together
            self._tool("create", "-q", "-f", self.format, *backing, self.path, self.size)
        turns = [self._write, self._resize] if self.format == "raw" else self._turns()
        self._write()
        for _ in range(self.rng.randrange(6)):
            self.rng.choice(turns)()

    def _options(self) -> list[str]:
        draw = self.rng.choice
        if self.format == "qed":
            return [f"cluster_size={draw(['4k', '64k', '1M'])}", f"table_size={draw([2, 4, 16])}"]
        if self.format == "raw":
            return [f"preallocation={draw(['off', 'falloc', 'full'])}"]
        options = [
            f"compat={draw(['0.10', '1.1', '1.1', '1.1'])}",
            f"cluster_size={draw(['512', '4k', '16k', '64k', '64k', '2M'])}",
            f"refcount_bits={draw([1, 2, 4, 8, 16, 16, 16, 32, 64])}",
            f"lazy_refcounts={draw(['on', 'off'])}",
            f"compression_type={draw(['zlib', 'zstd'])}",
            f"extended_l2={draw(['on', 'off', 'off'])}",
            f"preallocation={draw(['off', 'off', 'metadata', 'falloc', 'full'])}",
        ]
        return self.rng.sample(options, self.rng.randrange(len(options)))

    def _backing(self) -> list[str]:
        base_format = self.rng.choice(["raw", "qcow2", "qed"])
        base = self.folder / f"base.{base_format}"
        size = self.rng.choice(
            [self.size, self.size // 2 // SECTOR_SIZE * SECTOR_SIZE + SECTOR_SIZE, 7 * MIB]
        )
        qemu("qemu-img", "create", "-q", "-f", base_format, base, str(size))
        self._io(base, base_format, size)
        return ["-b", self.rng.choice([str(base), base.name]), "-F", base_format]

    def _turns(self) -> list[Callable[[], None]]:
        turns = [self._write, self._write, self._resize, self._rebase, self._commit]
        if self.format == "qcow2":
            turns += [self._snapshot, self._snapshot, self._bitmap, self._amend, self._compress]
        return turns

    def _tool(self, *words: object) -> None:
        told = [str(word) for word in words]
        command = ["qemu-img", *told]
        try:
            result = subprocess.run(command, capture_output=True, timeout=TOOL_TIMEOUT_S, check=False)
            end = "" if result.returncode == 0 else "  (refused)"
        except subprocess.TimeoutExpired:
            end = "  (did not end)"  # and was killed: what it leaves is an image, too
        self.past.append(" ".join(told) + end)

    def _io(self, path: Path, image_format: str, size: int, *more: str) -> None:
        unit = self.rng.choice([SECTOR_SIZE, 4 * KIB, 64 * KIB])
        lines = [*commands(self.rng, size, unit, count=self.rng.randrange(1, 12)), *more]
        words = [word for line in lines for word in ("-c", line)]
        self.past.append(" ".join(words))
        qemu("qemu-io", "-t", "unsafe", "-d", "unmap", "-f", image_format, *words, path, expect=None)

    # -- turns --------------------------------------------------------------------------------

    def _write(self) -> None:
        self._io(self.path, self.format, self.size)

    def _compress(self) -> None:
        self._io(self.path, self.format, self.size, "write -c -P 5 0 64k", "write -c -P 6 128k 64k")

    def _resize(self) -> None:
        size = self.rng.randrange(1, 8 * MIB // SECTOR_SIZE) * SECTOR_SIZE
        self._tool("resize", "-f", self.format, "--shrink", self.path, size)
        self.size = min(size, self.size)

    def _rebase(self) -> None:
        mode = ["-u"] if self.rng.random() < 0.5 else []
        base = self.folder / "other.raw"
        base.write_bytes(self.rng.randbytes(MIB))
        target: list[object] = self.rng.choice([["-b", ""], ["-b", base, "-F", "raw"]])
        self._tool("rebase", *mode, "-f", self.format, *target, self.path)

    def _commit(self) -> None:
        self._tool("commit", *self.rng.choice([[], ["-d"]]), "-f", self.format, self.path)

    def _snapshot(self) -> None:
        if self.names and self.rng.random() < 0.5:
            self._tool("snapshot", self.rng.choice(["-a", "-d"]), self.rng.choice(self.names), self.path)
        else:
            self.names.append(self.rng.choice(["s", "a snapshot", "größer"]) + str(len(self.names)))
            self._tool("snapshot", "-c", self.names[-1], self.path)

    def _bitmap(self) -> None:
        action = self.rng.choice(["--add", "--add", "--disable", "--remove", "--clear"])
        self._tool("bitmap", action, self.path, self.rng.choice(["tracks", "b"]))

    def _amend(self) -> None:
        option = self.rng.choice(
            ["compat=0.10", "compat=1.1", "lazy_refcounts=on", "lazy_refcounts=off", "refcount_bits=32"]
        )
        self._tool("amend", "-f", self.format, "-o", option, self.path)

    # -- both verdicts ------------------------------------------------------------------------

    def theirs(self) -> dict[str, object]:
        """What qemu-img says."""
        word = ["--output=json", "-f", self.format, str(self.path)]
        check = _answer("check", *word)
        infos = _answer("info", "--backing-chain", *word)
        return {"check": check, "info": infos, "map": _plain_map(_answer("map", *word), infos)}

    async def ours(self) -> dict[str, object]:
        """What blockd says."""
        try:
            report, found_format = await check_image(str(self.path), self.format, None)
            ours = OUR_OWN if self.format == "qcow2" else OUR_OWN | {"image-end-offset"}
            check: object = _without(report_object(report, found_format), ours)
        except BlockdError:
            check = None
        try:
            async with opened_image(str(self.path), self.format, [str(self.folder)]) as (image, _):
                infos = [describe(layer, _disk_usage(layer.filename)) for layer in chain(image)]
                found = [entry async for some in chain_entries(image, 0, image.size) for entry in some]
        except BlockdError:
            return {"check": check, "info": None, "map": None}
        return {
            "check": check,
            "info": infos,
            "map": _plain_map([json.loads(entry_json(entry)) for entry in found], infos),
        }

    async def differences(self) -> list[str]:
        """Where the two differ."""
        theirs, ours = self.theirs(), await self.ours()
        return [
            f"{subject}:\n  QEMU   {theirs[subject]}\n  blockd {ours[subject]}"
            for subject in theirs
            if theirs[subject] != ours[subject]
        ]


def _plain_map(
    entries: list[dict[str, Any]] | None, infos: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]] | None:
    """What both tell of the map of a chain.

    qemu-img also tells where zero clusters of qcow2 images keep a place, and of some images (those that
    use more clusters than take space) which data is a hole of the file: docs/qmp-differences.md.
    """
    if entries is None:
        return None
    found: list[dict[str, Any]] = []
    for entry in entries:
        plain = dict(entry)
        if infos[entry["depth"]]["format"] == "qcow2":
            plain["zero"] = not entry["data"]
            if not entry["data"]:
                plain.pop("offset", None)
        if found and _continues(plain, found[-1]):
            found[-1]["length"] += plain["length"]
        else:
            found.append(plain)
    return found


def _continues(entry: dict[str, Any], last: dict[str, Any]) -> bool:
    kinds = ("depth", "present", "zero", "data")
    end = last["offset"] + last["length"] if "offset" in last else None
    return all(entry[kind] == last[kind] for kind in kinds) and entry.get("offset") == end


def _answer(*words: str) -> Any:
    text = qemu("qemu-img", *words, expect=None)
    return json.loads(text) if text.strip() else None


def _without(found: dict[str, object], names: set[str]) -> dict[str, object]:
    return {name: value for name, value in found.items() if name not in names}


def _disk_usage(filename: str) -> int:
    return Path(filename).stat().st_blocks * 512


async def find_differences(seeds: range) -> tuple[list[str], Counter[str]]:
    """Make the images of some seeds; tells where the two differ, and how many there were of each format."""
    found, counts = [], Counter[str]()
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            member = Member(Path(folder), seed)
            member.make()
            counts[member.format] += 1
            past = "".join(f"\n  {line}" for line in member.past)
            found += [f"seed {seed}:{past}\n{told}" for told in await member.differences()]
    return found, counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first one")
    options = parser.parse_args()
    found, counts = asyncio.run(find_differences(range(options.seed, options.seed + options.images)))
    print("\n".join(found))
    print(", ".join(f"{count} {image_format}" for image_format, count in sorted(counts.items())), end=": ")
    print(f"{len(found)} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
