"""The daemon: the composition root that brings all parts together, starts them and ends them."""

from blockd.daemon.daemon import Daemon

__all__ = ["Daemon"]
