#!/usr/bin/env bash
# Train on this machine: examples/one_machine/run.sh [PROCESSES] [--section.key VALUE ...]
# Without PROCESSES there is one for each GPU, or one for each core where there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
processes=auto
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  processes=$1
  shift
fi
exec torchrun --standalone --nproc-per-node "$processes" -m megatron_step.train \
  --config examples/one_machine/config.yaml "$@"
