#!/bin/sh
# Copy the disk of a running guest to another file, and let the guest go on with the copy:
#
#     live_block_copy.sh DEVICE TARGET.qcow2 [QMP_SOCKET]
#
# The copy starts as an overlay of the disk in use. The guest is switched to it first and never waits
# for the copying; a crash at any time leaves a valid disk, and the stream can simply be started again.
set -eu

device=$1
target=$2
socket=${3:-blockd.qmp}

# The image that the device is using now, and its format.
image=$(blockctl --socket "$socket" --json list | python3 -c '
import json, sys
devices = json.load(sys.stdin)["devices"]
image = next(device["inserted"]["image"] for device in devices if device["device"] == sys.argv[1])
print(image["format"], image["filename"])' "$device")
format=${image%% *}
file=$(realpath "${image#* }")

blockctl create "$target" --backing "$file" --backing-format "$format"
blockctl --socket "$socket" switch "$device" "$target"
blockctl --socket "$socket" stream "$device" --wait
echo "$device now runs on $target; $file is as it was at the switch"
