#!/usr/bin/env bash
# Stream a device to the end with nothing but socat: socat-session.sh QMP_SOCKET DEVICE
#
# Commands go in, one JSON object after the other; replies and events come out, a line each. The session
# is held open until the completion event, or an error, has come.
set -euo pipefail

socket=$1
device=$2

coproc session { socat - "UNIX-CONNECT:$socket"; }
echo '{"execute": "qmp_capabilities"}' >&"${session[1]}"
echo '{"execute": "block_stream", "arguments": {"device": "'"$device"'"}, "id": "start"}' >&"${session[1]}"
sed -u '/BLOCK_STREAM_COMPLETED/q; /"error"/q' <&"${session[0]}"
