"""Drivers: how nodes come to be, from a file name or from options, and the graph they stand in."""

from blockd.drivers.graph import NodeGraph, check_blockdev
from blockd.drivers.table import DRIVERS, FORMATS

__all__ = ["DRIVERS", "FORMATS", "NodeGraph", "check_blockdev"]
