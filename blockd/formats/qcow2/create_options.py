"""What a new qcow2 image may be like: the options with qemu-img's names, defaults and error texts."""

from dataclasses import dataclass

from blockd.errors import RequestError
from blockd.formats.qcow2.header import (
    CLUSTER_BITS_MAX,
    CLUSTER_BITS_MIN,
    COMPRESSION_TYPES,
    EXTENDED_L2_ENTRY_SIZE,
    L1_SIZE_MAX,
    L2_ENTRY_SIZE,
    REFCOUNT_ORDER_MAX,
    SUBCLUSTER_COUNT,
)
from blockd.units import KIB, SECTOR_SIZE, format_size

CLUSTER_SIZE_DEFAULT = 65536
REFCOUNT_BITS_DEFAULT = 16
PREALLOCATION_MODES = ("off", "metadata", "falloc", "full")

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_ENTRY_SIZE = 8
_CLUSTER_SIZE_MIN, _CLUSTER_SIZE_MAX = 1 << CLUSTER_BITS_MIN, 1 << CLUSTER_BITS_MAX
_EXTENDED_CLUSTER_SIZE_MIN = SUBCLUSTER_COUNT * SECTOR_SIZE
_NEEDS_VERSION_3 = "compatibility level 1.1 and above (use version=v3 or greater)"


@dataclass(frozen=True)
class CreateOptions:
    """A new image, as somebody wants it; `check` says whether it can be."""

    size: int
    backing_filename: str | None = None
    backing_format: str | None = None
    cluster_size: int = CLUSTER_SIZE_DEFAULT
    compat: str = "1.1"
    refcount_bits: int = REFCOUNT_BITS_DEFAULT
    lazy_refcounts: bool = False
    extended_l2: bool = False
    compression_type: str = "zlib"
    preallocation: str = "off"

    @property
    def version(self) -> int:
        return _VERSIONS[self.compat]

    @property
    def l2_entry_size(self) -> int:
        return EXTENDED_L2_ENTRY_SIZE if self.extended_l2 else L2_ENTRY_SIZE

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:   RequestError: with QEMU's words, where it has any.
        """
        self._check_features()
        self._check_sizes()
        self._check_backing()

    def _check_sizes(self) -> None:
        if self.size < 0 or self.size % SECTOR_SIZE:
            raise RequestError(f"Image size must be a multiple of {SECTOR_SIZE} bytes")
        is_in_range = _CLUSTER_SIZE_MIN <= self.cluster_size <= _CLUSTER_SIZE_MAX
        if not is_in_range or self.cluster_size.bit_count() != 1:
            raise RequestError(
                f"Cluster size must be a power of two between {_CLUSTER_SIZE_MIN} and "
                f"{_CLUSTER_SIZE_MAX // KIB}k"
            )
        if self.extended_l2 and self.cluster_size < _EXTENDED_CLUSTER_SIZE_MIN:
            raise RequestError(
                "Extended L2 entries are only supported with cluster sizes of at least "
                f"{_EXTENDED_CLUSTER_SIZE_MIN} bytes"
            )
        largest = L1_SIZE_MAX // _ENTRY_SIZE * (self.cluster_size // self.l2_entry_size) * self.cluster_size
        if self.size > largest:
            raise RequestError(
                f"Image size {self.size} is too large for clusters of {self.cluster_size} bytes: "
                f"at most {largest} ({format_size(largest)}); larger clusters allow more"
            )

    def _check_features(self) -> None:
        _require_one_of("version", self.compat, tuple(_VERSIONS))
        if self.refcount_bits.bit_count() != 1 or not 0 < self.refcount_bits <= 1 << REFCOUNT_ORDER_MAX:
            raise RequestError("Refcount width must be a power of two and may not exceed 64 bits")
        _require_one_of("compression-type", self.compression_type, COMPRESSION_TYPES)
        _require_one_of("preallocation", self.preallocation, PREALLOCATION_MODES)
        if self.version == 2:
            self._check_version_2()

    def _check_version_2(self) -> None:
        if self.extended_l2:
            raise RequestError(f"Extended L2 entries are only supported with {_NEEDS_VERSION_3}")
        if self.lazy_refcounts:
            raise RequestError(f"Lazy refcounts only supported with {_NEEDS_VERSION_3}")
        if self.refcount_bits != REFCOUNT_BITS_DEFAULT:
            raise RequestError(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above "
                "(use version=v3 or greater)"
            )
        if self.compression_type != "zlib":
            raise RequestError(f"Non-zlib compression type is only supported with {_NEEDS_VERSION_3}")

    def _check_backing(self) -> None:
        filename, backing_format = self.backing_filename, self.backing_format
        if filename is None and backing_format is None:
            return
        if not filename:
            raise RequestError("Backing format cannot be used without backing file")
        if not backing_format:
            raise RequestError(
                f"The backing file '{filename}' needs its format with it, for example 'qcow2' or 'raw'"
            )
        if self.preallocation != "off" and not self.extended_l2:
            raise RequestError(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on"
            )


def _require_one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise RequestError(f"Parameter '{name}' does not accept value '{value}'")
