"""Neighbouring host clusters, as they are allocated and freed together."""

from typing import NamedTuple


class Run(NamedTuple):
    """Neighbouring host clusters."""

    host_offset: int
    cluster_count: int


def append_joined(runs: list[Run], run: Run, cluster_bits: int) -> None:
    """Add a run, as a part of the last one if it begins where that ends."""
    if runs and runs[-1].host_offset + (runs[-1].cluster_count << cluster_bits) == run.host_offset:
        run = Run(runs[-1].host_offset, runs.pop().cluster_count + run.cluster_count)
    runs.append(run)


def clusters_for(length: int, cluster_size: int) -> int:
    """How many clusters so many bytes take."""
    return -(-length // cluster_size)
