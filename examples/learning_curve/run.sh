#!/usr/bin/env bash
# The presets against ordinary training at the same tokens, each with three learning rates:
# examples/learning_curve/run.sh [options of megatron-step compare]. Run it again to go on after an interruption.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=runs/learning_curve
data=$folder/data
mkdir -p "$data"

echo "1. A tokenizer of 2,048 pieces for both texts, and the texts as tokens"
[ -f "$data/tokenizer.model" ] ||
  python tools/train_tokenizer.py --input examples/data --vocab-size 2048 --output "$data/tokenizer.model"
corpus() { # NAME SEPARATOR
  [ -f "$data/$1.json" ] || python tools/preprocess_data.py --input "examples/data/$1.txt" \
    --tokenizer "$data/tokenizer.model" --document-separator "$2" --output "$data/$1"
}
corpus austen '\n\nCHAPTER ' # a chapter is a document
corpus sotu '\n\n'           # an address is one

echo "2. Each way of training with each learning rate, a run on each core; the table follows"
train=(--arms vanilla parity lean paper --rates 1.5e-3 3.0e-3 6.0e-3)
python -m megatron_step compare examples/learning_curve/config.yaml "${train[@]}" --output "$folder" "$@"
