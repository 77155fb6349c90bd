"""Drivers: how nodes come to be, from a file name or from options, and the graph they stand in."""

from blockd.drivers.graph import NodeGraph
from blockd.drivers.table import DRIVERS, FORMATS, check_blockdev, unknown_format

__all__ = ["DRIVERS", "FORMATS", "NodeGraph", "check_blockdev", "unknown_format"]
