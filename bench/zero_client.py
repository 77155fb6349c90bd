"""A guest that trims or zeroes a disk twice: `python3 zero_client.py trim|zero URI LENGTH DEPTH`.

For the system's Python, which has libnbd's module. Prints the requests a second of each pass.
"""

import sys
import time

import nbd


def run(kind: str, uri: str, length: int, depth: int) -> None:
    """Ask for all of the disk, piece by piece, with so many requests in flight."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    request = handle.aio_trim if kind == "trim" else handle.aio_zero
    offsets = range(0, handle.get_size(), length)
    for _ in range(2):
        begun = time.perf_counter()
        for offset in offsets:
            while handle.aio_in_flight() >= depth:
                handle.poll(-1)
            request(length, offset, completion=_over)
        while handle.aio_in_flight():
            handle.poll(-1)
        print(len(offsets) / (time.perf_counter() - begun))
    handle.shutdown()


def _over(error: int) -> int:
    """Notice that a request is over, and have it forgotten."""
    if error:
        sys.exit(f"a request failed: {error}")
    return 1


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
