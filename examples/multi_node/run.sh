#!/usr/bin/env bash
# Train on several machines; start on each of them: examples/multi_node/run.sh NODES HOST:PORT PROCESSES [--section.key VALUE ...]
# NODES machines take part, with PROCESSES processes each; they meet at HOST:PORT, where HOST is one of them.
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: $0 NODES HOST:PORT PROCESSES [--section.key VALUE ...]" >&2
  exit 2
fi
cd "$(dirname "$0")/../.."
nodes=$1 endpoint=$2 processes=$3
shift 3
exec torchrun --nnodes "$nodes" --nproc-per-node "$processes" \
  --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id megatron_step \
  -m megatron_step.train --config examples/multi_node/config.yaml "$@"
