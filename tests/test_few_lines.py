"""The log of what may fail thousands of times a second."""

import logging

import pytest

from blockd.few_lines import INTERVAL_NS, FewLines


def test_there_is_at_most_one_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    times_ns = [5, 6, INTERVAL_NS + 4, INTERVAL_NS + 5, 2 * INTERVAL_NS + 5]
    lines = FewLines(logging.getLogger("blockd"), iter(times_ns).__next__)
    for _ in times_ns:
        lines.warn("export '%s': %s failed: %s", "vda", "flush", "disk full")
    first = "export 'vda': flush failed: disk full"
    more = " (2 more since the line before)"
    assert [record.message for record in caplog.records] == [first, first + more, first]
