"""Whether the disks that a crash left are what they may be.

Every state is checked, opened read-only and for writing, and compared with the model. What single disks
hold is remembered, for sequences that begin alike leave the same ones. On every different disk the stream
is run again to its end, and a sample, chosen by the disk's hash, is given to QEMU.
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from blockd.block.node import BlockNode, OverlayNode
from blockd.errors import BlockdError, ImageError
from blockd.formats.qcow2 import header as headers
from tests import qemu_img
from tests.chains import read_all
from tests.crash.scene import Scene, Since
from tests.inline_threads import immediate_threads
from tests.model import AfterCrash
from tests.recording import Disks, RecordingFile, Timeline
from tests.streaming import check, open_overlay, streaming

# What is remembered of single disks: each entry takes some 300 bytes.
VERDICT_COUNT_MAX = 500_000


class Verdict(NamedTuple):
    """What a guest would find in a file, by itself and with its backings."""

    problems: tuple[str, ...]
    content: bytes
    backing_name: str | None


@dataclass
class Judge:
    """Judges states; `rerun_every` and `qemu_every` say how large samples are: 1 is all, 0 is none."""

    rerun_every: int = 1
    qemu_every: int = 0
    folder: Path | None = None
    state_count: int = 0
    disk_count: int = 0
    rerun_count: int = 0
    qemu_count: int = 0
    _verdicts: dict[bytes, Verdict] = field(default_factory=dict, repr=False)
    _contents: dict[bytes, bytes] = field(default_factory=dict, repr=False)

    async def sweep(self, scene: Scene, *, start: int = 0, seed: int = 0, subset_count: int = 2) -> int:
        """Judge every crash from position `start` of the tape on; returns how many states there were.

        Raises:   AssertionError: a state is not what it may be; says which and why.
        """
        seen: set[tuple[Disks, tuple[int, ...]]] = set()
        timeline = Timeline(scene.files, scene.tape)
        positions = range(start, scene.position + 1)
        states = timeline.states(random.Random(seed), subset_count=subset_count, positions=positions)
        with immediate_threads():
            for position, what, disks in states:
                demands = _Demands.at(scene, position)
                key = (disks, demands.identity)
                if key not in seen:
                    seen.add(key)
                    problems = await self._problems(scene, disks, demands)
                    assert not problems, f"crash {_where(scene, position)}; {what}: {problems[:5]}"
        self.state_count += len(seen)
        return len(seen)

    def forget(self) -> None:
        """Let go of what is remembered of single disks: nothing of it will come again."""
        self._verdicts.clear()
        self._contents.clear()

    async def _problems(self, scene: Scene, disks: Disks, demands: "_Demands") -> list[str]:
        problems: list[str] = []
        for since in demands.history:
            for top in since.tops:
                verdict = await self._verdict(scene, disks, top)
                problems += verdict.problems
                if verdict.backing_name not in since.backing_names:
                    problems.append(f"its backing file is {verdict.backing_name}, not {since.backing_names}")
                for moment in demands.moments:
                    problems += moment.problems(verdict.content)
        for index, content in demands.frozen:
            verdict = await self._verdict(scene, disks, index)
            if verdict.content != content:
                problems.append(f"the former active image {index} has changed")
        return problems

    # -- single disks -----------------------------------------------------------------------------

    async def _verdict(self, scene: Scene, disks: Disks, top: int) -> Verdict:
        geometry = b"%d %d %d" % (scene.cluster_size, scene.cluster_count, top)
        own = disks[: (top + 1) * scene.part_count]
        digest = blake2b(b"".join(own), digest_size=16, salt=b"", person=geometry[:16]).digest()
        verdict = self._verdicts.get(digest)
        if verdict is None:
            verdict = await self._look(scene, disks, top)
            if len(self._verdicts) < VERDICT_COUNT_MAX:
                self._verdicts[digest] = verdict
            self.disk_count += 1
            await self._take_samples(scene, disks, top, verdict, int.from_bytes(digest))
        return verdict

    async def _look(self, scene: Scene, disks: Disks, top: int) -> Verdict:
        file = scene.file_after_crash(disks, top)
        try:
            report = await check(file)
            problems = [str(finding) for finding in report.findings if not finding.is_leak]
            image = await _open(scene, disks, top)
            content = await read_all(image)
            is_in_use = _says_that_it_is_in_use(file)
            await open_overlay(file, None)
        except BlockdError as error:
            return Verdict((error.message,), b"", None)
        is_marked = report.is_dirty or is_in_use
        if (file.log or (file.beside and file.beside.log)) and not is_marked:
            problems.append("opening wrote to it")
        leaks = 0 if scene.has_leaks else report.leaks
        has_marks = scene.image_format == "qed" or _knows_marks(file)
        if leaks and has_marks and not is_marked:
            problems.append("clusters are leaked, and nothing says so")
        if leaks and _knows_marks(file) and (await check(file)).leaks:
            problems.append("leaked clusters were not given back")
        content = self._contents.setdefault(content, content)
        return Verdict(tuple(problems), content, image.backing_filename)

    # -- samples ----------------------------------------------------------------------------------

    async def _take_samples(
        self, scene: Scene, disks: Disks, top: int, verdict: Verdict, number: int
    ) -> None:
        if verdict.problems:
            return
        if self.rerun_every and number % self.rerun_every == 0:
            self.rerun_count += await stream_again(scene, disks, top, verdict.content)
        if self.qemu_every and number % self.qemu_every == 0:
            self.qemu_count += 1
            self._ask_qemu(scene, disks, top, verdict)

    def _ask_qemu(self, scene: Scene, disks: Disks, top: int, verdict: Verdict) -> None:
        assert self.folder is not None
        for name, backing in scene.backings.items():
            (self.folder / str(name)).write_bytes(backing.disk)
        for file, disk in zip(scene.files, disks, strict=False):
            (self.folder / file.filename).write_bytes(disk)
        path = self.folder / scene.files[top].filename
        qemu_img.assert_sound(path, scene.image_format)
        assert qemu_img.content(path, scene.image_format) == verdict.content, "QEMU reads something else"


async def stream_again(scene: Scene, disks: Disks, top: int, content: bytes) -> bool:
    """Start where a crash left off, and stream to the end; tells whether there was anything to stream."""
    image = await _open(scene, disks, top, read_only=False)
    base = scene.nodes[scene.base_name]
    if image.backing is base:
        return False
    async with streaming(image) as disk:
        job = await disk.start(base)
        await job.wait_ended()
    assert job.error is None, job.error
    await image.close()
    file = image.children()["file"]
    assert isinstance(file, RecordingFile)
    final = file.again()
    assert (await check(final)).corruptions == 0
    whole = await open_overlay(final, base, read_only=True)
    assert whole.backing_filename == scene.base_name
    assert await read_all(whole) == content
    return True


def _knows_marks(file: RecordingFile) -> bool:
    """Whether it is a qcow2 image with a place for the bit that says that it is in use."""
    return file.disk[:4] == b"QFI\xfb" and headers.parse(bytes(file.disk), file.filename).version >= 3


def _says_that_it_is_in_use(file: RecordingFile) -> bool:
    if not _knows_marks(file):
        return False
    header = headers.parse(bytes(file.disk), file.filename)
    return bool(header.autoclear & headers.AUTOCLEAR_IN_USE)


async def _open(scene: Scene, disks: Disks, index: int, *, read_only: bool = True) -> OverlayNode:
    """Open one of the files as a crash left them, over the backing that it records."""
    file = scene.file_after_crash(disks, index)
    image = await open_overlay(file, None, read_only=read_only)
    image.backing = await _backing(scene, disks, image.backing_filename)
    return image


async def _backing(scene: Scene, disks: Disks, name: str | None) -> BlockNode | None:
    for index, file in enumerate(scene.files[:: scene.part_count]):
        if file.filename == name:
            return await _open(scene, disks, index)
    if name not in scene.nodes:
        raise ImageError(f"the backing file is {name!r:.50}")
    return scene.nodes[name]


async def problems_after_crash(
    file: RecordingFile, backings: Mapping[str | None, BlockNode | None], moments: Iterable[AfterCrash]
) -> list[str]:
    """Everything that is wrong with one file that a crash left; it has to record one of `backings`."""
    report = await check(file)
    problems = [str(finding) for finding in report.findings if not finding.is_leak]
    image = await open_overlay(file, None, read_only=True)
    if image.backing_filename not in backings:
        return [*problems, f"the backing file is {image.backing_filename}, not one of {list(backings)}"]
    image.backing = backings[image.backing_filename]
    content = await read_all(image)
    return problems + [problem for moment in moments for problem in moment.problems(content)]


# -- what has to be so ------------------------------------------------------------------------------


class _Demands(NamedTuple):
    """What a state at one position has to be."""

    moments: list[AfterCrash]
    history: list[Since]
    frozen: list[tuple[int, bytes]]

    @classmethod
    def at(cls, scene: Scene, position: int) -> "_Demands":
        """All that was so at any time while the tape had this length; at first that is what was so before."""
        moments = in_force((moment[0] for moment in scene.moments), position)
        history = in_force((since.position for since in scene.history), position)
        return cls(
            [scene.moments[index][1] for index in moments],
            [scene.history[index] for index in history],
            [(index, content) for since, index, content in scene.frozen if since <= position],
        )

    @property
    def identity(self) -> tuple[int, ...]:
        return (*map(id, self.moments), *map(id, self.history), len(self.frozen))


def in_force(positions: Iterable[int], position: int) -> list[int]:
    """Which of the records that begin at `positions` hold at some time while the tape has this length."""
    found: list[int] = []
    for index, start in enumerate(positions):
        if start < position:
            found = [index]
        elif start == position:
            found.append(index)
    return found


def _where(scene: Scene, position: int) -> str:
    if not position:
        return "before any entry"
    file, entry = scene.tape[position - 1]
    return f"after entry {position}, a {type(entry).__name__} in {file.filename}"
