"""A short run of the fuzz harness; `python -m tests.fuzz.fuzz_qmp 1000000` is the long one."""

from tests.fuzz.fuzz_qmp import COUNT, run


def test_short_run() -> None:
    figures = run(COUNT, seed=0)
    assert figures.streams == COUNT
    # It is no fuzzing if nothing is wrong, or nothing right.
    assert figures.values > COUNT / 2
    assert len(figures.errors) > 8
