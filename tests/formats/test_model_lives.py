"""Lives of disks over files that are not in the page cache; `make model-sweep` goes on with them."""

import pytest

from tests.model_sweep import KINDS_OF_LIVES, live


@pytest.mark.parametrize("seed", range(len(KINDS_OF_LIVES) // 2), ids=lambda seed: KINDS_OF_LIVES[seed].shape)
def test_short_lives(seed: int) -> None:
    counts = live(seed, 100)
    assert counts["lives"]


@pytest.mark.parametrize(
    "number", range(len(KINDS_OF_LIVES) // 2), ids=lambda number: KINDS_OF_LIVES[number].shape
)
def test_short_lives_with_leaks(number: int) -> None:
    counts = live(len(KINDS_OF_LIVES) + number, 100)
    assert counts["leaks"] or not KINDS_OF_LIVES[number].may_leak


# What they have found: 5008 a stream that could not see what a table with extended entries maps.
@pytest.mark.parametrize("seed", [5008])
def test_lives_that_have_found_something(seed: int) -> None:
    assert live(seed)["lives"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", range(4))
def test_long_lives(block: int) -> None:
    count = len(KINDS_OF_LIVES) // 4
    for seed in range(1000 + block * count, 1000 + (block + 1) * count):
        assert live(seed, 1000)["cancelled"]
