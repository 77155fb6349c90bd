"""Disks offered over NBD: listeners, the export table, and one connection's two phases."""
