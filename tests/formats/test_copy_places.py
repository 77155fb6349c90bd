"""How large the places are that copies get, and what becomes of what they leave."""

import pytest

from blockd.formats.copying_apart import Place
from blockd.formats.density import DENSITY_LENGTH, Density
from blockd.formats.qcow2.image import Qcow2Image
from blockd.protocols.file import FileNode
from blockd.units import KIB, MIB
from tests.recording import RecordingFile
from tests.streaming import overlay

CLUSTER = 64 * KIB
FOLIO = FileNode.folio_length
COPY_LENGTH = 16 * MIB


def test_a_small_copy_tells_little() -> None:
    density = Density()
    density.note(CLUSTER, CLUSTER)
    assert density.expected(COPY_LENGTH) < FOLIO


@pytest.mark.parametrize("share", [0, 16, 2, 1])
def test_what_is_expected_is_what_was_found_lately(share: int) -> None:
    density = Density()
    for length in (DENSITY_LENGTH, 0):
        for _ in range(4 * DENSITY_LENGTH // MIB):
            density.note(length and MIB, MIB)
    for _ in range(4 * DENSITY_LENGTH // MIB):
        density.note(MIB // share if share else 0, MIB)
    expected = COPY_LENGTH // share if share else 0
    assert density.expected(COPY_LENGTH) == pytest.approx(expected, abs=COPY_LENGTH // 16)


def expect_data(density: Density) -> None:
    for _ in range(8):
        density.note(COPY_LENGTH, COPY_LENGTH)


async def test_what_a_copy_leaves_of_its_last_folio_is_for_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RecordingFile, "folio_length", FOLIO)
    image = await overlay(RecordingFile(), None, 64 * MIB, cluster_size=CLUSTER)
    assert isinstance(image, Qcow2Image)
    places = image.metadata.copy_places
    expect_data(places.density)
    place = await places.allocate(COPY_LENGTH)
    assert place == Place(FOLIO, COPY_LENGTH)
    stored_length = COPY_LENGTH // 2 + CLUSTER
    places.finish(place, stored_length, COPY_LENGTH)
    expect_data(places.density)
    await image.write(0, bytes(CLUSTER))  # a guest's goes elsewhere
    left = Place(FOLIO + stored_length, FOLIO - CLUSTER)
    assert await places.allocate(COPY_LENGTH) == left
    assert await places.allocate(COPY_LENGTH) == Place(left.host_offset + left.length, COPY_LENGTH)
    await image.close()
