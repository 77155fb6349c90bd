"""Compressed clusters: read only, since a write always goes to a cluster of its own.

Whatever the stored bytes say, no more than one cluster comes out of them, and no more memory is
taken for that than a few clusters.

Source: qcow2 specification, "Compressed Clusters Descriptor".
"""

import zlib

from blockd.block.node import BlockingSource, ProtocolNode
from blockd.errors import ImageError
from blockd.formats.qcow2.header import COMPRESSION_ZSTD, Header
from blockd.units import MIB

_DEFLATE_WINDOW_BITS = -12  # raw deflate, as the format demands
# What RFC 8878 recommends every decoder to support; no cluster needs more than 2 MiB.
_ZSTD_WINDOW_SIZE_MAX = 8 * MIB


class CompressedCluster(BlockingSource):
    """The content of one compressed cluster: there are as many as a plan has such clusters."""

    __slots__ = ("_file", "_header", "_host_offset", "_length")

    def __init__(self, file: ProtocolNode, host_offset: int, length: int, header: Header) -> None:
        self._file = file
        self._host_offset = host_offset
        self._length = length
        self._header = header

    def readinto_blocking(self, offset: int, buffer: memoryview) -> None:
        stored = bytearray(self._length)
        self._file.readinto_blocking(self._host_offset, memoryview(stored))
        content = self._decompressed(stored)
        buffer[:] = content[offset : offset + len(buffer)]

    def _decompressed(self, stored: bytearray) -> bytes:
        header = self._header
        decompress = _unzstd if header.compression_type == COMPRESSION_ZSTD else _inflate
        try:
            content = decompress(stored, header.cluster_size)
        except ValueError as error:
            raise self._corrupt(str(error)) from error
        if len(content) != header.cluster_size:
            raise self._corrupt(f"only {len(content)} bytes")
        return content

    def _corrupt(self, reason: str) -> ImageError:
        return ImageError(
            f"'{self._file.filename}': the compressed cluster at {self._host_offset:#x} is damaged: {reason}"
        )


def _inflate(stored: bytearray, length_max: int) -> bytes:
    """Decompress a raw deflate stream; ValueError: it is damaged."""
    try:
        return zlib.decompressobj(_DEFLATE_WINDOW_BITS).decompress(stored, length_max)
    except zlib.error as error:
        raise ValueError(str(error)) from error


def _unzstd(stored: bytearray, length_max: int) -> bytes:
    """Decompress one frame or several; ValueError: they are damaged.

    What follows the cluster in its last sector is not looked at.
    """
    import zstandard  # noqa: PLC0415  (slow to load, and few images need it)

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_SIZE_MAX)
    try:
        with decompressor.stream_reader(stored, read_across_frames=True) as reader:
            return reader.read(length_max)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
