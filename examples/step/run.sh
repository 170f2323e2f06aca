#!/usr/bin/env bash
# A model that grows in three stages beside the ordinary run of the same depth and tokens, on two CPU cores:
# examples/step/run.sh [--section.key VALUE ...]. Run it again to go on after an interruption.
set -euo pipefail
cd "$(dirname "$0")/../.."
run=runs/step
vanilla=runs/step_vanilla
paper=runs/step_paper
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
export OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1)) # two runs at a time share the cores
train() {
  python -m megatron_step.train --config examples/step/config.yaml "$@"
}

echo "2. The ordinary run: all layers from the start, the usual 18 bytes a weight; its lines go to $vanilla.log"
train "$@" --output_dir "$vanilla" --stages.count 1 --stages.layers auto --optimizer.states full >> "$vanilla.log" 2>&1 &
ordinary=$!
trap 'kill "$ordinary" 2> /dev/null || true' EXIT

echo "3. At the same time, a small model that grows twice, while all its layers train (preset parity)"
train "$@"

echo "4. STEP as published: what is trained is frozen and gets adapters (preset paper)"
# Three schedules of 0.4 of the steps; the model grows after 0.75 of the first two.
steps=$(python -c "import json; print(round(0.4 * json.load(open('$run/plan.json'))['stages'][-1]['last_step']))")
train "$@" --output_dir "$paper" --preset paper --adapter '{rank: 8, alpha: 16}' --stages.steps "$steps"
wait "$ordinary" || { tail -n 3 "$vanilla.log" >&2; exit 1; }

echo "5. All three side by side, and what they would need for larger models, by the planner"
python tools/report.py "$run" "$paper" "$vanilla" --output "$run/report.png"
python examples/step/larger.py

echo "6. The grown model for transformers, with its logits compared"
rm -rf "$run/hf" # of an earlier run of this script
python tools/export_hf.py "$run" "$run/hf" --check

echo "7. What it has learnt, in transformers: the last chapters, which it has not seen, and how it goes on from a few words"
python tools/evaluate.py "$run/hf" --text "$data/held_out.txt" --document-separator '\n\nCHAPTER ' --stride 64
python tools/evaluate.py "$run/hf" --generate "It was a fine morning, and Emma" --tokens 120
