"""Long lives of a disk: what happens is drawn, one thing after the other or several at once."""

import random
from dataclasses import dataclass, field
from typing import NamedTuple

from blockd.aio import task_group
from blockd.block.node import BlockNode
from tests.crash.judge import Judge
from tests.crash.operations import OPERATIONS, TARGETS, is_possible
from tests.crash.scene import COLD_SHARES, SETTLED_STEP_COUNT, Scene, unwrapped
from tests.doubles import LateNode
from tests.inline_threads import steps

GUEST_KINDS = ("write", "zero", "discard", "read")
DISK_KINDS = ("stream step", "flush", "cancel", "complete", "close", "grow", "switch")
# Disks of a life, mostly small ones: with clusters of 512 bytes an L2 table maps 64 of them.
GEOMETRIES = [(1024, 8), (1024, 12), (2048, 6), (512, 30), (512, 40), (512, 150)]
# A disk is not grown further than this.
CLUSTER_COUNT_MAX = 200
# Of what each crash could leave behind a long life looks at less than a short sequence.
SUBSET_COUNT = 2


class GuestStep(NamedTuple):
    """A guest operation on `length` sectors from the sector `start` on, taken modulo the disk's size."""

    kind: str
    start: int
    length: int


class DiskStep(NamedTuple):
    """One of `DISK_KINDS`; those that cannot be are left out."""

    kind: str


class Together(NamedTuple):
    """Guest operations at the same time; those that share a sector with another are left out."""

    steps: tuple[GuestStep, ...]


Step = GuestStep | DiskStep | Together


@dataclass
class Life:
    """A life as drawn; running it gives a scene to judge."""

    geometry: tuple[int, int]
    base_name: str | None
    is_slow: bool
    steps: list[Step] = field(default_factory=list)
    image_format: str = "qcow2"
    # What else the images are made with.
    options: tuple[tuple[str, object], ...] = ()
    # The backing answers late, so that guests are ahead of streams.
    is_late: bool = False
    # Over files that are not in the page cache, with small caches.
    is_cold: bool = False
    seed: int = 0

    async def run(self) -> Scene:
        """Live it; at the end the power is cut."""
        scene = Scene(
            *self.geometry,
            image_format=self.image_format,
            options=dict(self.options),
            base_name=self.base_name,
            is_slow=self.is_slow,
            cold_share=COLD_SHARES["cold"] if self.is_cold else 0,
            seed=self.seed,
            wrap_source=_late if self.is_late else unwrapped,
        )
        async with scene.running():
            for step in self.steps:
                await scene.look()
                await self._take(scene, step)
        return scene

    async def _take(self, scene: Scene, step: Step) -> None:
        if isinstance(step, GuestStep):
            await _use(scene, step)
        elif isinstance(step, Together):
            async with task_group() as tasks:
                for guest_step in step.steps:
                    tasks.create_task(_use(scene, guest_step))
                    await steps(guest_step.start % 3)
        elif is_possible(step.kind, scene):
            has_room = scene.model.size // scene.cluster_size < CLUSTER_COUNT_MAX
            if step.kind != "grow" or has_room:
                await OPERATIONS[step.kind](scene)


def _late(source: BlockNode) -> BlockNode:
    return LateNode(source, random.Random(1), SETTLED_STEP_COUNT)


async def _use(scene: Scene, step: GuestStep) -> None:
    sector_count = scene.model.size // 512
    start = step.start % sector_count
    end = min(start + step.length, sector_count)
    taken = (start * 512, end * 512)
    if any(low < taken[1] and taken[0] < high for low, high in scene.model.busy):
        return
    scene.model.busy.append(taken)
    try:
        per_cluster = scene.cluster_size // 512
        operation = getattr(scene, step.kind)
        await operation(start / per_cluster, (end - start) / per_cluster)
    finally:
        scene.model.busy.remove(taken)


def draw(rng: random.Random, step_count: int) -> Life:
    """Draw a life by a random generator."""
    life = Life(rng.choice(GEOMETRIES), rng.choice(TARGETS), rng.random() < 0.5)
    for _ in range(step_count):
        kind = rng.choices(["guest", "disk", "together"], weights=[6, 5, 2])[0]
        if kind == "guest":
            life.steps.append(_draw_guest_step(rng))
        elif kind == "disk":
            life.steps.append(DiskStep(rng.choices(DISK_KINDS, weights=[8, 8, 1, 1, 1, 1, 1])[0]))
        else:
            life.steps.append(Together(tuple(_draw_guest_step(rng) for _ in range(rng.randrange(2, 5)))))
    life.is_late = rng.random() < 0.5
    life.is_cold = rng.random() < 0.5
    life.seed = rng.getrandbits(32)
    return life


def _draw_guest_step(rng: random.Random) -> GuestStep:
    kind = rng.choices(GUEST_KINDS, weights=[6, 2, 2, 2])[0]
    return GuestStep(kind, rng.randrange(400), rng.choice([1, 1, 2, 3, 4, 8, 16]))


async def judge_life(judge: Judge, life: Life, seed: int = 0) -> int:
    """Run a life and judge every crash in it; returns how many states there were."""
    scene = await life.run()
    count = await judge.sweep(scene, seed=seed, subset_count=SUBSET_COUNT)
    judge.forget()
    return count
