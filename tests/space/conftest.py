"""The scene of a case, on the filesystem that it names."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.filesystems import mounted
from tests.space.scene import Case, Scene


@pytest.fixture
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    case: Case = request.param
    with mounted(case.place, tmp_path) as place:
        yield Scene(tmp_path, place.path, case)
