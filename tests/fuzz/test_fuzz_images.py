"""Hostile images: 20,000 mutants a run; `make fuzz-images IMAGES=1000000` is for more.

Each part is a process of its own, whose memory is limited and measured, and which runs as nobody if it can.
"""

import subprocess
import sys

import pytest

from blockd.drivers import FORMATS
from tests.fuzz.image_mutations import Mutator
from tests.fuzz.image_seeds import VARIANTS, Seed
from tests.walls import PROJECT

PART_COUNT, PART_LENGTH = 5, 4000
TIMEOUT_S = 900


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("part", range(PART_COUNT))
def test_hostile_images_do_no_harm(part: int) -> None:
    numbers = [str(PART_LENGTH), "--seed", str(part * PART_LENGTH)]
    command = [sys.executable, "-m", "tests.fuzz.fuzz_images", *numbers]
    done = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words = done.stdout.replace(",", "").split()
    images, errors, kinds = int(words[0]), int(words[4]), int(words[7])
    assert images >= PART_LENGTH
    # It is no fuzzing if nothing is wrong, or always the same.
    assert errors > PART_LENGTH / 10
    assert kinds > 30


def test_a_mutant_is_made_again_by_its_number() -> None:
    seeds = [Seed("words", "some format", bytes(range(256)) * 20)]
    mutants = [Mutator(seeds).mutant(number)[1] for number in range(50)]
    assert [Mutator(seeds).mutant(number)[1] for number in range(50)] == mutants
    assert len({mutant.content for mutant in mutants}) > 40


def test_variants_are_of_formats_that_there_are() -> None:
    assert set(VARIANTS) <= set(FORMATS)
