"""QEMU's own tests, unchanged and from Debian's source package, with blockd where they start QEMU.

Nothing of QEMU is kept here. `source.py` finds the package, `machine.py` is the program that the tests
start in QEMU's place, `cases.py` tells what is left out and why, and `running.py` runs a test and compares
what it says with what QEMU's own says.
"""
