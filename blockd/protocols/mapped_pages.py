"""The pages that a file has in the page cache, as memory for the kernel to read from.

The mapping has no Python object: its bytes may go away with the file's, and touching them then would be the
end of this process. For the kernel, that is an error of the call it does for us.
"""

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator

from blockd.units import align_down

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_int64]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_FAILED = ctypes.c_void_p(-1).value


@contextlib.contextmanager
def mapped_pages(fd: int, offset: int, length: int) -> Iterator[int]:
    """Have a range of a file in memory, read already, at the address given.

    Raises:   OSError: it cannot be.
    """
    os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
    start = align_down(offset, mmap.ALLOCATIONGRANULARITY)
    mapped_length = offset + length - start
    address = _libc.mmap(None, mapped_length, mmap.PROT_READ, mmap.MAP_SHARED | mmap.MAP_POPULATE, fd, start)
    if address == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    try:
        yield address + offset - start
    finally:
        _libc.munmap(address, mapped_length)
