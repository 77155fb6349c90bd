"""QEMU's own tests of nodes, jobs and exports pass with blockd in QEMU's place."""

from pathlib import Path

import pytest

from tests.qemu_iotests.cases import SCRIPTS, UNIT_TESTS, Script, UnitTests
from tests.qemu_iotests.running import Place, cases_of, compared_sections, run_cases
from tests.qemu_iotests.source import unpacked_tests


@pytest.fixture(scope="module")
def tests() -> Path:
    return unpacked_tests()


@pytest.mark.parametrize("test", UNIT_TESTS, ids=lambda test: Path(test.name).name)
def test_every_case_passes(test: UnitTests, tests: Path, tmp_path: Path) -> None:
    place = Place(tests, tmp_path)
    cases = cases_of(place, test)
    assert set(test.left_out) <= set(cases), "what is left out is there"
    wanted = [case for case in cases if case not in test.left_out]
    results = run_cases(place, test, wanted) if wanted else {}
    assert not {case: result for case, result in results.items() if result != "ok"}


@pytest.mark.parametrize("test", SCRIPTS, ids=lambda test: Path(test.name).name)
def test_script_says_what_is_expected(test: Script, tests: Path, tmp_path: Path) -> None:
    compared = list(compared_sections(Place(tests, tmp_path), test))
    assert compared
    for title, expected, said in compared:
        assert said == expected, title
