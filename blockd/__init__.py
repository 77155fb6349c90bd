"""blockd: live image streaming and live block copy for disk images in use."""

__version__ = "0.1.0"
