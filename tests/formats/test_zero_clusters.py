"""Clusters of zeroes are found, and nothing else is taken for them."""

import random

import pytest

from blockd.block.zero_clusters import zero_clusters


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_exactly_the_clusters_of_zeroes(cluster_size: int, seed: int) -> None:
    """Also where a cluster begins or ends with zeroes, and at the end of a disk, where one is not whole."""
    choose = random.Random(seed)
    length = choose.randrange(1, 9) * cluster_size - choose.choice([0, 0, 1, 7, 8, 505, cluster_size - 1])
    content = bytearray(length)
    expected = set(range(0, length, cluster_size))
    for _ in range(choose.randrange(4)):
        position = choose.choice(
            [choose.randrange(length), length - 1, choose.randrange(length) & -cluster_size]
        )
        content[position] = choose.randrange(1, 256)
        expected.discard(position - position % cluster_size)
    assert set(zero_clusters(memoryview(content), cluster_size)) == expected
