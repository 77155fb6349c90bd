#!/bin/sh
# Start a virtual machine on an export: qemu_guest.sh DEVICE [NBD_SOCKET] [more QEMU options]
#
# QEMU sees a network disk; what happens under it (streaming, switching to a copy) is blockd's business.
# With DRY_RUN=1 the command is printed and not run.
set -eu

device=${1:?"usage: qemu_guest.sh DEVICE [NBD_SOCKET] [more QEMU options]"}
socket=${2:-blockd.nbd}
shift $(($# < 2 ? $# : 2))

set -- qemu-system-x86_64 -machine q35,accel=kvm:tcg -m 1G \
    -blockdev "driver=nbd,node-name=disk,export=$device,server.type=unix,server.path=$socket,reconnect-delay=10" \
    -device virtio-blk-pci,drive=disk \
    "$@"

if [ "${DRY_RUN:-0}" = 1 ]; then
    echo "$*"
elif command -v "$1" >/dev/null; then
    exec "$@"
else
    echo "$1 is not installed (Debian: apt install qemu-system-x86). It would be started as:" >&2
    echo "$*" >&2
    exit 127
fi
