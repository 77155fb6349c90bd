"""Backing chains drawn as text, made by QEMU or by blockd, and opened as nodes."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from blockd.block.node import BlockNode
from blockd.formats.qcow2.create import create
from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.raw.image import RawImage
from blockd.protocols.file import FileNode
from blockd.protocols.new_file import new_file
from tests import qemu_img
from tests.model import cluster, drawn
from tests.qemu_img import qemu


@dataclass(frozen=True)
class Chain:
    """Image files, base first, and what a guest of the last one reads."""

    paths: list[Path]
    formats: list[str]
    cluster_size: int
    content: bytes

    @property
    def active(self) -> Path:
        return self.paths[-1]


def _describe(folder: Path, layers: Sequence[str], cluster_size: int, base_format: str) -> Chain:
    formats = [base_format] + ["qcow2"] * (len(layers) - 1)
    paths = [folder / f"layer{number}.{suffix}" for number, suffix in enumerate(formats)]
    return Chain(paths, formats, cluster_size, drawn(layers, cluster_size))


def make_with_qemu(
    folder: Path, layers: Sequence[str], cluster_size: int = 65536, base_format: str = "qcow2"
) -> Chain:
    """Draw a chain with qemu-img and qemu-io."""
    chain = _describe(folder, layers, cluster_size, base_format)
    for number, (path, drawing) in enumerate(zip(chain.paths, layers, strict=True)):
        size = len(drawing) * cluster_size
        if chain.formats[number] == "raw":
            path.write_bytes(drawn([drawing], cluster_size))
            continue
        backing = chain.paths[number - 1] if number else None
        options = f"cluster_size={cluster_size}"
        qemu_img.create(path, size, options, backing=backing, backing_format=chain.formats[number - 1])
        commands = _qemu_io_commands(folder, drawing, cluster_size)
        if commands:
            qemu_img.write(path, *commands)
    return chain


def _qemu_io_commands(folder: Path, drawing: str, cluster_size: int) -> list[str]:
    commands = []
    for index, kind in enumerate(drawing):
        where = f"{index * cluster_size} {cluster_size}"
        if kind == "0":
            commands.append(f"write -z {where}")
        elif kind != "-":
            data = folder / f"data-{kind}-{index}"
            data.write_bytes(cluster(kind, index, cluster_size))
            commands.append(f"write -s {data} {where}")
    return commands


async def make(
    folder: Path, layers: Sequence[str], cluster_size: int = 65536, base_format: str = "qcow2"
) -> Chain:
    """Draw a chain with blockd's own code."""
    chain = _describe(folder, layers, cluster_size, base_format)
    for number, (path, drawing) in enumerate(zip(chain.paths, layers, strict=True)):
        if chain.formats[number] == "raw":
            path.write_bytes(drawn([drawing], cluster_size))
            continue
        async with new_file(str(path)) as file:
            await create(
                file,
                len(drawing) * cluster_size,
                cluster_size=cluster_size,
                backing_filename=str(chain.paths[number - 1]) if number else None,
                backing_format=chain.formats[number - 1] if number else None,
            )
        async with opened(chain, number) as image:
            await _draw(image, drawing, cluster_size)
    return chain


async def _draw(image: Qcow2Image, drawing: str, cluster_size: int) -> None:
    for index, kind in enumerate(drawing):
        if kind == "0":
            await image.write_zeroes(index * cluster_size, cluster_size)
        elif kind != "-":
            await image.write(index * cluster_size, cluster(kind, index, cluster_size))


@asynccontextmanager
async def opened(chain: Chain, number: int = -1, *, read_only: bool = False) -> AsyncIterator[Qcow2Image]:
    """Open one layer with all its backings, which are read-only."""
    number %= len(chain.paths)
    async with AsyncExitStack() as stack:
        backing: BlockNode | None = None
        for index in range(number + 1):
            node = await _open_layer(stack, chain, index, read_only=read_only or index < number)
            node.backing = backing
            backing = node
        assert isinstance(backing, Qcow2Image)
        yield backing


async def _open_layer(stack: AsyncExitStack, chain: Chain, index: int, *, read_only: bool) -> BlockNode:
    file = await FileNode.open(str(chain.paths[index]), node_name=f"file{index}", read_only=read_only)
    stack.push_async_callback(file.close)
    driver: type[RawImage] | type[Qcow2Image] = RawImage if chain.formats[index] == "raw" else Qcow2Image
    node: BlockNode = await driver.open(file, node_name=f"layer{index}", read_only=read_only)
    stack.push_async_callback(node.close)
    return node


async def read_all(node: BlockNode, step: int = 1 << 20) -> bytes:
    """Everything a guest of the node reads."""
    parts = []
    for offset in range(0, node.size, step):
        length = min(step, node.size - offset)
        data = node.read_nowait(offset, length)
        parts.append(bytes(await node.read(offset, length) if data is None else data))
    return b"".join(parts)


def assert_same_in_qemu(chain: Chain, expected: bytes) -> None:
    """QEMU reads the same, and finds nothing wrong."""
    qemu_img.assert_sound(chain.active)
    expected_path = chain.active.with_name("expected.raw")
    expected_path.write_bytes(expected)
    qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", chain.active, expected_path)
