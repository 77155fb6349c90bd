"""Devices: disks that guests, exports and jobs share, and what may be done to their chains."""
