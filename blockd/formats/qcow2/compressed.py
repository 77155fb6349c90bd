"""Compressed clusters: read only, since a write always goes to a cluster of its own.

Source: qcow2 specification, "Compressed Clusters Descriptor".
"""

import zlib

from blockd.block.node import BlockingSource, ProtocolNode
from blockd.errors import ImageError
from blockd.formats.qcow2.header import Header

_DEFLATE_WINDOW_BITS = -12  # raw deflate, as the format demands


class CompressedCluster(BlockingSource):
    """The content of one compressed cluster."""

    def __init__(self, file: ProtocolNode, host_offset: int, length: int, header: Header) -> None:
        if header.compression_type:
            raise ImageError(f"'{file.filename}': clusters compressed with zstd are not supported")
        self._file = file
        self._host_offset = host_offset
        self._length = length
        self._cluster_size = header.cluster_size

    def readinto_blocking(self, offset: int, buffer: memoryview) -> None:
        stored = bytearray(self._length)
        self._file.readinto_blocking(self._host_offset, memoryview(stored))
        content = self._decompressed(stored)
        buffer[:] = content[offset : offset + len(buffer)]

    def _decompressed(self, stored: bytearray) -> bytes:
        try:
            # Bounded: whatever the data says, no more than one cluster comes out.
            content = zlib.decompressobj(_DEFLATE_WINDOW_BITS).decompress(stored, self._cluster_size)
        except zlib.error as error:
            raise self._corrupt(str(error)) from error
        if len(content) != self._cluster_size:
            raise self._corrupt(f"only {len(content)} bytes")
        return content

    def _corrupt(self, reason: str) -> ImageError:
        return ImageError(
            f"'{self._file.filename}': the compressed cluster at {self._host_offset:#x} is damaged: {reason}"
        )
