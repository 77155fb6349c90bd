"""Each call that keeps an order on the disk is needed: without it the sweep finds a crash that costs data."""

from pathlib import Path

import pytest

from tests.crash.mutations import HARMLESS, SITES, Found, find_calls, noticed_by

NOTE = Path(__file__).parents[2] / "docs" / "durability.md"


def test_every_call_has_a_purpose_and_stands_in_the_note() -> None:
    found: dict[str, int] = {}
    for call in find_calls():
        found[call.name] = found.get(call.name, 0) + 1
    assert found == {name: len(purposes) for name, purposes in SITES.items()}
    assert [str(call) for call in find_calls() if f"`{call}`" not in NOTE.read_text()] == []


@pytest.mark.slow
@pytest.mark.parametrize("call", find_calls(), ids=str)
async def test_call_that_is_left_out_is_noticed(call: Found) -> None:
    assert bool(await noticed_by(call)) == (call.name not in HARMLESS)
