"""Bytes are the only unit; these are the names of the round ones, and the arithmetic on them."""

import re
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

SECTOR_SIZE: Final = 512


def align_down(value: int, alignment: int) -> int:
    """Round down to a multiple of `alignment`, a power of two."""
    return value & -alignment


def align_up(value: int, alignment: int) -> int:
    """Round up to a multiple of `alignment`, a power of two."""
    return (value + alignment - 1) & -alignment


def parse_size(text: str) -> int:
    """Read a size such as ``64M`` or ``1.5G`` into bytes.

    Raises:   ValueError: not a size.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([BKMGTPE]?)", text, re.ASCII | re.IGNORECASE)
    if match is None:
        raise ValueError(f"'{text}' is not a size: give a number of bytes, optionally with k, M, G or T")
    factor = 1 << 10 * "BKMGTPE".index(match[2].upper() or "B")
    return int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor


def format_size(count: float) -> str:
    """Write a byte count for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
