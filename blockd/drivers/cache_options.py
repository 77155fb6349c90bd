"""The options of qcow2 images that size QEMU's caches: without effect here, and checked as QEMU does."""

from blockd.block.options import Options
from blockd.errors import RequestError

_SIZES = ("cache-size", "l2-cache-size", "refcount-cache-size", "l2-cache-entry-size")
_ENTRY_SIZE_MIN = 512
_INTERVAL_MAX = (1 << 32) - 1


def check_cache_options(options: Options, cluster_size: int) -> None:
    """Refuse sizes that there cannot be, or that do not go together.

    Raises:   RequestError: which ones.
    """
    told = {name: value for name, value in options.items() if isinstance(value, int)}
    for name in _SIZES:
        if told.get(name, 0) < 0:
            raise RequestError(f"Parameter '{name}' expects a non-negative number below 2^64")
    parts = [name for name in ("l2-cache-size", "refcount-cache-size") if name in told]
    if "cache-size" in told:
        if len(parts) > 1:
            raise RequestError(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
            )
        for name in parts:
            if told[name] > told["cache-size"]:
                raise RequestError(f"{name} may not exceed cache-size")
    entry_size = told.get("l2-cache-entry-size", cluster_size)
    if not _ENTRY_SIZE_MIN <= entry_size <= cluster_size or entry_size & (entry_size - 1):
        raise RequestError(
            f"L2 cache entry size must be a power of two between {_ENTRY_SIZE_MIN} and the cluster size "
            f"({cluster_size})"
        )
    if not 0 <= told.get("cache-clean-interval", 0) <= _INTERVAL_MAX:
        raise RequestError("Cache clean interval too big")
