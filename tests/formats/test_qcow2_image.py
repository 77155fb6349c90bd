"""The qcow2 node against QEMU and against the model disk."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from blockd.block.chain import chain_map
from blockd.block.root import Root
from blockd.errors import ErrorKind, RequestError
from blockd.extents import Kind
from blockd.units import KIB, MIB
from tests import chains, qemu_img
from tests.chains import read_all
from tests.guest import churn
from tests.model import ModelDisk

# Base first; see tests/model.py.
DRAWINGS: dict[str, Sequence[str]] = {
    "alone": ["AB-0-C"],
    "one overlay": ["ABCDEF", "-X0-Y-"],
    "three deep": ["AAAAAA", "B-0B--", "--C0C-"],
    "six deep": ["AAAAAAA", "-B-----", "--C----", "---D---", "----0--", "-----F-"],
    "shorter base": ["AB", "--C-0-"],
    "longer base": ["ABCDEFGH", "-X-0"],
    "short in the middle": ["ABCDEFGH", "-X-", "------"],
    "all zeroes over data": ["ABCD", "0000"],
    "empty": ["----", "----"],
}
CLUSTER_SIZES = [512, 4 * KIB, 64 * KIB, 2 * MIB]
drawings = pytest.mark.parametrize("layers", DRAWINGS.values(), ids=list(DRAWINGS))


@pytest.mark.slow
@drawings
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
async def test_chains_made_by_qemu_read_equal(
    tmp_path: Path, layers: Sequence[str], cluster_size: int
) -> None:
    base_format = "raw" if len(layers) > 1 and cluster_size == 4 * KIB else "qcow2"
    chain = chains.make_with_qemu(tmp_path, layers, cluster_size, base_format)

    async with chains.opened(chain, read_only=True) as image:
        assert await read_all(image, 3 * cluster_size) == chain.content
        assert await read_all(image, cluster_size) == chain.content


@drawings
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
async def test_chains_made_here_read_equal_in_qemu(
    tmp_path: Path, layers: Sequence[str], cluster_size: int
) -> None:
    base_format = "raw" if len(layers) > 1 and cluster_size != 4 * KIB else "qcow2"
    chain = await chains.make(tmp_path, layers, cluster_size, base_format)

    chains.assert_same_in_qemu(chain, chain.content)
    verdict = qemu_img.check(chain.active)
    assert verdict is not None
    assert verdict.leaks == 0


@drawings
async def test_map_says_what_was_drawn(tmp_path: Path, layers: Sequence[str]) -> None:
    chain = chains.make_with_qemu(tmp_path, layers)
    kinds = {"0": Kind.ZERO, "-": Kind.UNALLOCATED}

    async with chains.opened(chain, read_only=True) as image:
        for index, drawn in enumerate(layers[-1]):
            [extent] = await image.map(index * chain.cluster_size, chain.cluster_size)
            assert extent.kind is kinds.get(drawn, Kind.DATA)
            [extent] = await chain_map(image, index * chain.cluster_size, chain.cluster_size)
            content = chain.content[index * chain.cluster_size : (index + 1) * chain.cluster_size]
            assert (extent.kind is Kind.DATA) == any(content)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [["AB-0-CD-"], ["ABCDEFGH", "-X0-Y---"], ["ABC", "-B-----D", "--C-0---"]])
@pytest.mark.parametrize(
    ("cluster_size", "seed"), [(512, 1), (4 * KIB, 2), (4 * KIB, 3), (64 * KIB, 4), (2 * MIB, 5)]
)
async def test_random_guests_agree_with_the_model(
    tmp_path: Path, layers: Sequence[str], cluster_size: int, seed: int
) -> None:
    chain = chains.make_with_qemu(tmp_path, layers, cluster_size, "raw" if len(layers) > 1 else "qcow2")
    model = ModelDisk(chain.content)
    rng = random.Random(seed)
    step_count = 20 if cluster_size > 64 * KIB else 200

    for _ in range(3):
        async with chains.opened(chain) as image:
            await churn(Root(image), model, rng, step_count=step_count, guest_count=4)
    chains.assert_same_in_qemu(chain, bytes(model.content))
    verdict = qemu_img.check(chain.active)
    assert verdict is not None
    assert verdict.leaks == 0


async def test_many_small_clusters_make_the_tables_grow(tmp_path: Path) -> None:
    """512-byte clusters: a refcount table of one cluster describes 8 MiB of file."""
    chain = await chains.make(tmp_path, ["-" * 1024], 512)
    size = 24 * MIB

    async with chains.opened(chain) as image:
        await image.resize(size)
        model = ModelDisk(bytes(size))
        for offset in range(0, size, MIB):
            data = model.new_data(offset, MIB - 512)
            await image.write(offset, data)
            model.finish_write(offset, data)
        await image.flush()
        assert await read_all(image) == model.content
    chains.assert_same_in_qemu(chain, bytes(model.content))


@pytest.mark.parametrize("cluster_size", [512, 64 * KIB])
async def test_grown_disk_reads_as_zeroes_past_its_old_end(tmp_path: Path, cluster_size: int) -> None:
    """Also where a longer backing has data there."""
    chain = chains.make_with_qemu(tmp_path, ["ABCDEFGH", "-X-"], cluster_size)
    expected = chain.content + bytes(5 * cluster_size)

    async with chains.opened(chain) as image:
        await image.resize(8 * cluster_size)
        assert await read_all(image) == expected
    chains.assert_same_in_qemu(chain, expected)


async def test_discarded_space_goes_back_to_the_file_system(tmp_path: Path) -> None:
    chain = await chains.make(tmp_path, ["A" * 64])
    before = chain.active.stat().st_blocks * 512

    async with chains.opened(chain) as image:
        await image.discard(0, 48 * chain.cluster_size)
        await image.flush()
        assert (
            await read_all(image) == bytes(48 * chain.cluster_size) + chain.content[48 * chain.cluster_size :]
        )
    assert chain.active.stat().st_blocks * 512 <= before - 48 * chain.cluster_size


async def test_discard_hides_the_backing(tmp_path: Path) -> None:
    chain = await chains.make(tmp_path, ["ABCD", "-X--"])

    async with chains.opened(chain) as image:
        await image.discard(0, image.size)
        assert await read_all(image) == bytes(image.size)


async def test_freed_clusters_are_used_again(tmp_path: Path) -> None:
    """Rewriting the same clusters for ever does not let the file grow for ever."""
    chain = await chains.make(tmp_path, ["A" * 32], 4 * KIB)

    async with chains.opened(chain) as image:
        for _ in range(20):
            await image.write_zeroes(0, image.size)
            await image.flush()
            await image.write(0, chain.content)
            await image.flush()
        assert await read_all(image) == chain.content
    assert chain.active.stat().st_size < 3 * 32 * 4 * KIB


async def test_bitmaps_of_qemu_are_marked_out_of_date_by_writing(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", 4 * MIB)
    qemu_img.qemu("qemu-img", "bitmap", "--add", path, "tracks")
    chain = chains.Chain([path], ["qcow2"], 64 * KIB, bytes(4 * MIB))

    async with chains.opened(chain) as image:
        await image.write(0, b"x" * 512)
    assert path.read_bytes()[88:96] == bytes(8)
    chains.assert_same_in_qemu(chain, b"x" * 512 + bytes(4 * MIB - 512))


async def test_read_only_image_refuses_every_change(tmp_path: Path) -> None:
    chain = await chains.make(tmp_path, ["ABCD"])
    before = chain.active.read_bytes()

    async with chains.opened(chain, read_only=True) as image:
        assert not image.write_nowait(0, b"x" * 512)
        for change in (
            image.write(0, b"x" * 512),
            image.write_zeroes(0, 512),
            image.discard(0, chain.cluster_size),
            image.resize(2 * image.size),
            image.change_backing(None, None),
        ):
            with pytest.raises(RequestError) as caught:
                await change
            assert caught.value.kind is ErrorKind.READ_ONLY
    assert chain.active.read_bytes() == before
