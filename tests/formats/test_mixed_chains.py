"""Every format on every format, up to 16 deep, with different cluster sizes and sizes.

Each chain is read, streamed to a base and to nothing, and compared with a model; QEMU reads it too where
it knows all the formats. A format that is new in FORMATS takes part by that alone.
"""

import random
from pathlib import Path

import pytest

from blockd.block.chain import chain
from blockd.block.node import BlockNode
from blockd.drivers import FORMATS
from tests import qemu_img
from tests.layers import OVERLAY_FORMATS, Layers, make_layers, opened, random_layers
from tests.qemu_img import qemu

pytestmark = pytest.mark.slow

# What QEMU does not know.
OWN_FORMATS = {"add-cow"}

PAIRS = [(base, top) for base in FORMATS for top in OVERLAY_FORMATS]


async def check_reads(node: BlockNode, content: bytes, rng: random.Random) -> None:
    """All of it, and ranges that begin and end anywhere."""
    assert node.size == len(content)
    ranges = [(0, node.size)]
    for _ in range(20):
        offset = rng.randrange(node.size)
        ranges.append((offset, rng.randrange(1, min(200_000, node.size - offset) + 1)))
    for offset, length in ranges:
        data = node.read_nowait(offset, length)
        if data is None:
            data = await node.read(offset, length)
        assert bytes(data) == content[offset : offset + length], f"{offset:#x}+{length:#x}"


def check_in_qemu(made: Layers) -> None:
    """QEMU finds nothing wrong and reads the same."""
    if {layer.image_format for layer in made.layers} & OWN_FORMATS:
        return
    image_format = made.layers[-1].image_format
    qemu("qemu-img", "check", "-q", "-f", image_format, made.active)
    assert qemu_img.content(made.active, image_format) == made.contents[-1]


def check_alone_in_qemu(path: Path, image_format: str, content: bytes) -> None:
    """The same of an image that has no backing any more: its chain is out of the way."""
    if image_format in OWN_FORMATS:
        return
    qemu("qemu-img", "check", "-q", "-f", image_format, path)
    assert qemu_img.content(path, image_format) == content


async def run_life(folder: Path, formats: list[str], seed: int) -> None:
    """Make a chain, read it, stream it to a base and then to nothing, opening it anew each time."""
    rng = random.Random(seed)
    made = await make_layers(folder, random_layers(rng, formats), rng)
    content, top_format = made.contents[-1], formats[-1]
    async with opened(made.active, top_format, read_only=True) as disk:
        assert [node.filename for node in chain(disk.node)] == [str(path) for path in reversed(made.paths)]
        await check_reads(disk.node, content, rng)
    check_in_qemu(made)
    base = rng.randrange(len(formats) - 1)
    async with opened(made.active, top_format) as disk:
        await disk.stream(disk.layer(made.paths[base]))
        await check_reads(disk.node, content, rng)
    for path in made.paths[base + 1 : -1]:
        path.unlink()
    async with opened(made.active, top_format) as disk:
        assert len(list(chain(disk.node))) == base + 2
        await check_reads(disk.node, content, rng)
        await disk.stream(None)
        await check_reads(disk.node, content, rng)
    for path in made.paths[: base + 1]:
        path.unlink()
    async with opened(made.active, top_format, read_only=True) as disk:
        assert disk.node.backing is None
        await check_reads(disk.node, content, rng)
    check_alone_in_qemu(made.active, top_format, content)


@pytest.mark.parametrize(("base", "top"), PAIRS)
async def test_every_format_on_every_format(tmp_path: Path, base: str, top: str) -> None:
    await run_life(tmp_path, [base, top], seed=len(base) * 100 + len(top))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
async def test_deep_chains(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    depth = 16 if seed % 3 == 0 else rng.randrange(3, 16)
    formats = [rng.choice(list(FORMATS)), *(rng.choice(OVERLAY_FORMATS) for _ in range(depth - 1))]
    await run_life(tmp_path, formats, seed)
