"""A filter in front of the final base sees the reads that go through to it."""

from pathlib import Path

from blockd.block.node import BlockNode, Buffer, FilterNode
from blockd.filters.blkstream import BlkStream
from tests import chains
from tests.missing import skip_without


class CountingFilter(FilterNode):
    """Counts the reads answered at once."""

    driver = "counting"

    def __init__(self, child: BlockNode) -> None:
        super().__init__(child, node_name="counting")
        self.read_count = 0

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        self.read_count += 1
        return self.child.read_nowait(offset, length)

    async def read(self, offset: int, length: int) -> Buffer:
        return await self.child.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        await self.child.write(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        await self.child.write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        await self.child.discard(offset, length)


async def test_read_at_once_from_the_base_passes_its_filter(tmp_path: Path) -> None:
    chain = await chains.make(tmp_path, ["AB", "--", "-C"])
    async with chains.opened(chain) as active:
        middle = active.backing
        assert middle is not None and middle.backing is not None
        base = middle.backing
        if base.read_nowait(0, 1) is None:
            skip_without(f"a filesystem whose files can be read without waiting, for {tmp_path}")
        middle.backing = counting = CountingFilter(base)
        node = BlkStream(active, base, "stream")

        data = node.read_nowait(0, 4096)

        assert data is not None and bytes(data) == chain.content[:4096]
        assert counting.read_count == 1
        middle.backing = base
