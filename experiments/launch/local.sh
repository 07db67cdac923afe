#!/usr/bin/env bash
# Several processes on this machine, as several hosts would be: to try what runs on many.
#
#   experiments/launch/local.sh 2 effjax run --config configs/quickstart.py:smoke
#
# Each process has all devices of the machine, which fits CPUs only; on one machine with
# GPUs a single process uses all of them. JAX_NUM_CPU_DEVICES=4 pretends that each has 4.
# What process 0 prints is shown; the others say something only if they end badly.
# Ctrl-C and SIGTERM reach all of them. The exit code is the first that is not 0.
set -u

if [ $# -lt 2 ] || ! [ "$1" -gt 0 ] 2>/dev/null; then
  echo "usage: $0 NUM_PROCESSES COMMAND [ARGUMENT ...]" >&2
  exit 2
fi
count=$1
shift

# A port that nobody uses now; process 0 listens there.
port=${EFFJAX_PORT:-$(python3 -c '
import socket
with socket.socket() as s:
  s.bind(("127.0.0.1", 0))
  print(s.getsockname()[1])')}
export EFFJAX_COORDINATOR=127.0.0.1:$port EFFJAX_NUM_PROCESSES=$count

pids=()
for ((i = 0; i < count; i++)); do
  EFFJAX_PROCESS_ID=$i "$@" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM

code=0
for pid in "${pids[@]}"; do
  # A signal ends `wait`, not the process: wait again.
  while wait "$pid"; one=$?; kill -0 "$pid" 2>/dev/null; do :; done
  [ "$code" -ne 0 ] || code=$one
done
exit "$code"
