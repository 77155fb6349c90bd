"""Chains of images of any formats, with different cluster sizes and sizes, beside a model of each layer.

    layers = random_layers(rng, ["raw", "qcow2", "qed"])
    chain = await make_layers(folder, layers, rng)
    chain.contents[-1]              what a guest of the topmost layer reads

A format joins by being in FORMATS: what it can be told decides how its layers are made.
"""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from blockd.block.image_paths import ImagePaths
from blockd.block.node import BlockNode
from blockd.cli.image.create import NewImage, create_image
from blockd.devices.device import Devices
from blockd.devices.stream_request import StreamRequest
from blockd.devices.streams import Streams
from blockd.drivers import FORMATS, NodeGraph
from blockd.jobs.manager import JobManager
from blockd.units import KIB, SECTOR_SIZE
from tests.model import stamp
from tests.streaming import Observer

OVERLAY_FORMATS = tuple(name for name, entry in FORMATS.items() if entry.has_backing)

# Cluster sizes that every format with clusters has, and those that only one has.
_CLUSTER_SIZES = (4 * KIB, 64 * KIB)
_OWN_CLUSTER_SIZES = {"qcow2": (512, 2048 * KIB)}


class Layer(NamedTuple):
    """What one image of a chain is to be."""

    image_format: str
    size: int
    cluster_size: int


@dataclass(frozen=True)
class Layers:
    """Images, base first, and what is read from each, its backing files included."""

    layers: list[Layer]
    paths: list[Path]
    contents: list[bytes]

    @property
    def active(self) -> Path:
        return self.paths[-1]


def random_layers(rng: random.Random, formats: Sequence[str], size_max: int = 1024 * KIB) -> list[Layer]:
    """Layers of these formats, base first; each is larger or smaller than the one below it."""
    layers = []
    for image_format in formats:
        size = rng.randrange(size_max // 4, size_max + 1, SECTOR_SIZE)
        cluster_size = rng.choice(_CLUSTER_SIZES + _OWN_CLUSTER_SIZES.get(image_format, ()))
        layers.append(Layer(image_format, size, cluster_size))
    return layers


async def make_layers(folder: Path, layers: Sequence[Layer], rng: random.Random) -> Layers:
    """Make the images with blockd, and let a guest of each do something before the next is put on top."""
    paths: list[Path] = []
    contents: list[bytes] = []
    for number, layer in enumerate(layers):
        path = folder / f"layer{number}.{layer.image_format}"
        backing = paths[-1].name if paths else None
        backing_format = layers[number - 1].image_format if paths else None
        options = creation_options(path, layer)
        image = NewImage(layer.image_format, layer.size, backing, backing_format, options)
        await create_image(str(path), image)
        content = bytearray((contents[-1] if contents else b"")[: layer.size].ljust(layer.size, b"\0"))
        async with opened(path, layer.image_format) as disk:
            await change(disk.node, content, number, rng)
        paths.append(path)
        contents.append(bytes(content))
    return Layers(list(layers), paths, contents)


def creation_options(path: Path, layer: Layer) -> dict[str, object]:
    """What the format has to be told beside size and backing file."""
    known = FORMATS[layer.image_format].create_options
    options: dict[str, object] = {}
    if "cluster_size" in known:
        options["cluster_size"] = layer.cluster_size
    if "image_file" in known:
        data = path.with_suffix(".data")
        data.touch()
        data.open("r+b").truncate(layer.size)
        options["image_file"] = data.name
    return options


async def change(node: BlockNode, content: bytearray, number: int, rng: random.Random) -> None:
    """Write, zero and unmap here and there: some of it in whole clusters, some not."""
    for count in range(rng.randrange(3, 8)):
        unit = rng.choice([SECTOR_SIZE, 4 * KIB, 64 * KIB])
        offset = rng.randrange(0, node.size, unit)
        length = min(rng.randrange(1, 4) * unit, node.size - offset)
        kind = rng.choice(["write", "write", "zero"])
        data = stamp(number * 100 + count, offset, length) if kind == "write" else bytes(length)
        content[offset : offset + length] = data
        if kind == "write":
            await node.write(offset, data)
        else:
            await node.write_zeroes(offset, length, unmap=rng.random() < 0.5)


class Disk(NamedTuple):
    """An image that is open with its chain, and what can be done with it."""

    graph: NodeGraph
    node: BlockNode
    streams: Streams

    def layer(self, path: Path) -> BlockNode:
        """The node of a layer, by its image file."""
        [found] = [
            node
            for node in self.graph.nodes.values()
            if node.filename == str(path) and "file" in node.children()
        ]
        return found

    async def stream(self, base: BlockNode | None) -> None:
        """Stream down to `base`, to the end."""
        failures: list[object] = []
        request = StreamRequest(self.node, "stream", base, on_done=lambda job: failures.append(job.error))
        job = await self.streams.start(request)
        await job.wait_ended()
        assert failures == [None]


@asynccontextmanager
async def opened(path: Path, image_format: str, *, read_only: bool = False) -> AsyncIterator[Disk]:
    """Open an image with all the backing files that it records, as a device."""
    graph = NodeGraph(ImagePaths())
    try:
        node = await graph.open_image(str(path), image_format, read_only=read_only)
        devices = Devices(graph)
        devices.add("disk", node)
        async with JobManager(Observer()) as jobs:
            yield Disk(graph, node, Streams(devices, jobs))
    finally:
        await graph.close()
