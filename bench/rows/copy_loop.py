"""The yardsticks: what a stream and what a guest's writes cannot do without, and nothing else."""

import ctypes
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from blockd.units import MIB

PIECE_SIZE = 2 * MIB
SYNC_FILE_RANGE_WRITE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def copy_with_two_threads(source: Path, target: Path) -> tuple[float, float]:
    """Copy a file; returns seconds and processor seconds."""
    target.unlink(missing_ok=True)
    cpu_before = time.process_time()
    started = time.perf_counter()
    source_fd = os.open(source, os.O_RDONLY)
    target_fd = os.open(target, os.O_RDWR | os.O_CREAT)
    try:
        pieces = count(0, PIECE_SIZE)
        with ThreadPoolExecutor(2) as threads:
            for copier in [threads.submit(_copy, source_fd, target_fd, pieces) for _ in range(2)]:
                copier.result()
        os.fdatasync(target_fd)
    finally:
        os.close(source_fd)
        os.close(target_fd)
    return time.perf_counter() - started, time.process_time() - cpu_before


def write_into_clusters(source: Path, target: Path, cluster_size: int, block: bytes) -> list[float]:
    """Copy a file cluster by cluster with another beginning, one after the other; returns seconds of each.

    It is what writing a block into each cluster of an empty overlay takes, without a map or a guest.
    """
    target.unlink(missing_ok=True)
    durations: list[float] = []
    with source.open("rb", buffering=0) as base, target.open("wb", buffering=0) as image:
        while True:
            started = time.perf_counter()
            cluster = bytearray(cluster_size)
            if not base.readinto(cluster):
                return durations
            cluster[: len(block)] = block
            image.write(cluster)
            durations.append(time.perf_counter() - started)


def _copy(source_fd: int, target_fd: int, pieces: "count[int]") -> None:
    """Copy pieces until there are none; next() on a shared count is atomic."""
    buffer = bytearray(PIECE_SIZE)
    for offset in pieces:
        length = os.preadv(source_fd, [buffer], offset)
        if not length:
            return
        os.pwritev(target_fd, [memoryview(buffer)[:length]], offset)
        _libc.sync_file_range(target_fd, offset, length, SYNC_FILE_RANGE_WRITE)
