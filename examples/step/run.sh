#!/usr/bin/env bash
# Three stages of STEP and the ordinary run of the same depth and tokens, side by side, on two CPU cores:
# examples/step/run.sh [--section.key VALUE ...]. Run it again to go on after an interruption.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=runs/step
vanilla=runs/step_vanilla
data=$run/data
mkdir -p "$data"

echo "1. A tokenizer of 2,048 pieces, and the text as tokens, a document for each chapter"
[ -f "$data/tokenizer.model" ] ||
  python tools/train_tokenizer.py --input examples/data/austen.txt --vocab-size 2048 --output "$data/tokenizer.model"
[ -f "$data/austen.json" ] ||
  python tools/preprocess_data.py --input examples/data/austen.txt --tokenizer "$data/tokenizer.model" \
    --document-separator '\n\nCHAPTER ' --output "$data/austen"
python - "$data/held_out.txt" <<'END' # the twentieth of the chapters that data.split in config.yaml keeps from training
import sys
from pathlib import Path

separator = "\n\nCHAPTER "
chapters = Path("examples/data/austen.txt").read_text(encoding="utf-8").split(separator)
Path(sys.argv[1]).write_text(separator.join(chapters[round(0.95 * len(chapters)) :]), encoding="utf-8")
END

cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1)) # the cores are shared by the two processes
train() {
  torchrun --standalone --nproc-per-node 2 -m megatron_step.train --config examples/step/config.yaml "$@"
}

echo "2. STEP: a small model that grows twice; what is trained is frozen and gets adapters"
train "$@"

echo "3. The ordinary run: all layers from the start, as many steps"
steps=$(python -c "import json; print(json.load(open('$run/plan.json'))['stages'][-1]['last_step'])")
train "$@" --output_dir "$vanilla" --stages.count 1 --stages.layers auto --stages.steps "$steps"

echo "4. Both side by side"
python tools/report.py "$run" "$vanilla" --output "$run/report.png"

echo "5. The grown model for transformers, with its logits compared"
rm -rf "$run/hf" # of an earlier run of this script
python tools/export_hf.py "$run" "$run/hf" --check

echo "6. What it has learnt, in transformers: the last chapters, which it has not seen, and how it goes on from a few words"
python tools/evaluate.py "$run/hf" --text "$data/held_out.txt" --document-separator '\n\nCHAPTER ' --stride 128
python tools/evaluate.py "$run/hf" --generate "It was a fine morning, and Emma" --tokens 120
