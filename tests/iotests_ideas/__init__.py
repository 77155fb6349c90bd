"""The ideas of some of QEMU's iotests, as tests of blockd; each names the case it mirrors."""
