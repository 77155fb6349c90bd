"""One disk of a storm: its images, what guests may find, what was acknowledged of its chain and job."""

import asyncio
import random
from pathlib import Path

from blockd.errors import BlockdError
from blockd.formats.qcow2.create import create as create_qcow2
from blockd.formats.qed.create import create as create_qed
from blockd.protocols.nbd_client import NbdClient
from blockd.protocols.new_file import new_file
from tests import qemu_img
from tests.guest import Guest
from tests.model import ModelDisk, drawn
from tests.nbd_disk import NbdDisk
from tests.qmp_client import Json
from tests.storm.life import Life

CLUSTER = 65536
LAYERS = ["ABCDEFGH" * 2, "-X--0---" * 2]
SIZE = len(LAYERS[0]) * CLUSTER
SIZE_MAX = 2 * SIZE
GUEST_COUNT = 2
# A director with so many images below the active one streams before it puts another on top.
DEPTH_MAX = 6


class Disk:
    """What is known of a disk from outside; several lives of the daemon long."""

    def __init__(self, name: str, folder: Path, image_format: str) -> None:
        self.name = name
        self.folder = folder
        self.format = image_format
        self.active = folder / f"{name}-0.{image_format}"
        self.model = ModelDisk(drawn(LAYERS, CLUSTER))
        # What a command that is not answered yet would make of these two.
        self.next_active: Path | None = None
        self.next_size: int | None = None
        # One change of the chain at a time, so that there is one such command at most.
        self.changing = asyncio.Lock()
        self.depth = 1
        # Streams that were asked for and begun, and ends that were told.
        self.asked_count = self.begun_count = self.told_count = 0
        # Whether the job is paused, if that is known; verbs under way.
        self.is_paused: bool | None = None
        self.verb_count = 0
        self._number = 0

    async def make(self) -> None:
        """Make the images: a raw base, and an overlay."""
        base = self.folder / f"{self.name}-base.raw"
        base.write_bytes(drawn(LAYERS[:1], CLUSTER))
        await make_overlay(self.active, self.format, SIZE, base, "raw")
        content = drawn(LAYERS, CLUSTER)
        for index, kind in enumerate(LAYERS[1]):
            if kind != "-":
                (self.folder / "data").write_bytes(content[index * CLUSTER : (index + 1) * CLUSTER])
                where = f"{index * CLUSTER} {CLUSTER}"
                qemu_img.write(
                    self.active, f"write -s {self.folder / 'data'} {where}", image_format=self.format
                )

    def new_path(self, image_format: str) -> Path:
        self._number += 1
        return self.folder / f"{self.name}-{self._number}.{image_format}"

    # -- guests -------------------------------------------------------------------------------

    async def use(self, life: Life, seed: int) -> None:
        """Be a guest until the daemon is gone; nothing may fail before."""
        try:
            client = await NbdClient.connect_unix(str(life.daemon.nbd_path), self.name)
            guest = Guest(NbdDisk(client), self.model, random.Random(seed), cluster_size=CLUSTER)
            while not life.is_over:
                await guest.step()
        except (BlockdError, OSError):
            if not life.is_over:
                raise

    # -- after a kill or a stop ---------------------------------------------------------------

    def check_image(self) -> None:
        """Ask qemu-img about the active image, which nobody uses."""
        qemu_img.assert_sound(self.active, self.active.suffix[1:])

    def check_content(self, content: bytes, *, is_clean: bool) -> None:
        """Compare what guests find now with what was acknowledged; from here on that is what there is."""
        sizes = {self.model.size, self.next_size or self.model.size}
        assert len(content) in sizes, f"{self.name}: {len(content)} bytes, not {sizes}"
        size = self.model.size
        assert not any(content[size:]), f"{self.name}: what is new is not zero"
        if is_clean:
            self.model.check_read(0, content[:size])
        problems = [] if is_clean else list(self.model.after_crash().problems(content[:size]))
        assert problems == [], f"{self.name}: {problems[:5]}"
        self.model = ModelDisk(content)
        self.next_size = None

    def check_chain(self, block: Json) -> None:
        """Compare what query-block tells with the switches that were acknowledged."""
        active = Path(block["inserted"]["file"])
        assert active in (self.active, self.next_active), f"{self.name}: on {active}, not {self.active}"
        self.active, self.next_active = active, None
        files, image = [], block["inserted"]["image"]
        while image is not None:
            files.append(Path(image["filename"]))
            image = image.get("backing-image")
        self.depth = len(files) - 1
        for path in self.folder.glob(f"{self.name}-*"):
            if path not in files:
                path.unlink()

    def check_job(self, jobs: Json) -> None:
        """Compare the job with the verbs that were acknowledged."""
        for job in jobs:
            if job["device"] == self.name and self.is_paused is not None and not self.verb_count:
                assert job["paused"] == self.is_paused, f"{self.name}: {job}"
        self.is_paused = None
        self.verb_count = 0


async def make_overlay(path: Path, image_format: str, size: int, backing: Path, backing_format: str) -> None:
    create = create_qed if image_format == "qed" else create_qcow2
    async with new_file(str(path)) as file:
        await create(file, size, backing_filename=str(backing), backing_format=backing_format)
