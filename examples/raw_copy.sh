#!/bin/sh
# Copy the raw disk of a running guest to another raw file, and let the guest go on with that:
#
#     raw_copy.sh DEVICE TARGET.raw [QMP_SOCKET]
#
# A raw file cannot say what it lacks, so while the copying goes on a small file beside it, TARGET.add-cow,
# does. When everything is in TARGET.raw the device goes on with it alone, and the small file can go.
set -eu

device=$1
target=$2
socket=${3:-blockd.qmp}
beside=${target%.raw}.add-cow

# The image that the device is using now; holes of it stay holes.
file=$(blockctl --socket "$socket" --json list | python3 -c '
import json, sys
devices = json.load(sys.stdin)["devices"]
image = next(device["inserted"]["image"] for device in devices if device["device"] == sys.argv[1])
print(image["filename"])' "$device")
file=$(realpath "$file")

blockctl create "$beside" --format add-cow -o image_file="$(basename "$target")" \
    --backing "$file" --backing-format raw
blockctl --socket "$socket" switch "$device" "$beside" --format add-cow
blockctl --socket "$socket" stream "$device" --wait
rm "$beside"
echo "$device now runs on $target; $file is as it was at the switch"
