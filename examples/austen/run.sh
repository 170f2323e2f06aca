#!/usr/bin/env bash
# From a text to a trained language model on two CPU cores: examples/austen/run.sh [--section.key VALUE ...]
# Run it again to go on after an interruption.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=runs/austen
data=$run/data
mkdir -p "$data"

echo "1. A tokenizer of 2,048 pieces, learnt from the text"
[ -f "$data/tokenizer.model" ] ||
  python tools/train_tokenizer.py --input examples/data/austen.txt --vocab-size 2048 --output "$data/tokenizer.model"

echo "2. The text as tokens, a document for each chapter"
[ -f "$data/austen.json" ] ||
  python tools/preprocess_data.py --input examples/data/austen.txt --tokenizer "$data/tokenizer.model" \
    --document-separator '\n\nCHAPTER ' --output "$data/austen"

echo "3. Training with two processes"
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1)) # the cores are shared by the two processes
torchrun --standalone --nproc-per-node 2 -m megatron_step.train --config examples/austen/config.yaml "$@"

echo "4. The loss over the steps"
python tools/report.py "$run" --output "$run/report.png"

echo "5. What it has learnt: the last chapters, which it has not seen, and how it goes on from a few words"
python tools/evaluate.py "$run"
python tools/evaluate.py "$run" --generate "It was a fine morning, and Emma" --tokens 120
